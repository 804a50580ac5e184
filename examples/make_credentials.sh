#!/usr/bin/env bash
# What a deployment needs to keep others out: a token, an authority, and a certificate for each host.
#
#     examples/make_credentials.sh DIRECTORY HOST [HOST ...]
#
# Files that are there already are kept, so hosts can be added later.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 DIRECTORY HOST [HOST ...]" >&2
    exit 2
fi
directory=$1
shift

umask 077
mkdir -p "$directory"
cd "$directory"

new_key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)

if [ ! -e netloader.token ]; then
    openssl rand -hex 32 >netloader.token
fi
if [ ! -e ca.key ]; then
    openssl req -x509 "${new_key[@]}" -days 3650 -subj "/CN=netloader authority" -keyout ca.key -out ca.pem
fi
for host in "$@"; do
    if [ -e "$host.pem" ]; then
        continue
    fi
    openssl req "${new_key[@]}" -subj "/CN=$host" -keyout "$host.key" -out "$host.csr"
    openssl x509 -req -in "$host.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -out "$host.pem"
    rm "$host.csr"
done

echo "each HOST gets netloader.token, ca.pem, HOST.pem and HOST.key; ca.key stays here"
