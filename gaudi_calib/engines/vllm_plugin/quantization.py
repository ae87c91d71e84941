"""Quantization method `gaudi_fp8`: which of vLLM's modules is observed, quantized or left alone."""

from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from gaudi_calib.engines import QUANTIZATION
from gaudi_calib.errors import ConfigError, ModelError
from gaudi_calib.fp8 import HP_DTYPES

# Classes of linear layers that INC patches; it compares names as a whole, so a subclass is not one of them.
# Source: INC `_mod_default_dict`, fp8_quant/_core/patching_common.py.
PATCHED_LINEARS = frozenset(
    {
        "ColumnParallelLinear",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "ReplicatedLinear",
        "RowParallelLinear",
        "ParallelLMHead",
    }
)


class GaudiFp8Config(QuantizationConfig):
    """Made by vLLM, in the process of `LLM`, when `quantization="gaudi_fp8"`; then sent to every worker.

    Attributes:
        session: what QUANT_CONFIG says.
    """

    def __init__(self) -> None:
        from gaudi_calib.engines.vllm_plugin.session import Session

        super().__init__()
        self.session: Session = Session.from_environment()

    def get_name(self) -> str:  # type: ignore[override]
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [getattr(torch, dtype) for dtype in HP_DTYPES]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GaudiFp8Config":
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Refuse a checkpoint that is quantized, where `gaudi_fp8` was asked for.

        Raises:
            ModelError: it is.
        """
        if user_quant == QUANTIZATION:
            raise ModelError(
                f"the checkpoint is quantized already ({hf_quant_cfg.get('quant_method')})",
                where="quantization_config of config.json",
                why="vLLM serves it with that method; quantization gaudi_fp8 needs bfloat16 weights",
                fix="leave quantization out to serve it as it is, or measure it with `--engine torch`, which "
                "reads such checkpoints",
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how vLLM computes `layer`, a module called `prefix`; None: as without quantization.

        Raises:
            ConfigError: the engine compiles, or the model has latent attention; neither is supported.
            RangeError, FileError: attention that would be quantized was not measured; other layers
                raise when their weights have been loaded.
        """
        from vllm.model_executor.layers.attention import Attention, MLAAttention
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self._require_eager()
        if isinstance(layer, MLAAttention):
            self._refuse_latent(prefix)
        if isinstance(layer, Attention):
            self._attach_attention(layer)
        if isinstance(layer, RoutedExperts):
            return self._choose_experts(layer, prefix)
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            return self._choose_linear(layer, prefix, is_head=isinstance(layer, ParallelLMHead))
        return None

    def _attach_attention(self, layer: Any) -> None:
        from gaudi_calib.engines.vllm_plugin.attention import ObservedAttention
        from gaudi_calib.engines.vllm_plugin.fp8_attention import quantize_attention

        if self.session.measures:
            layer.forward = ObservedAttention(layer, self.session)
        else:
            quantize_attention(layer, self._source)

    def _choose_experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from gaudi_calib.engines.vllm_plugin.experts import MeasuredExpertsMethod
        from gaudi_calib.engines.vllm_plugin.fp8_experts import QuantizedExpertsMethod

        if self.session.measures:
            return MeasuredExpertsMethod(layer.moe_config, self.session)
        if self.session.config.is_blocked(f"{prefix}.routed_experts.moe_op", "VllmMixtureOfExpertsOp"):
            return None
        return QuantizedExpertsMethod(layer.moe_config, prefix, self._source)

    def _choose_linear(self, layer: Any, prefix: str, *, is_head: bool) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from gaudi_calib.engines.vllm_plugin.fp8_linear import QuantizedHeadMethod, QuantizedLinearMethod
        from gaudi_calib.engines.vllm_plugin.linear import MeasuredHeadMethod, MeasuredLinearMethod

        class_name = type(layer).__name__
        if class_name in PATCHED_LINEARS:
            if self.session.measures:
                return MeasuredHeadMethod(self.session) if is_head else MeasuredLinearMethod(self.session)
            if not self.session.config.is_blocked(prefix, class_name):
                return (QuantizedHeadMethod if is_head else QuantizedLinearMethod)(prefix, self._source)
        return None if is_head else UnquantizedLinearMethod()

    @cached_property
    def _source(self) -> Any:
        from gaudi_calib.engines.vllm_plugin.scales import ScaleSource

        return ScaleSource(self.session)

    def _require_eager(self) -> None:
        from vllm.config import get_current_vllm_config

        model = get_current_vllm_config().model_config
        if model is not None and not model.enforce_eager:
            raise ConfigError(
                "quantization gaudi_fp8 needs enforce_eager",
                where=self.session.path,
                why="compiled graphs leave out what it observes and computes in between",
                fix="use LLM(..., enforce_eager=True), or --enforce-eager",
            )

    def _refuse_latent(self, prefix: str) -> None:
        from gaudi_calib.ranges.layer_types import find_layer_type
        from gaudi_calib.ranges.node import LATENT_ATTENTION_OPS

        names = {f"{prefix}.impl.{op}": kind for op, kind in LATENT_ATTENTION_OPS.items()}
        if all(self.session.config.is_blocked(name, find_layer_type(name, kind)) for name, kind in names.items()):
            return
        raise ConfigError(
            "latent attention is not supported by quantization gaudi_fp8",
            where=prefix,
            why=f"{self.session.path.name} does not block it",
            fix="measure with `--engine torch`; to serve without a Gaudi, add 'mla_attn' to blocklist.names",
        )
