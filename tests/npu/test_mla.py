"""Multi-head latent attention: which heads are taken, and how a cache is cut in two.

That answers are those of the CPU platform, `test_generation` shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

NPU = "npu:0"
HEADS = [1, 2, 3, 4, 8, 12, 16, 20, 64, 100, 128, 129, 256]
SIZES = [(512, 64, 64, 64), (512, 64, 128, 64), (512, 64, 192, 256), (512, 32, 128, 128), (256, 64, 128, 128)]
"""Others than DeepSeek's."""


def operators_take(sizes: Any, heads: int, dtype: torch.dtype) -> bool:
    """Prompts and decoding."""
    from vllm_ascend.attention.backend import causal_mask
    from vllm_ascend.attention.mla import attend_to_latents, attend_to_rows

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype, device=NPU)

    latent, turned = sizes.kv_lora_rank, sizes.qk_rope_head_dim
    keys = ones(2, heads, sizes.qk_nope_head_dim + turned)
    try:
        attend_to_rows(keys, keys, ones(2, heads, sizes.v_head_dim), [2], [2], causal_mask(torch.device(NPU)), 1.0)
        queries = ones(1, heads, latent), ones(1, heads, turned)
        caches = ones(1, 128, 1, latent), ones(1, 128, 1, turned)
        attend_to_latents(queries, caches, [1], torch.zeros(1, 1, dtype=torch.int32, device=NPU), 1.0)
    except RuntimeError as error:
        assert "npu_fused_infer_attention_score: " in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_platform_and_simulator_hold_one_rule_of_heads_and_sizes(dtype: torch.dtype) -> None:
    from vllm_ascend.attention.rules import LATENT_SIZES, LatentSizes, mla_refusals

    taken = 0
    for sizes, heads in [*((LATENT_SIZES, heads) for heads in HEADS), *((LatentSizes(*each), 4) for each in SIZES)]:
        allowed = not list(mla_refusals(sizes, heads, dtype))
        assert operators_take(sizes, heads, dtype) == allowed, (sizes, heads)
        taken += allowed
    assert taken == (0 if dtype == torch.float16 else 7)


@pytest.fixture(autouse=True)
def _there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def layer(heads: int = 4, kv_b_proj: Any = None, **changes: Any) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_ascend.attention.mla import NPUMLAImpl

    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, **changes}
    others = {"q_lora_rank": None, "qk_head_dim": 192, "kv_b_proj": kv_b_proj or torch.nn.Linear(512, heads * 256)}
    with set_current_vllm_config(VllmConfig()):
        return NPUMLAImpl(heads, 576, 1.0, 1, None, None, "auto", None, "decoder", None, **sizes, **others)


def test_a_layer_with_other_sizes_than_the_operators_take_is_refused_when_it_is_built() -> None:
    with pytest.raises(
        ValueError, match=r"MLA with kv_lora_rank 512, .* v_head_dim 64 \(there is .*\) is not supported"
    ):
        layer(v_head_dim=64)
    with pytest.raises(ValueError, match=r"MLA with 6 heads on each device"):
        layer(6)


def test_the_memory_of_a_layer_is_cut_into_latents_and_what_is_turned() -> None:
    """Two contiguous caches, which share nothing and leave nothing out."""
    cache = torch.zeros(3, 128, 576, device=NPU)
    latents, turned = layer()._latents_and_turned(cache)
    assert (latents.shape, turned.shape) == ((3, 128, 1, 512), (3, 128, 1, 64))
    assert latents.is_contiguous()
    assert turned.is_contiguous()
    latents += 1
    turned += 1
    assert bool((cache == 1).all())


def linear(method: Any, **attributes: Any) -> Any:
    """A `kv_b_proj` of one head as `method` makes it, on the device and without contents."""
    made: Any = torch.nn.Module()
    vars(made).update(quant_method=method, prefix="kv_b_proj", has_bias=False, **attributes)
    made.input_size_per_partition = 512
    with torch.device(NPU):
        method.create_weights(made, 512, [256], 512, 256, torch.bfloat16, weight_loader=lambda *_: None)
    return made


def of_compressed_tensors(*, static: bool) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8

    from vllm_ascend.quantization.compressed_tensors import NPUInt8LinearMethod

    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(VllmConfig()):
            scheme = CompressedTensorsW8A8Int8("channel", static, True)
            return linear(NPUInt8LinearMethod(None), scheme=scheme)
    finally:
        torch.set_default_dtype(torch.float32)


def of_modelslim(*, static: bool) -> Any:
    from vllm_ascend.quantization.modelslim_linear import DynamicLinearMethod, StaticLinearMethod

    return linear(StaticLinearMethod(with_scales=True) if static else DynamicLinearMethod(), skip_bias_add=False)


FORMATS = {"compressed-tensors": of_compressed_tensors, "ModelSlim": of_modelslim}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS.keys())
def test_a_layer_that_is_absorbed_must_not_be_quantised_statically(make: Any) -> None:
    with pytest.raises(ValueError, match="kv_b_proj with static activations is not supported on NPUs: MLA multiplies"):
        layer(1, make(static=True))
    layer(1, make(static=False))


@pytest.mark.parametrize("nz", ["0", "1"])
@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS.keys())
def test_what_is_absorbed_of_a_quantised_layer_is_its_weights(
    make: Any, nz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers times their scales, rounded to 16 bits once."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    from vllm_ascend.ops.layout import allow_fractal_nz, is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", nz)
    allow_fractal_nz()
    projection = make(static=False)
    random = torch.Generator().manual_seed(0)
    integers = torch.randint(-127, 128, (256, 512), generator=random, dtype=torch.int8)
    scales = torch.rand(256, 1, generator=random) / 500
    projection.weight.data.copy_(integers)
    projection.weight_scale.data.copy_(scales)
    projection.quant_method.process_weights_after_loading(projection)
    assert is_fractal_nz(projection.weight.data) == (nz == "1")
    found = get_and_maybe_dequant_weights(projection, torch.bfloat16).float().cpu()
    torch.testing.assert_close(found, integers * scales, rtol=2**-8, atol=0)


def test_what_is_absorbed_of_a_plain_layer_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    import vllm_ascend.ops.layers  # noqa: F401
    from vllm_ascend.ops.layout import allow_fractal_nz, is_fractal_nz

    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "2")
    allow_fractal_nz()
    absorbed, other = (torch.nn.Linear(512, 256, bias=False, device=NPU, dtype=torch.bfloat16) for _ in range(2))
    layer(1, absorbed)
    for each in (absorbed, other):
        UnquantizedLinearMethod().process_weights_after_loading(each)
    assert not is_fractal_nz(absorbed.weight.data)
    assert is_fractal_nz(other.weight.data)
