from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable
from typing import Any

import msgspec
import numpy
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from vllm_ascend.model_loader.netloader.errors import SourceRefused, UnsupportedModel
from vllm_ascend.model_loader.netloader.model.attributes import Snapshot, apply, require_settable
from vllm_ascend.model_loader.netloader.model.tensors import qualified
from vllm_ascend.model_loader.netloader.model.views import DTYPES
from vllm_ascend.model_loader.netloader.wire.messages import Accept, AttributeValue

Load = Callable[[Any], object]


class Speed(enum.StrEnum):
    FAST = "fast"


class Order(enum.IntEnum):
    FIRST = 1
    SECOND = 2


class Draft(nn.Module):
    """Keeps beside its weights what models keep beside theirs; its class says what is so until loading knows better."""

    has_own_embed_tokens: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4, 2)
        self.layers: Any = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Identity()])
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("positions", torch.arange(2.0), persistent=False)
        self.register_parameter("bias", None)
        self.register_buffer("offset", None)
        self.register_module("head", None)
        self.table = torch.arange(3.0)
        self.has_own_lm_head = False
        self.limit = 8
        self.ratio = 0.5
        self.note = "draft"
        self.window: int | None = None
        self.shapes = [1, 2]
        self.order = Order.FIRST
        self.scaling = numpy.float64(1.0)
        self.options = {"rope": 1}
        self.kind = torch.float32
        self.activation = torch.relu
        vars(self.layers[1])["rank"] = 3

    @property
    def is_draft(self) -> bool:
        return True

    @property
    def cache(self) -> bool:
        raise RuntimeError("there is no cache before the first step")

    @property
    def fused(self) -> bool:
        return bool(self.layers[0].fused_by_post_processing)

    def compute_logits(self) -> None: ...


def snapshot(model: Any) -> dict[str, Any]:
    """The plain attributes and the tensors held as attributes."""
    held = Snapshot.of(model).attributes
    return {
        name: each for name, each in held.items() if isinstance(each, torch.Tensor | bool | int | float | str | None)
    }


def loaded(load: Load) -> dict[str, AttributeValue]:
    """What is to be told of a model that was loaded by `load`."""
    model = Draft()
    before = Snapshot.of(model)
    load(model)
    return before.changes(model)


def setting(name: str, value: object) -> Load:
    """Sets one attribute, by its qualified name, as a `load_weights` would."""
    module, _, attribute = name.rpartition(".")
    return lambda model: setattr(model.get_submodule(module), attribute, value)


def exact(attributes: dict[str, Any]) -> dict[str, str]:
    """Comparable, and 1, True and 1.0 are three."""
    return {name: repr(value) for name, value in attributes.items()}


def as_received(attributes: dict[str, AttributeValue]) -> dict[str, AttributeValue]:
    """What a client gets that is sent `attributes`."""
    accept = Accept(bytes(16), 1, "tcp", {}, attributes)
    return dict(msgspec.msgpack.decode(msgspec.msgpack.encode(accept), type=Accept).attributes)


def test_names_are_qualified_as_torch_qualifies_them() -> None:
    assert qualified("", "limit") == "limit"
    assert qualified("layers.0", "weight") == "layers.0.weight"
    names = {qualified(*where) for where in (("embed_tokens", "weight"), ("layers.0", "weight"), ("", "scale"))}
    assert names == Draft().state_dict().keys()


def test_a_snapshot_holds_flags_numbers_texts_and_tensors_of_every_module() -> None:
    model = Draft()
    found = snapshot(model)
    assert found["has_own_lm_head"] is False
    assert (found["limit"], found["ratio"], found["note"], found["window"]) == (8, 0.5, "draft", None)
    assert (found["layers.1.rank"], found["layers.0.in_features"], found["layers.0.training"]) == (3, 2, True)
    assert found["table"] is model.table


def test_a_snapshot_holds_no_weights_modules_or_class_attributes() -> None:
    found = snapshot(Draft())
    assert found.keys().isdisjoint({"scale", "positions", "bias", "offset", "head", "embed_tokens", "layers.0.weight"})
    assert found.keys().isdisjoint({"has_own_embed_tokens", "is_draft", "cache", "compute_logits"})


