"""Quantization method `gaudi_fp8`: which of vLLM's modules is observed, quantized or left alone."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from gaudi_calib.engines.vllm_plugin import QUANTIZATION
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.errors import ModelError

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
        super().__init__()
        self.session = Session.from_environment()

    def get_name(self) -> str:  # type: ignore[override]
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

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
        """Return how vLLM computes `layer`, a module called `prefix`; None: as without quantization."""
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from gaudi_calib.engines.vllm_plugin import attention, linear

        patched = type(layer).__name__ in PATCHED_LINEARS
        if isinstance(layer, LinearBase):
            return linear.MeasuredLinearMethod(self.session) if patched else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            return linear.MeasuredHeadMethod(self.session)
        if isinstance(layer, Attention):
            attention.observe_attention(layer, self.session)
        return None
