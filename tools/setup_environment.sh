#!/usr/bin/env bash
# Makes the virtual environment $1 with vLLM for CPUs, this package (editable) and what its tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}
torch=torch==2.13.0+cpu

say() { echo "setup: $*"; }

install() {
    # pip's warnings about other packages' metadata hide its progress; errors always come through.
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" |
        { grep --line-buffered -E '^ *(Collecting|Downloading|Building|Installing|Successfully)' || true; }
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "$("$python" --version) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)"
    exit 1
}
if ! "$python" -m venv "$venv"; then
    say "this Python cannot make virtual environments yet: installing Debian's package for that"
    "$([ "$(id -u)" = 0 ] && echo env || echo sudo)" apt-get install --yes --no-install-recommends python3-venv
    "$python" -m venv --clear "$venv"
fi

say "torch for CPUs"
install "$torch" || install "$torch" --index-url https://download.pytorch.org/whl/cpu
say "vLLM for CPUs and the development tools (a few minutes)"
install -r requirements-cpu.txt -r requirements-dev.txt
# vLLM's metadata asks for these three; their common builds are for CUDA, break beside a CPU torch, and text models
# run without them.
"$venv/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
install 'setuptools>=77' wheel
install --no-deps --no-build-isolation tools/vllm_name
install --no-deps --no-build-isolation --editable .
rm -rf tools/vllm_name/build tools/vllm_name/*.egg-info
say "done"