def test_a_load_that_fills_tensors_only_leaves_nothing_to_tell() -> None:
    def load(model: Any) -> None:
        for tensor in (*model.parameters(), model.scale):
            tensor.data.fill_(3.0)

    assert loaded(load) == {}


@pytest.mark.parametrize("value", [True, 12, -0.25, "brought its own", None, 0, "", math.inf], ids=repr)
@pytest.mark.parametrize("name", ["has_own_lm_head", "layers.0.in_features", "layers.1.rank"])
def test_what_loading_changed_is_told_by_its_qualified_name(name: str, value: AttributeValue) -> None:
    assert exact(loaded(setting(name, value))) == exact({name: value})


@pytest.mark.parametrize("value", [False, 12, -0.25, "brought its own", None], ids=repr)
@pytest.mark.parametrize("name", ["seen", "layers.seen", "layers.1.seen", "embed_tokens.seen"])
def test_what_loading_added_is_told_by_its_qualified_name(name: str, value: AttributeValue) -> None:
    assert exact(loaded(setting(name, value))) == exact({name: value})


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_of_the_class_that_loading_sets_on_the_model_is_told(value: bool) -> None:
    assert loaded(setting("has_own_embed_tokens", value)) == {"has_own_embed_tokens": value}


def test_all_changes_are_told_and_nothing_else() -> None:
    def load(model: Any) -> None:
        model.has_own_embed_tokens = True
        model.limit = 9
        model.note = "draft"
        model.layers[1].rank = None

    assert exact(loaded(load)) == exact({"has_own_embed_tokens": True, "limit": 9, "layers.1.rank": None})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, True),
        (True, 1),
        (1, 1.0),
        (1.0, 1),
        (True, 1.0),
        (0, False),
        (0, None),
        (0.0, -0.0),
        ("1", 1),
        ("None", None),
    ],
)
def test_values_of_different_types_are_different(before: AttributeValue, after: AttributeValue) -> None:
    model: Any = Draft()
    model.limit = before
    earlier = Snapshot.of(model)
    model.limit = after
    assert exact(earlier.changes(model)) == exact({"limit": after})


@pytest.mark.parametrize(
    ("value", "again"),
    [(math.nan, float("nan")), (math.nan, -math.nan), (-0.0, -0.0), (1e300, 1e300), (1 << 62, 1 << 62), (None, None)],
)
def test_a_value_that_is_set_again_is_no_change(value: AttributeValue, again: AttributeValue) -> None:
    model: Any = Draft()
    model.ratio = value
    before = Snapshot.of(model)
    model.ratio = again
    assert before.changes(model) == {}


def test_a_value_that_was_set_and_taken_back_is_no_change() -> None:
    def load(model: Any) -> None:
        model.limit = 9
        model.limit = 8

    assert loaded(load) == {}


@pytest.mark.parametrize("number", [(1 << 63) - 1, -(1 << 63), 0, -1])
def test_an_integer_of_64_bits_is_told(number: int) -> None:
    assert loaded(setting("limit", number)) == {"limit": number}


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 1 << 200])
@pytest.mark.parametrize("name", ["limit", "layers.1.rank", "layers.1.seen"])
def test_an_integer_beyond_64_bits_makes_a_model_that_is_not_served(name: str, number: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"loading set {name}, which cannot be told to another process"):
        loaded(setting(name, number))


def test_an_integer_beyond_64_bits_that_was_there_before_loading_is_no_obstacle() -> None:
    model: Any = Draft()
    model.mask = 1 << 200
    assert Snapshot.of(model).changes(model) == {}


