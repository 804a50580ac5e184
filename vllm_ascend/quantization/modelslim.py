"""Checkpoints that ModelSlim quantised, which users of NPUs load with `--quantization ascend`.

Nothing in their config.json says so, but there is a quant_model_description.json: where it is, this is chosen without
being asked for. vLLM has made most of its configuration by then, as no hook comes earlier. What a description asks for
is refused when vLLM is configured; parts of one layer in different kinds when the layer is made, since the model's code
says which parts a layer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_ascend.quantization import MODELSLIM
from vllm_ascend.quantization.completeness import CompleteCheckpoints
from vllm_ascend.quantization.description import DYNAMIC, FILE, FLOAT, MIXED, STATIC, Description

logger = init_logger(__name__)


@register_quantization_config(MODELSLIM)
class ModelSlimConfig(CompleteCheckpoints, QuantizationConfig):
    """What the layers of a model ask for their methods. It is complete once `maybe_update_config` has run."""

    def __init__(self) -> None:
        super().__init__()
        self.description: Description | None = None

    @classmethod
    def get_name(cls) -> Any:
        return MODELSLIM

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: vLLM would read the file by itself, and say less where there is none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelSlimConfig:
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raises ValueError if the model has no description, or has something else under its name."""
        content = _content(model_name, revision)
        if content is None:
            raise ValueError(
                f"--quantization {MODELSLIM} is for checkpoints of ModelSlim, which have a {FILE}, and {model_name} "
                f"has none: leave the option out, or quantise the model with ModelSlim"
            )
        try:
            self.description = Description.read(content.decode())
        except ValueError as error:
            raise ValueError(f"{model_name}: {error}") from error

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.description = self._described().renamed(hf_to_vllm_mapper.apply_dict)

    @property
    def norms_add_bias(self) -> bool:
        return self._described().norms_add_bias

    def may_lack(self, parameter: str) -> bool:
        """Biases of norms, which are 0 where the checkpoint has none."""
        return self._described().has_no_bias_of_norm(parameter)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Raises ValueError for a layer that cannot be computed as it is described."""
        from vllm_ascend.quantization import modelslim_experts, modelslim_linear

        if isinstance(layer, LinearBase):
            return self._method_of_linear(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return modelslim_experts.method(layer, self._kind_of_experts(layer, prefix))
        if isinstance(layer, VocabParallelEmbedding):
            kind = self._described().kind(prefix)
            if kind == DYNAMIC and isinstance(layer, ParallelLMHead):
                return modelslim_linear.DynamicLinearMethod()
            if kind != FLOAT:
                raise ValueError(f"{prefix} in {kind} is not supported on NPUs: {FILE} may have it in {FLOAT}")
        return None

    def _method_of_linear(self, layer: Any, prefix: str) -> Any:
        from vllm_ascend.quantization import modelslim_linear

        block, _, name = prefix.rpartition(".")
        parts = [f"{block}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        kind = self._described().kind_of(prefix, parts)
        biased = [part for part in parts if self._described().has(f"{part}.bias")]
        if biased and kind != STATIC and not layer.has_bias:
            raise ValueError(
                f"{', '.join(biased)} has a bias in the checkpoint, and none in vLLM's model, which would leave it out"
            )
        if kind == STATIC:
            with_scales = any(self._described().has(f"{part}.weight_scale") for part in parts)
            return modelslim_linear.StaticLinearMethod(with_scales=with_scales)
        methods = {DYNAMIC: modelslim_linear.DynamicLinearMethod, MIXED: modelslim_linear.MixedLinearMethod}
        return methods.get(kind, modelslim_linear.FloatLinearMethod)()

    def _kind_of_experts(self, layer: Any, prefix: str) -> str:
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        parts = [f"{prefix}.{number}.{name}" for number in range(layer.global_num_experts) for name in names]
        if biased := [part for part in parts if self._described().has(f"{part}.bias")]:
            raise ValueError(f"experts with biases are not supported on NPUs: {biased[0]} and {len(biased) - 1} more")
        return self._described().kind_of(prefix, parts)

    def _described(self) -> Description:
        if self.description is None:
            raise RuntimeError(f"{FILE} has not been read: maybe_update_config comes first")
        return self.description


def choose_by_file(vllm_config: Any) -> None:
    """Makes a configuration whose model has a description, and no other quantisation, one for ModelSlim."""
    model = vllm_config.model_config
    if model is None or model.quantization is not None or _content(model.model, model.revision) is None:
        return
    logger.info("%s has a %s: --quantization %s is chosen", model.model, FILE, MODELSLIM)
    model.quantization = MODELSLIM
    vllm_config.quant_config = type(vllm_config)._get_quantization_config(model, vllm_config.load_config)


def refusals(config: ModelSlimConfig) -> Iterator[str]:
    """What the checkpoint asks for and NPUs do not do."""
    if config.description is not None:
        yield from config.description.refusals()


def _content(model: str, revision: str | None) -> bytes | None:
    """Of the description. The hub is asked for a model that is not on this machine; None if it does not answer."""
    from vllm.model_executor.model_loader.weight_utils import maybe_download_from_modelscope

    local = maybe_download_from_modelscope(model, revision=revision, allow_patterns=["*.json"])
    content: bytes | None = get_hf_file_bytes(FILE, local or model, revision)
    return content
