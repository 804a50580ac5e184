from __future__ import annotations

import contextlib
import hashlib
import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.errors import PeerError, ProtocolError
from vllm_ascend.model_loader.netloader.model.views import DTYPES, manifest_of
from vllm_ascend.model_loader.netloader.weights.identity import Difference
from vllm_ascend.model_loader.netloader.weights.manifest import ALIGNMENT, Alias, Manifest, TensorSpec, chunks, is_dense

BASE = TensorSpec("embed", "float32", (4, 6), (6, 1), 0)
NEXT = TensorSpec("norm", "bfloat16", (7,), (1,), 128)
TIED = Alias("head", 0, 24, "float32", (2, 6), (6, 1))


def changed(struct: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(struct, **changes)


def test_tensors_lie_in_order_each_at_the_next_multiple_of_the_alignment() -> None:
    manifest = manifest_of(
        [
            ("a", torch.empty(1, dtype=torch.uint8)),
            ("b", torch.empty(16, dtype=torch.float32)),
            ("c", torch.empty(3, 11, dtype=torch.bfloat16)),
            ("d", torch.empty((), dtype=torch.float64)),
        ]
    )
    assert [(spec.name, spec.offset, spec.nbytes) for spec in manifest.tensors] == [
        ("a", 0, 1),
        ("b", 64, 64),
        ("c", 128, 66),
        ("d", 256, 8),
    ]
    assert manifest.nbytes == 320


def test_a_layout_describes_type_shape_and_strides() -> None:
    manifest = manifest_of([("w", torch.empty(5, 7, dtype=torch.float16).t())])
    assert manifest.tensors == (TensorSpec("w", "float16", (7, 5), (1, 7), 0),)


def test_empty_tensors_take_no_room() -> None:
    manifest = manifest_of([("a", torch.empty(0)), ("b", torch.empty(2)), ("c", torch.empty(3, 0))])
    assert [(spec.offset, spec.end) for spec in manifest.tensors] == [(0, 0), (0, 8), (64, 64)]
    assert manifest.nbytes == 64


def test_no_tensors_at_all_are_a_manifest_of_no_bytes() -> None:
    assert Manifest([]).nbytes == 0
    assert Manifest.decode(Manifest([]).encoded).tensors == ()


def test_a_tensor_that_is_not_dense_cannot_be_laid_out() -> None:
    with pytest.raises(ProtocolError, match=r"'w' \[4, 3\] is not dense: strides \[6, 1\]"):
        manifest_of([("w", torch.empty(4, 6)[:, :3])])


def test_every_type_that_weights_are_kept_in_has_a_name() -> None:
    names = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 float8_e4m3fn float8_e5m2"
    assert set(names.split()) <= set(DTYPES)
    assert DTYPES["bfloat16"] is torch.bfloat16


plain_dtypes = st.sampled_from(
    [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.complex128]
)


@st.composite
def dense_tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    return torch.empty(shape, dtype=draw(plain_dtypes)).permute(order)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(st.text(min_size=1, max_size=8), max_size=8, unique=True))
    count = draw(st.integers(0, len(names)))
    base = manifest_of((name, draw(dense_tensors())) for name in names[:count])
    if not count:
        return base
    aliases = []
    for name in names[count:]:
        index = draw(st.integers(0, count - 1))
        of = base.tensors[index]
        aliases.append(Alias(name, index, 0, of.dtype, of.shape, of.strides))
    return Manifest(base.tensors, aliases)


@given(tensors=st.lists(dense_tensors(), max_size=6))
def test_every_layout_is_aligned_in_order_and_without_overlap(tensors: list[torch.Tensor]) -> None:
    manifest = manifest_of((f"w{n}", tensor) for n, tensor in enumerate(tensors))
    end = 0
    for spec, tensor in zip(manifest.tensors, tensors, strict=True):
        assert spec.offset % ALIGNMENT == 0
        assert end <= spec.offset < end + ALIGNMENT
        assert spec.nbytes == tensor.nbytes
        end = spec.end
    assert manifest.nbytes % ALIGNMENT == 0
    assert end <= manifest.nbytes < end + ALIGNMENT