UNTELLABLE: dict[str, tuple[str, Load]] = {
    "a tensor replaced": ("table", setting("table", torch.arange(3.0))),
    "a tensor added": ("lookup", setting("lookup", torch.ones(1))),
    "a tensor added to a layer": ("layers.1.lookup", setting("layers.1.lookup", torch.ones(1))),
    "a tensor instead of a number": ("limit", setting("limit", torch.tensor(8))),
    "a tensor instead of nothing": ("window", setting("window", torch.tensor(8))),
    "a tensor removed": ("table", lambda model: delattr(model, "table")),
    "a flag removed": ("has_own_lm_head", lambda model: delattr(model, "has_own_lm_head")),
    "a number of a layer removed": ("layers.1.rank", lambda model: delattr(model.layers[1], "rank")),
    "a list instead of a number": ("limit", setting("limit", [8])),
}


@pytest.mark.parametrize(("name", "load"), UNTELLABLE.values(), ids=UNTELLABLE.keys())
def test_what_cannot_be_told_makes_a_model_that_is_not_served_and_is_named(name: str, load: Load) -> None:
    with pytest.raises(UnsupportedModel) as error:
        loaded(load)
    said = str(error.value).removeprefix("loading set ").removesuffix(", which cannot be told to another process")
    assert name in said.split(", ")


MODULES: dict[str, tuple[str, Load]] = {
    "removed": ("removed the module layers", lambda model: delattr(model, "layers")),
    "a child removed": ("removed the module layers.1", lambda model: model.layers.pop(1)),
    "added": ("added the module cache", setting("cache", nn.ModuleList([nn.Linear(2, 2)]))),
    "replaced": ("replaced the module layers.0", lambda model: operator.setitem(model.layers, 0, nn.Identity())),
}


@pytest.mark.parametrize(("event", "load"), MODULES.values(), ids=MODULES.keys())
def test_a_module_that_loading_adds_removes_or_replaces_is_named_and_not_all_that_it_holds(
    event: str, load: Load
) -> None:
    with pytest.raises(UnsupportedModel) as error:
        loaded(load)
    assert str(error.value) == f"loading {event}, which cannot be told to another process"


def test_of_what_cannot_be_told_the_first_eight_are_named_and_what_can_be_told_is_not() -> None:
    def load(model: Any) -> None:
        model.limit = 9
        for number in reversed(range(12)):
            setattr(model, f"lookup_{number:02}", torch.ones(1))

    with pytest.raises(UnsupportedModel) as error:
        loaded(load)
    named = ", ".join(f"lookup_{number:02}" for number in range(8))
    assert str(error.value) == f"loading set {named}, which cannot be told to another process"


def test_containers_modules_types_and_functions_are_not_told() -> None:
    def load(model: Any) -> None:
        model.shapes = [3]
        model.options["rope"] = 2
        model.history = {"loaded": True}
        model.extents = (1, 2)
        model.kind = torch.bfloat16
        model.activation = torch.tanh

    assert loaded(load) == {}


def test_parameters_and_buffers_are_not_told() -> None:
    def load(model: Any) -> None:
        model.scale = torch.zeros(2)
        model.bias = nn.Parameter(torch.zeros(1))
        model.embed_tokens.weight = nn.Parameter(torch.zeros(4, 2))

    assert loaded(load) == {}


def test_a_module_under_two_names_is_told_once() -> None:
    def shared() -> Any:
        model = Draft()
        model.last_layer = model.layers[1]
        return model

    source, client = shared(), shared()
    before = Snapshot.of(source)
    source.last_layer.rank = 7
    told = before.changes(source)
    assert told == {"layers.1.rank": 7}
    require_settable(client, told)
    apply(client, told)
    assert client.last_layer.rank == 7


SETTABLE = {
    "has_own_embed_tokens": True,
    "has_own_lm_head": True,
    "window": 4,
    "note": None,
    "never_seen": 1.5,
    "_private": "text",
    "training": False,
    "layers.1.rank": None,
    "layers.0.training": False,
}


def test_flags_numbers_and_texts_of_modules_are_settable_and_so_is_what_the_model_lacks() -> None:
    require_settable(Draft(), SETTABLE)
    require_settable(Draft(), {})


def test_asking_sets_nothing() -> None:
    model = Draft()
    before = exact(snapshot(model))
    require_settable(model, SETTABLE)
    assert exact(snapshot(model)) == before


