"""What a load leaves unwritten is noticed and named, whichever way vLLM's layers are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from vllm_ascend.quantization.completeness import CompleteCheckpoints, IncompleteCheckpoint, watch
from vllm_ascend.quantization.writes import Writes

Weights = dict[str, torch.Tensor]


def slices(size: int) -> st.SearchStrategy[slice]:
    return st.builds(slice, st.integers(0, size), st.integers(0, size), st.integers(1, 3))


@given(st.data())
def test_what_no_view_has_covered_is_left_out(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    holder = torch.zeros([each + 2 for each in shape], dtype=data.draw(st.sampled_from([torch.int8, torch.float32])))
    tensor = holder[tuple(slice(1, 1 + each) for each in shape)]
    tensor = tensor if data.draw(st.booleans()) else tensor.transpose(0, -1)
    views = data.draw(st.lists(st.tuples(*(slices(each) for each in tensor.shape)), max_size=4))
    with Writes([tensor]) as writes:
        for view in views:
            data.draw(st.sampled_from([write_by_copy, write_by_filling, write_as_a_list]))(tensor[view])

    left_out = {byte for gap in writes.left_out(tensor) for byte in gap}
    offsets = (
        torch.arange(holder.numel())
        .view(holder.shape)
        .as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    )
    width = tensor.element_size()
    assert left_out == {
        byte for offset in offsets[tensor == 0].tolist() for byte in range(offset * width, (offset + 1) * width)
    }


def write_by_copy(view: torch.Tensor) -> None:
    view.copy_(torch.ones(view.shape))


def write_by_filling(view: torch.Tensor) -> None:
    view.fill_(1)


def write_as_a_list(view: torch.Tensor) -> None:
    torch._foreach_add_([torch.zeros(3), view], 1)
    view.clamp_(max=1)


class Config(CompleteCheckpoints):
    packed_modules_mapping = {  # noqa: RUF012  an attribute of instances
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def may_lack(self, parameter: str) -> bool:
        return parameter == "norm.bias"


class Ranks:
    rank, size = 0, 1


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    ranks = Ranks()
    for module in (linear, parameter, vocab_parallel_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: ranks.rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks.size)
    with set_current_vllm_config(VllmConfig()):
        yield ranks


class Model(nn.Module):
    """A model whose `load_weights` does what those of vLLM's models do."""

    parts: ClassVar = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed: Any = VocabParallelEmbedding(100, 8)
        self.qkv_proj: Any = QKVParallelLinear(8, 4, 4, 2, bias=True)
        self.gate_up_proj: Any = MergedColumnParallelLinear(8, [6, 6], bias=False)
        self.down_proj: Any = RowParallelLinear(6, 8, bias=False, reduce_results=False)
        self.experts: Any = experts(4, here=[2, 3])
        self.norm = nn.LayerNorm(8)
        self.attention: Any = nn.Module()
        self.attention.quant_method = BaseKVCacheMethod(cast("Any", None))
        self.attention.k_scale = nn.Parameter(torch.tensor(-1.0), requires_grad=False)
        self.lm_head: Any = ParallelLMHead(100, 8)
        if tied:
            self.lm_head.tie_weights(self.embed)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            layer, _, part = name.rpartition(".")
            if layer.startswith("experts."):
                self.experts.load(name, tensor)
                continue
            layer, *shard = self.parts.get(layer, (layer,))
            parameter = parameters[f"{layer}.{part}"]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)


def experts(count: int, here: list[int]) -> Any:
    """As much of vLLM's layer as loads weights, with those experts that are `here`."""
    layer: Any = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    numbers = SimpleNamespace(
        map_global_to_local=lambda expert: here.index(expert) if expert in here else -1,
        get_local_expert_ids=lambda: here,
    )
    names = {f"ckpt_{name}_proj_name": f"{name}_proj" for name in ("gate", "up", "down")}
    parallel = SimpleNamespace(tp_size=1, tp_rank=0)
    vars(layer).update(
        names,
        layer_name="experts",
        quant_config=None,
        quant_method=None,
        expert_map_manager=numbers,
        _fused_shared_expert_quantizer=None,
        _loaded_expert_biases=set(),
        moe_config=SimpleNamespace(
            tp_rank=0, tp_size=1, is_act_and_mul=True, tp_shard_with_padding=False, moe_parallel_config=parallel
        ),
    )
    shapes = {"w13_weight": (12, 8), "w2_weight": (8, 6), "w13_weight_scale": (12, 1), "w2_weight_scale": (8, 1)}
    for name, shape in shapes.items():
        parameter = nn.Parameter(torch.zeros(len(here), *shape), requires_grad=False)
        layer.register_parameter(name, parameter)
        method = FusedMoeWeightScaleSupported.CHANNEL.value
        set_weight_attrs(parameter, {"weight_loader": layer.weight_loader, "quant_method": method})

    def load(name: str, tensor: torch.Tensor) -> None:
        _, expert, projection, part = name.split(".")
        shard = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[projection]
        full = f"{'w2' if shard == 'w2' else 'w13'}_{part}"
        layer.weight_loader(getattr(layer, full), tensor, f"experts.{full}", shard_id=shard, expert_id=int(expert))

    vars(layer)["load"] = load
    return layer