@given(manifest=manifests())
def test_what_is_encoded_decodes_to_the_same(manifest: Manifest) -> None:
    decoded = Manifest.decode(manifest.encoded)
    assert (decoded.tensors, decoded.aliases, decoded.nbytes) == (manifest.tensors, manifest.aliases, manifest.nbytes)
    assert (decoded.encoded, decoded.digest) == (manifest.encoded, manifest.digest)
    assert decoded.mismatch(manifest) == ()


GOLDEN = bytes.fromhex(
    "929295a5656d626564a7666c6f617433329204069206010095a46e6f726da862666c6f6174313691079101cc809196a4686561640018a7666c6f61743332920206920601"
)


def test_the_encoding_and_its_digest_stay_the_same_across_releases() -> None:
    manifest = Manifest([BASE, NEXT], [TIED])
    assert manifest.encoded == GOLDEN
    assert (
        manifest.digest
        == hashlib.sha256(GOLDEN).hexdigest()
        == "8660fa4b05f259f876b9345b8c77b894e767cc9cfa0d206d7bedf3b6fac99482"
    )


def test_the_digest_depends_on_everything_described() -> None:
    variants = [
        Manifest([BASE, NEXT], [TIED]),
        Manifest([BASE, NEXT]),
        Manifest([BASE]),
        Manifest([changed(BASE, name="other"), NEXT], [TIED]),
        Manifest([changed(BASE, dtype="int32"), NEXT], [TIED]),
        Manifest([changed(BASE, shape=(6, 4), strides=(4, 1)), NEXT], [TIED]),
        Manifest([changed(BASE, strides=(1, 4)), NEXT], [TIED]),
        Manifest([BASE, NEXT], [changed(TIED, start=0)]),
        Manifest([BASE, NEXT], [changed(TIED, shape=(6, 2), strides=(1, 6))]),
    ]
    assert len({manifest.digest for manifest in variants}) == len(variants)