def not_of_this_model(name: str) -> str:
    return f"the source sets {name!r}, and this model has no such module"


def not_plain(name: str, kind: str) -> str:
    return f"the source sets {name!r}, which is a {kind} in this model"


UNSETTABLE: dict[str, str] = {
    name: not_of_this_model(name)
    for name in (
        "missing.flag",
        "layers.2.rank",
        "layers.-1.rank",
        "layers.1.rank.real",
        "note.flag",
        "table.requires_grad",
        "Layers.0.flag",
        " layers.0.flag",
        "layers..flag",
        "__class__",
        "__dict__",
        "layers.0.__class__",
        "layers.0.__init__",
        "__flag",
        "",
        ".",
        "layers.",
        "two words",
        "flag ",
        "fl\x1b[2Jag",
        "flag\n",
        "1st",
        "layers.0",
        "layers.1",
        "flag[0]",
        "flag=1",
    )
} | {
    name: not_plain(name, kind)
    for name, kind in {
        "compute_logits": "function",
        "forward": "function",
        "layers.0.forward": "function",
        "state_dict": "function",
        "table": "Tensor",
        "scale": "Tensor",
        "layers.0.weight": "Parameter",
        "embed_tokens": "Embedding",
        "layers": "ModuleList",
        "shapes": "list",
        "options": "dict",
        "kind": "dtype",
        "activation": "builtin_function_or_method",
        "_parameters": "dict",
        "_modules": "dict",
        "_forward_hooks": "OrderedDict",
    }.items()
}


@pytest.mark.parametrize(("name", "reason"), UNSETTABLE.items(), ids=map(repr, UNSETTABLE))
@pytest.mark.parametrize("value", [None, True, "text"], ids=repr)
def test_what_is_no_plain_attribute_of_a_module_is_refused_and_named(
    name: str, reason: str, value: AttributeValue
) -> None:
    with pytest.raises(SourceRefused) as error:
        require_settable(Draft(), {"limit": 9, name: value, "note": "draft"})
    assert str(error.value) == reason
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["is_draft", "cache", "fused"])
def test_a_property_is_refused(name: str) -> None:
    with pytest.raises(SourceRefused, match=f"the source sets '{name}'"):
        require_settable(Draft(), {name: True})


@pytest.mark.parametrize("name", ["bias", "offset", "head", "layers.0.bias"])
def test_a_parameter_buffer_or_module_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(SourceRefused, match=f"the source sets '{name}'"):
        require_settable(Draft(), {name: 3})


def test_applying_sets_each_value_on_its_module() -> None:
    model: Any = Draft()
    apply(model, SETTABLE)
    assert (model.has_own_lm_head, model.window, model.note) == (True, 4, None)
    assert (model.never_seen, model._private) == (1.5, "text")
    assert (model.training, model.layers[0].training) == (False, False)
    assert model.layers[1].rank is None
    assert (model.limit, model.layers[1].training) == (8, True)


def test_applying_sets_a_flag_of_the_class_on_this_model_only() -> None:
    model = Draft()
    apply(model, {"has_own_embed_tokens": True})
    assert model.has_own_embed_tokens is True
    assert Draft.has_own_embed_tokens is False
    assert Draft().has_own_embed_tokens is False


def test_applying_nothing_changes_nothing() -> None:
    model = Draft()
    before = exact(snapshot(model))
    apply(model, {})
    assert exact(snapshot(model)) == before


plain_values = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.sampled_from([0, 1, -1])
    | st.floats()
    | st.sampled_from([0.0, -0.0, 1.0])
    | st.text(max_size=8)
)
names = st.sampled_from(["has_own_embed_tokens", "has_own_lm_head", "limit", "layers.1.rank", "layers.seen", "new"])
settings_by_name = st.dictionaries(names, plain_values, max_size=5)