def checkpoint() -> Weights:
    shapes = {"embed.weight": (100, 8), "lm_head.weight": (100, 8), "norm.weight": (8,), "down_proj.weight": (8, 6)}
    for name, size in {"q_proj": 16, "k_proj": 8, "v_proj": 8}.items():
        shapes |= {f"{name}.weight": (size, 8), f"{name}.bias": (size,)}
    shapes |= {f"{name}.weight": (6, 8) for name in ("gate_proj", "up_proj")}
    for expert in range(4):
        for name, (rows, columns) in {"gate_proj": (6, 8), "up_proj": (6, 8), "down_proj": (8, 6)}.items():
            layer = f"experts.{expert}.{name}"
            shapes |= {f"{layer}.weight": (rows, columns), f"{layer}.weight_scale": (rows, 1)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def watched(**options: Any) -> Model:
    model = Model(**options)
    record_metadata_for_reloading(model)
    watch(model, Config())
    return model


OTHER_RANKS = ("experts.0.", "experts.1.")


@pytest.mark.parametrize("missing", [name for name in checkpoint() if not name.startswith(OTHER_RANKS)])
def test_whatever_a_checkpoint_lacks_is_named(missing: str) -> None:
    weights = checkpoint()
    del weights[missing]
    with pytest.raises(IncompleteCheckpoint) as refusal:
        watched().load_weights(weights.items())
    assert f"the checkpoint has no {missing}, or not all of it" in str(refusal.value)


def test_a_complete_load_changes_nothing_else() -> None:
    model = watched()
    model.load_weights(checkpoint().items())
    assert all(bool((each == 1).all()) for name, each in model.named_parameters() if name.startswith("experts"))
    model.load_weights([("norm.weight", torch.zeros(8))])  # a part of a model that has been loaded
    assert not model.norm.weight.any()


def test_a_fused_parameter_that_lies_otherwise_is_named_as_a_whole() -> None:
    model = watched()
    model.gate_up_proj.weight.data = model.gate_up_proj.weight.data.t().contiguous().t()
    with pytest.raises(IncompleteCheckpoint, match=r"no gate_up_proj\.weight, or"):
        model.load_weights((name, tensor) for name, tensor in checkpoint().items() if name != "up_proj.weight")


def test_a_rank_needs_no_experts_of_others_and_a_tied_head_nothing() -> None:
    weights = {name: tensor for name, tensor in checkpoint().items() if not name.startswith((*OTHER_RANKS, "lm_head"))}
    watched(tied=True).load_weights(weights.items())
    with pytest.raises(IncompleteCheckpoint, match=r"no lm_head\.weight,"):
        watched().load_weights(weights.items())


def test_each_rank_of_several_is_filled_by_its_part(ranks: Ranks) -> None:
    ranks.size = 2
    for ranks.rank in range(2):
        watched().load_weights(checkpoint().items())


def test_the_other_models_of_a_class_are_not_watched() -> None:
    watched()
    Model().load_weights([])


def reload(model: Model, weights: Weights) -> None:
    initialize_layerwise_reload(model)
    model.load_weights(weights.items())
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


@pytest.mark.parametrize("tied", [True, False])
def test_a_reload_of_layers_in_place_is_complete_too(tied: bool) -> None:
    model = watched(tied=tied)
    for layer in model.modules():
        if layer is not model.attention:
            vars(layer)["quant_method"] = None  # what vLLM makes of weights on CPUs cannot take others
    ones = {name: tensor for name, tensor in checkpoint().items() if not (tied and name == "lm_head.weight")}
    model.load_weights(ones.items())
    twos = {name: tensor + 1 for name, tensor in ones.items()}
    reload(model, twos)
    assert bool((model.lm_head.weight[:100] == 2).all())
    del twos["k_proj.weight"], twos["experts.3.up_proj.weight"]
    with pytest.raises(IncompleteCheckpoint, match=r"no k_proj\.weight, experts\.3\.up_proj\.weight, or"):
        reload(model, twos)


def test_a_class_may_inherit_how_it_loads() -> None:
    class Special(Model):
        load: Callable[..., None]

        def load_weights(self, weights: Any) -> None:
            super().load_weights(list(weights)[:-1])

    watched()
    model = Special()
    watch(model, Config())
    with pytest.raises(IncompleteCheckpoint, match=r"no experts\.3\.down_proj\.weight_scale, or"):
        model.load_weights(checkpoint().items())


def test_what_a_load_removes_from_a_model_needs_no_weights() -> None:
    class Classifier(Model):
        def load_weights(self, weights: Any) -> None:
            super().load_weights(weights)
            del self.lm_head

    model = Classifier()
    watch(model, Config())
    model.load_weights((name, tensor) for name, tensor in checkpoint().items() if name != "lm_head.weight")
