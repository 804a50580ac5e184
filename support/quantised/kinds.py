"""The kinds of quantised checkpoints by their names, each made from a checkpoint once."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.quantised.compressed_tensors import write_compressed_tensors
from support.quantised.modelslim import write_modelslim
from support.quantised.plan import DYNAMIC, FOUR_BITS, STATIC, Plan

ABSORBED = "kv_b_proj"
"""The layer of latent attention that is multiplied with others after loading. ModelSlim leaves it as it is."""
PLANS = {
    "modelslim-w8a8": Plan(dense=STATIC, experts=DYNAMIC),
    "modelslim-w8a8-dynamic": Plan(),
    "modelslim-w4a8": Plan(dense=DYNAMIC, experts=FOUR_BITS),
    "compressed-tensors-w8a8": Plan(),
    "compressed-tensors-w8a8-static": Plan(dense=STATIC, experts=STATIC),
    "compressed-tensors-w8a8-coarse": Plan(dense=DYNAMIC, experts=FOUR_BITS),  # the numbers of w4a8, as int8
}


def make_quantised(
    kind: str, source: Path, target: Path, *, older: bool = False, left_out: tuple[str, ...] = ()
) -> str:
    """Writes a copy of `source` of this kind into `target` unless it is there, and returns its path.

    `left_out` are parts of the names of layers that are not quantised; `older` is as in `support.quantised.modelslim`.
    """
    if not target.exists():
        unfinished = target.with_name(f".{target.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        if kind.startswith("modelslim"):
            left_out = (*left_out, ABSORBED)
        plan = Plan(PLANS[kind].dense, PLANS[kind].experts, left_out)
        if kind.startswith("modelslim"):
            write_modelslim(source, unfinished, plan, older=older)
        else:
            write_compressed_tensors(source, unfinished, plan)
        unfinished.rename(target)
    return str(target)