WRONG: dict[str, tuple[list[TensorSpec], list[Alias], str]] = {
    "empty name": ([changed(BASE, name="")], [], "tensor name '' is empty or appears twice"),
    "name twice": ([BASE, changed(NEXT, name="embed")], [], "tensor name 'embed' is empty or appears twice"),
    "unknown type": ([changed(BASE, dtype="float33")], [], "tensor 'embed' has the unknown dtype 'float33'"),
    "type of another spelling": ([changed(BASE, dtype="torch.float32")], [], "unknown dtype 'torch.float32'"),
    "negative size": ([changed(BASE, shape=(4, -6))], [], "tensor 'embed' has the impossible shape [4, -6]"),
    "two negative sizes": ([changed(BASE, shape=(-4, -6))], [], "impossible shape [-4, -6]"),
    "too many elements": (
        [changed(BASE, shape=(1 << 30, 1 << 30), strides=(1 << 30, 1))],
        [],
        "tensor 'embed' has the impossible shape [1073741824, 1073741824]",
    ),
    "fewer strides than sizes": ([changed(BASE, strides=(6,))], [], "tensor 'embed' has strides [6] for shape [4, 6]"),
    "more strides than sizes": ([changed(BASE, strides=(6, 1, 1))], [], "has strides [6, 1, 1] for shape [4, 6]"),
    "negative stride": ([changed(BASE, strides=(-6, 1))], [], "tensor 'embed' has strides [-6, 1] for shape [4, 6]"),
    "holes": ([changed(BASE, strides=(8, 1))], [], "tensor 'embed' [4, 6] is not dense: strides [8, 1]"),
    "elements in one place": ([changed(BASE, strides=(0, 1))], [], "tensor 'embed' [4, 6] is not dense"),
    "first not at the beginning": ([changed(BASE, offset=64)], [], "tensor 'embed' lies at byte 64: expected 0"),
    "off the alignment": ([BASE, changed(NEXT, offset=96)], [], "tensor 'norm' lies at byte 96: expected 128"),
    "over another tensor": ([BASE, changed(NEXT, offset=64)], [], "tensor 'norm' lies at byte 64: expected 128"),
    "behind a gap": ([BASE, changed(NEXT, offset=192)], [], "tensor 'norm' lies at byte 192: expected 128"),
    "before the beginning": ([changed(BASE, offset=-64)], [], "tensor 'embed' lies at byte -64: expected 0"),
    "alias of a taken name": (
        [BASE],
        [changed(TIED, name="embed")],
        "tensor name 'embed' is empty or appears twice",
    ),
    "two aliases of one name": ([BASE], [TIED, TIED], "tensor name 'head' is empty or appears twice"),
    "alias of unknown type": ([BASE], [changed(TIED, dtype="x")], "tensor 'head' has the unknown dtype 'x'"),
    "alias of impossible shape": ([BASE], [changed(TIED, shape=(2, -6))], "'head' has the impossible shape [2, -6]"),
    "alias of too few strides": ([BASE], [changed(TIED, strides=(1,))], "'head' has strides [1] for shape [2, 6]"),
    "alias of no tensor": ([BASE], [changed(TIED, base=1)], "alias 'head' refers to tensor number 1, which does not"),
    "alias of a tensor before the first": ([BASE], [changed(TIED, base=-1)], "refers to tensor number -1"),
    "alias without any tensor": ([], [changed(TIED, base=0)], "refers to tensor number 0"),
    "alias that begins before its tensor": (
        [BASE],
        [changed(TIED, start=-4)],
        "alias 'head' reaches beyond tensor 'embed'",
    ),
    "alias that ends behind its tensor": (
        [BASE, NEXT],
        [changed(TIED, start=52)],
        "alias 'head' reaches beyond tensor 'embed'",
    ),
    "alias whose strides lead out": (
        [BASE],
        [changed(TIED, start=0, strides=(19, 1))],
        "alias 'head' reaches beyond tensor 'embed'",
    ),
    "alias of a wider type": (
        [BASE],
        [changed(TIED, start=56, dtype="float64", shape=(6,), strides=(1,))],
        "alias 'head' reaches beyond tensor 'embed'",
    ),
}


