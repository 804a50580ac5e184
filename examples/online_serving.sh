#!/usr/bin/env bash
# A server that loads MODEL from disk, a client that takes the weights from it, and the same question to both.
#
#     examples/online_serving.sh MODEL
set -euo pipefail

model=${1:?usage: $0 MODEL (a directory or a hub name)}
server_port=${SERVER_PORT:-8000}
client_port=${CLIENT_PORT:-8001}
weights_port=${WEIGHTS_PORT:-19000}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB, so that both fit on a small machine

scratch=$(mktemp -d)
processes=()

cleanup() {
    # Each instance leads a process group of its own, with its engine in it. Those that have ended are no error.
    for process in "${processes[@]}"; do
        kill -TERM -- "-$process" 2>/dev/null || true
    done
    for process in "${processes[@]}"; do
        for _ in {1..10}; do
            kill -0 -- "-$process" 2>/dev/null || break
            sleep 1
        done
        kill -KILL -- "-$process" 2>/dev/null || true
    done
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # name, HTTP port, Netloader's configuration
    if (: </dev/tcp/127.0.0.1/"$2") 2>/dev/null; then
        echo "port $2 is in use: set SERVER_PORT or CLIENT_PORT" >&2
        exit 1
    fi
    setsid vllm serve "$model" --served-model-name model --host 127.0.0.1 --port "$2" \
        --enforce-eager --max-model-len 512 \
        --load-format netloader --model-loader-extra-config "$3" \
        </dev/null >"$scratch/$1.log" 2>&1 &
    processes+=($!)
}

wait_until_ready() { # name, HTTP port
    local process=${processes[-1]}
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$2/health"; do
        if ! kill -0 "$process" 2>/dev/null; then
            echo "the $1 ended while starting:" >&2
            tail -n 30 "$scratch/$1.log" >&2
            exit 1
        fi
        sleep 1
    done
    grep --only-matching 'netloader loaded.*' "$scratch/$1.log" | sed "s/^/$1: /"
}

ask() { # HTTP port
    curl --silent --show-error --fail "http://127.0.0.1:$1/v1/completions" \
        --header 'Content-Type: application/json' \
        --data '{"model": "model", "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}' |
        python3 -c 'import json, sys; print(repr(json.load(sys.stdin)["choices"][0]["text"]))'
}

echo "starting the server; this takes a minute or two"
start server "$server_port" \
    "{\"LISTEN_HOST\": \"127.0.0.1\", \"LISTEN_PORT\": $weights_port}"
wait_until_ready server "$server_port"

echo "starting the client"
start client "$client_port" \
    "{\"LISTEN_HOST\": \"127.0.0.1\", \"SOURCE\": [\"127.0.0.1:$weights_port\"], \"FALLBACK\": \"error\"}"
wait_until_ready client "$client_port"

from_server=$(ask "$server_port")
from_client=$(ask "$client_port")
echo "server answers: $from_server"
echo "client answers: $from_client"
if [ "$from_server" != "$from_client" ]; then
    echo "the answers differ" >&2
    exit 1
fi
echo "the answers are equal"
