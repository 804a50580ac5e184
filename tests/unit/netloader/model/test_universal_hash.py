"""A hash that the device makes tells every change of a tensor's bytes, wherever they lie."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from support.arrangements import fractal, transposed
from vllm_ascend.model_loader.netloader.model import universal_hash
from vllm_ascend.model_loader.netloader.model.inverses import AsLoaded, readings
from vllm_ascend.model_loader.netloader.model.universal_hash import UniversalHash
from vllm_ascend.model_loader.netloader.model.views import flat
from vllm_ascend.model_loader.netloader.weights.manifest import TensorSpec

CPU = torch.device("cpu")
HASH = UniversalHash(CPU)


def bytes_of(data: bytes) -> AsLoaded:
    return AsLoaded(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def hash_of(data: bytes) -> bytes:
    return HASH.of(bytes_of(data), len(data))


@given(st.binary(min_size=1, max_size=70_000), st.data())
def test_any_changed_bit_changes_it_and_nothing_else_does(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[at] ^= 1 << draw.draw(st.integers(0, 7))
    assert hash_of(data) == hash_of(bytes(data)) != hash_of(bytes(changed))


def test_bytes_that_change_places_change_it() -> None:
    rows = [bytes([number]) * 1024 for number in range(64)]
    assert len({hash_of(b"".join(rows[number:] + rows[:number])) for number in range(64)}) == 64
    columns = bytes(range(256)) * 4
    assert len({hash_of(columns[number:] + columns[:number]) for number in range(256)}) == 256


def test_contents_of_several_groups_of_blocks_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(universal_hash, "SCRATCH_BYTES", 2048)
    data = secrets.token_bytes(3 * 2048 * 32 + 5000)
    assert hash_of(data) == hash_of(bytes(data))
    for at in range(0, len(data), 2048):
        assert hash_of(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) != hash_of(data)


def test_it_is_that_of_the_bytes_however_they_lie() -> None:
    spec = TensorSpec("weight", "int8", (192, 160), (160, 1), 0)
    weight = torch.randint(-128, 128, spec.shape, dtype=torch.int8)
    arranged = flat(fractal(transposed(weight)))
    alike = [HASH.of(contents, spec.nbytes) for contents in readings(spec, arranged)]
    assert alike.count(HASH.of(AsLoaded(flat(weight)), spec.nbytes)) == 1


def test_the_largest_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_bytes", lambda count: b"\x80" * count)
    extreme = UniversalHash(CPU)
    for changed in (b"\x81", b"\x7f"):
        contents = [bytes_of(b"\x80" * 1023 + last) for last in (b"\x80", changed)]
        assert extreme.of(contents[0], 1024) != extreme.of(contents[1], 1024)


def test_each_object_has_a_key_of_its_own() -> None:
    data = bytes(range(200))
    assert UniversalHash(CPU).of(bytes_of(data), 200) != hash_of(data)


class Rough(TorchDispatchMode):
    """A device whose products are rounded."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        exact = function is not torch.ops.aten.mm.default or not result.is_floating_point()
        return result if exact else result.bfloat16().float()


def test_on_a_device_that_rounds_the_host_reads_all_bytes(caplog: pytest.LogCaptureFixture) -> None:
    data = secrets.token_bytes(5000)
    with Rough():  # type: ignore[no-untyped-call]
        rough = UniversalHash(CPU)
        found = rough.of(bytes_of(data), 5000)
        assert found == rough.of(bytes_of(data), 5000) != rough.of(bytes_of(data[::-1]), 5000)
    assert found == hashlib.sha256(data).digest()
    assert "cpu does not multiply small integers exactly in fp32, so the host reads all weights" in caplog.text
