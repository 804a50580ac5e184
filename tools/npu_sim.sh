# To be sourced: python, pytest and vllm are those that run on the simulated NPU. See csrc/cann_sim/README.md.
_npu_sim_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
source "$_npu_sim_root/${NPU_VENV:-.venv-npu}/bin/activate"
source "$_npu_sim_root/csrc/cann_sim/build/env.sh"
unset _npu_sim_root