@pytest.mark.parametrize(("tensors", "aliases", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_description_that_is_not_consistent_is_refused(
    tensors: list[TensorSpec], aliases: list[Alias], reason: str
) -> None:
    with pytest.raises(ProtocolError) as here:
        Manifest(tensors, aliases)
    assert reason in str(here.value)
    with pytest.raises(ProtocolError) as from_a_peer:
        Manifest.decode(msgspec.msgpack.encode([tensors, aliases]))
    assert str(from_a_peer.value) == str(here.value)


RIGHT: dict[str, Alias] = {
    "the whole tensor": changed(TIED, start=0, shape=(4, 6)),
    "the end of the tensor": changed(TIED, start=48),
    "with holes": changed(TIED, start=4, shape=(4, 3), strides=(6, 2)),
    "transposed": changed(TIED, start=0, shape=(6, 4), strides=(1, 6)),
    "as another type": changed(TIED, start=1, dtype="uint8", shape=(95,), strides=(1,)),
    "one element": changed(TIED, start=92, shape=(), strides=()),
    "empty": changed(TIED, start=96, shape=(0, 6)),
    "the same elements twice": changed(TIED, start=0, shape=(9, 6), strides=(0, 1)),
}


@pytest.mark.parametrize("alias", RIGHT.values(), ids=RIGHT.keys())
def test_an_alias_may_be_any_view_within_its_tensor(alias: Alias) -> None:
    manifest = Manifest([BASE, NEXT], [alias])
    assert manifest.nbytes == Manifest([BASE, NEXT]).nbytes
    assert Manifest.decode(manifest.encoded).aliases == (alias,)


def test_an_alias_between_two_elements_is_refused() -> None:
    with pytest.raises(ProtocolError, match="head"):
        Manifest([BASE], [changed(TIED, start=2)])


DENSE: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "no dimensions": ((), (), True),
    "contiguous": ((2, 3, 4), (12, 4, 1), True),
    "transposed": ((3, 2), (1, 3), True),
    "channels last": ((2, 3, 4, 5), (60, 1, 15, 3), True),
    "any stride where the size is one": ((1, 3, 1), (77, 1, 0), True),
    "holes at the end of rows": ((2, 3), (4, 1), False),
    "every second": ((3,), (2,), False),
    "expanded": ((3, 2), (0, 1), False),
    "overlapping windows": ((3, 2), (1, 1), False),
    "empty": ((2, 0), (1, 1), True),
}


@pytest.mark.parametrize(("shape", "strides", "dense"), DENSE.values(), ids=DENSE.keys())
def test_dense_means_each_place_of_a_block_once(shape: tuple[int, ...], strides: tuple[int, ...], dense: bool) -> None:
    assert is_dense(shape, strides) is dense


@given(sizes=st.lists(st.integers(1, 4), max_size=3), data=st.data())
def test_dense_is_what_counting_the_places_says(sizes: list[int], data: st.DataObject) -> None:
    shape = tuple(sizes)
    strides = tuple(data.draw(st.integers(0, 12)) for _ in shape)
    places = torch.arange(200).as_strided(shape, strides).flatten().tolist()
    assert is_dense(shape, strides) is (sorted(places) == list(range(math.prod(shape))))


def test_a_tensor_without_elements_is_dense_whatever_its_strides() -> None:
    view = torch.empty(0, 6)[:, ::2]
    assert is_dense(tuple(view.shape), view.stride())


def test_an_order_of_tensors_that_moves_no_byte_is_named() -> None:
    """Empty tensors take no place, so only their order tells."""
    tensors = {name: torch.empty(0) for name in ("a", "b", "c")}
    ours, theirs = manifest_of(tensors.items()), manifest_of(reversed(tensors.items()))
    assert [str(each) for each in ours.mismatch(theirs)] == [
        "order of tensors (here a, there c)",
        "order of tensors (here c, there a)",
    ]


def test_the_stride_of_a_dimension_of_one_element_is_named() -> None:
    plain, odd = torch.empty(1, 4), torch.empty(4).as_strided((1, 4), (9, 1))
    (difference,) = manifest_of([("w", plain)]).mismatch(manifest_of([("w", odd)]))
    assert str(difference) == "tensor w (here float32 [1, 4] at byte 0, there float32 [1, 4] strides [9, 1] at byte 0)"


def test_manifests_of_the_same_tensors_do_not_differ() -> None:
    assert Manifest([BASE, NEXT], [TIED]).mismatch(Manifest([BASE, NEXT], [TIED])) == ()


DIFFERING: dict[str, tuple[Manifest, Manifest, list[Difference]]] = {
    "shape": (
        Manifest([BASE]),
        Manifest([changed(BASE, shape=(6, 4), strides=(4, 1))]),
        [Difference("tensor embed", "float32 [4, 6] at byte 0", "float32 [6, 4] at byte 0")],
    ),
    "type": (
        Manifest([BASE]),
        Manifest([changed(BASE, dtype="int32")]),
        [Difference("tensor embed", "float32 [4, 6] at byte 0", "int32 [4, 6] at byte 0")],
    ),
    "memory order": (
        Manifest([BASE]),
        Manifest([changed(BASE, strides=(1, 4))]),
        [Difference("tensor embed", "float32 [4, 6] at byte 0", "float32 [4, 6] strides [1, 4] at byte 0")],
    ),
    "size, which moves the next": (
        Manifest([BASE, NEXT]),
        Manifest([changed(BASE, shape=(2, 6)), changed(NEXT, offset=64)]),
        [
            Difference("tensor embed", "float32 [4, 6] at byte 0", "float32 [2, 6] at byte 0"),
            Difference("tensor norm", "bfloat16 [7] at byte 128", "bfloat16 [7] at byte 64"),
        ],
    ),
    "one more": (
        Manifest([BASE, NEXT]),
        Manifest([BASE]),
        [Difference("tensor norm", "bfloat16 [7] at byte 128", "")],
    ),
    "other names": (
        Manifest([BASE]),
        Manifest([changed(BASE, name="wte")]),
        [
            Difference("tensor embed", "float32 [4, 6] at byte 0", ""),
            Difference("tensor wte", "", "float32 [4, 6] at byte 0"),
        ],
    ),
    "shared memory": (
        Manifest([BASE, NEXT], [TIED]),
        Manifest([BASE, NEXT]),
        [Difference("tensor head", "float32 [2, 6] at byte 24, shared with embed", "")],
    ),
    "shared with another": (
        Manifest([BASE, NEXT], [changed(TIED, dtype="int8", start=0, shape=(3,), strides=(1,))]),
        Manifest([BASE, NEXT], [changed(TIED, dtype="int8", start=0, shape=(3,), strides=(1,), base=1)]),
        [Difference("tensor head", "int8 [3] at byte 0, shared with embed", "int8 [3] at byte 128, shared with norm")],
    ),
}


@pytest.mark.parametrize(("here", "there", "differences"), DIFFERING.values(), ids=DIFFERING.keys())
def test_differences_name_the_tensors_and_read_the_other_way_from_the_other_side(
    here: Manifest, there: Manifest, differences: list[Difference]
) -> None:
    assert list(here.mismatch(there)) == differences
    assert {*there.mismatch(here)} == {difference.flipped() for difference in differences}


@given(data=st.binary(max_size=100))
@example(data=b"")
@example(data=GOLDEN[:-1])
@example(data=GOLDEN + b"\0")
@example(data=b"\x92\xdd\xff\xff\xff\xff")
def test_any_bytes_are_a_manifest_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        Manifest.decode(data)


wire_scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=3)
wire_values = st.recursive(wire_scalars | st.binary(max_size=3), lambda inner: st.lists(inner, max_size=4))
wire_sizes = st.lists(st.integers(-1, 3) | st.integers(-(1 << 63), (1 << 64) - 1), max_size=3)
wire_tensors = st.tuples(
    st.text(max_size=2), st.sampled_from(["int8", "?"]), wire_sizes, wire_sizes, st.integers(0, 64)
)
wire_aliases = st.tuples(
    st.text(max_size=2), st.integers(-1, 2), st.integers(-1, 64), st.sampled_from(["int8", "?"]), wire_sizes, wire_sizes
)


@given(
    value=wire_values
    | st.tuples(st.lists(wire_tensors | wire_values, max_size=3), st.lists(wire_aliases | wire_values, max_size=2))
)
def test_any_values_are_a_manifest_or_a_protocol_error(value: object) -> None:
    with contextlib.suppress(PeerError):
        manifest = Manifest.decode(msgspec.msgpack.encode(value))
        assert Manifest.decode(manifest.encoded).mismatch(manifest) == ()


def test_a_name_that_is_not_text_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="the manifest cannot be read"):
        Manifest.decode(GOLDEN.replace(b"embed", b"emb\xff\xfe"))


def test_an_unreadable_manifest_is_refused_with_the_reason() -> None:
    with pytest.raises(ProtocolError, match=r"the manifest cannot be read: .*Expected `array`, got `int`"):
        Manifest.decode(b"\x01")


@given(nbytes=st.integers(0, 1000), chunk_bytes=st.integers(1, 300))
def test_chunks_cover_every_byte_once_in_order(nbytes: int, chunk_bytes: int) -> None:
    end = 0
    for offset, length in chunks(nbytes, chunk_bytes):
        assert offset == end
        assert length == min(chunk_bytes, nbytes - offset) > 0
        end += length
    assert end == nbytes
