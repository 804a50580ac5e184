"""Exchange of small values between the ranks of an instance, over vLLM's own CPU groups."""

from __future__ import annotations

from typing import Final

import torch

PAYLOAD_LIMIT: Final = 1020
_LENGTH_BYTES: Final = 4


def gather(payload: bytes) -> list[bytes]:
    """What every rank of this instance passed, in order of rank. All ranks must call it.

    `payload` has at most PAYLOAD_LIMIT bytes. A plain tensor travels, so nothing is unpickled.
    """
    from vllm.distributed.parallel_state import get_world_group

    assert len(payload) <= PAYLOAD_LIMIT, f"a payload of {len(payload)} bytes is above {PAYLOAD_LIMIT}"
    group = get_world_group()
    if group.world_size == 1:
        return [payload]
    framed = (len(payload).to_bytes(_LENGTH_BYTES, "big") + payload).ljust(PAYLOAD_LIMIT + _LENGTH_BYTES, b"\0")
    ours = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
    all_ranks = [torch.empty_like(ours) for _ in range(group.world_size)]
    torch.distributed.all_gather(all_ranks, ours, group=group.cpu_group)
    return [_unframe(bytes(tensor.tolist())) for tensor in all_ranks]


def agreed(consent: bool) -> bool:
    """Whether all ranks of this replica consent. All of them must call it; other data-parallel replicas need not."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    votes = torch.tensor(consent, dtype=torch.int32, device="cpu")
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(votes)


def alike(value: int | None) -> bool:
    """Whether all ranks of this replica that know a value, of less than 63 bits, know the same. As `agreed`."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    unknown = torch.iinfo(torch.int64).max
    least = torch.tensor([unknown, unknown] if value is None else [value, -value], dtype=torch.int64, device="cpu")
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(least[0] == unknown or least[0] == -least[1])


def _unframe(framed: bytes) -> bytes:
    length = int.from_bytes(framed[:_LENGTH_BYTES], "big")
    return framed[_LENGTH_BYTES : _LENGTH_BYTES + length]