@given(initial=settings_by_name, loaded=settings_by_name)
@example(initial={"limit": 1}, loaded={"limit": True})
@example(initial={"limit": 0.0}, loaded={"limit": -0.0})
@example(initial={"limit": math.nan}, loaded={"limit": math.nan, "new": math.nan})
@example(initial={"new": (1 << 63) - 1}, loaded={"new": -(1 << 63)})
@example(initial={}, loaded={"has_own_embed_tokens": False})
def test_a_client_that_applies_what_it_received_is_like_the_source(
    initial: dict[str, AttributeValue], loaded: dict[str, AttributeValue]
) -> None:
    source, client = Draft(), Draft()
    client.table = source.table
    apply(source, initial)
    apply(client, initial)
    before = Snapshot.of(source)
    for name, value in loaded.items():
        setting(name, value)(source)
    told = before.changes(source)
    held = before.attributes
    assert told.keys() == {name for name, value in loaded.items() if name not in held or differ(held[name], value)}
    received = as_received(told)
    require_settable(client, received)
    apply(client, received)
    assert exact(snapshot(client)) == exact(snapshot(source))
    assert Snapshot.of(client).changes(client) == {}


def differ(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return False
    if type(one) is not type(other) or one != other:
        return True
    return isinstance(one, float) and isinstance(other, float) and math.copysign(1, one) != math.copysign(1, other)


# What a source serves, its clients must be able to take. Where they are not, the source has to say so while it loads:
# it then declines with the reason, instead of failing every client that comes.


def assert_told_or_unsupported(load: Load) -> None:
    source, client = Draft(), Draft()
    client.table = source.table
    before = Snapshot.of(source)
    load(source)
    try:
        told = before.changes(source)
    except UnsupportedModel:
        return
    received = as_received(told)
    require_settable(client, received)
    apply(client, received)
    assert exact(snapshot(client)) == exact(snapshot(source))


def test_what_is_told_can_be_taken() -> None:
    assert_told_or_unsupported(setting("has_own_embed_tokens", True))
    assert_told_or_unsupported(setting("note", "x" * 4096))
    assert_told_or_unsupported(setting("limit", 1 << 63))


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(setting("note", "x" * 4097), id="long text"),
        pytest.param(setting("note", "\ud800"), id="no UTF-8"),
        pytest.param(setting("ratio", numpy.float64(1.5)), id="numpy.float64"),
        pytest.param(setting("note", numpy.str_("x")), id="numpy.str_"),
        pytest.param(setting("note", Speed.FAST), id="StrEnum"),
        pytest.param(setting("limit", Order.FIRST), id="IntEnum"),
        pytest.param(setting("two words", 1), id="no identifier"),
        pytest.param(setting("shapes", None), id="list dropped"),
        pytest.param(setting("table", None), id="tensor dropped"),
        pytest.param(lambda model: model.add_module("adapter", nn.Identity()), id="module added"),
    ],
)
def test_what_no_client_can_take_makes_a_model_that_is_not_served(load: Load) -> None:
    assert_told_or_unsupported(load)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(setting("__flag", True), id="reserved name"),
        pytest.param(setting("compute_logits", None), id="method dropped"),
    ],
)
def test_what_the_class_keeps_from_being_set_makes_a_model_that_is_not_served(load: Load) -> None:
    assert_told_or_unsupported(load)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(setting("order", Order.SECOND), id="IntEnum replaced"),
        pytest.param(setting("scaling", numpy.float64(2.0)), id="numpy.float64 replaced"),
        pytest.param(setting("seen", Order.SECOND), id="IntEnum added"),
        pytest.param(setting("speed", Speed.FAST), id="StrEnum added"),
        pytest.param(setting("seen", numpy.float64(2.0)), id="numpy.float64 added"),
        pytest.param(lambda model: delattr(model, "order"), id="IntEnum removed"),
    ],
)
def test_numbers_and_texts_of_other_types_do_not_change_unseen(load: Load) -> None:
    assert_told_or_unsupported(load)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(setting("positions", torch.ones(2)), id="buffer replaced"),
        pytest.param(lambda model: model.positions.fill_(1.0), id="buffer filled"),
        pytest.param(lambda model: model.table.fill_(1.0), id="plain tensor filled"),
    ],
)
def test_tensors_that_are_no_weights_do_not_change_unseen(load: Load) -> None:
    with pytest.raises(UnsupportedModel):
        loaded(load)


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda model: model.register_buffer("seen", torch.ones(1), persistent=False), id="added"),
        pytest.param(lambda model: delattr(model, "positions"), id="removed"),
        pytest.param(lambda model: model.positions.data.copy_(torch.ones(2)), id="filled behind autograd's back"),
        pytest.param(lambda model: setattr(model.positions, "data", torch.arange(3.0)), id="lengthened"),
        pytest.param(
            lambda model: model.layers[1].register_buffer("seen", torch.ones(1), persistent=False), id="layer"
        ),
    ],
)
def test_a_buffer_that_is_not_saved_does_not_change_unseen(load: Load) -> None:
    with pytest.raises(UnsupportedModel, match=r"loading set (positions|seen|layers\.1\.seen), which cannot be told"):
        loaded(load)


@pytest.mark.parametrize("plain", [True, False], ids=["plain attribute", "buffer"])
def test_a_view_of_a_weight_changes_with_it_and_needs_no_telling(plain: bool) -> None:
    model: Any = Draft()
    view = model.embed_tokens.weight.data.view(2, 4)
    if plain:
        model.rows = view
    else:
        model.register_buffer("rows", view, persistent=False)
    before = Snapshot.of(model)
    model.embed_tokens.weight.data.fill_(7.0)
    assert model.rows.eq(7.0).all()
    assert before.changes(model) == {}


def test_a_view_of_a_buffer_that_is_saved_changes_with_it_and_needs_no_telling() -> None:
    model: Any = Draft()
    model.first_scale = model.scale[:1]
    before = Snapshot.of(model)
    model.scale.fill_(7.0)
    assert before.changes(model) == {}


PECULIAR: dict[str, Callable[[], torch.Tensor]] = {
    "without elements": lambda: torch.empty(0, 3),
    "without dimensions": lambda: torch.tensor(3.0),
    "with gradients": lambda: torch.ones(2, requires_grad=True),
    "with holes": lambda: torch.ones(6)[::2],
    "expanded": lambda: torch.ones(1).expand(5),
    "of flags": lambda: torch.ones(3, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "of bytes' parts": lambda: torch.empty(4, dtype=DTYPES["uint4"]),
    "of eight bits": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "on meta": lambda: torch.empty(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "NaN": lambda: torch.full((3,), torch.nan),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
}
PECULIAR_VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "conjugate": lambda: torch.full((3,), 1 + 2j).conj(),
    "negative": lambda: torch._neg_view(torch.ones(3)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


def assert_no_obstacle(tensor: torch.Tensor) -> None:
    model = Draft()
    model.peculiar = tensor
    model.register_buffer("peculiar_too", tensor, persistent=False)
    assert Snapshot.of(model).changes(model) == {}


@pytest.mark.parametrize("make", PECULIAR.values(), ids=PECULIAR.keys())
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_peculiar_tensor_that_does_not_change_is_no_obstacle(make: Callable[[], torch.Tensor]) -> None:
    assert_no_obstacle(make())


@pytest.mark.parametrize("make", PECULIAR_VIEWS.values(), ids=PECULIAR_VIEWS.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_tensor_whose_bytes_cannot_be_seen_is_no_obstacle(make: Callable[[], torch.Tensor]) -> None:
    assert_no_obstacle(make())


class WithState(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_a_module_that_saves_more_than_tensors_is_no_obstacle() -> None:
    model = Draft()
    model.state = WithState()
    assert Snapshot.of(model).changes(model) == {}


def test_a_buffer_that_was_taken_out_before_loading_is_no_obstacle() -> None:
    model = Draft()
    model._buffers.pop("positions")
    assert Snapshot.of(model).changes(model) == {}


def test_an_integer_without_end_is_no_obstacle() -> None:
    model: Any = Draft()
    model.mask = 1 << 20_000
    assert Snapshot.of(model).changes(model) == {}
