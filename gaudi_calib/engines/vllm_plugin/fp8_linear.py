"""Linear layers and the output projection, computed as the target device would.

The FP8 values themselves are multiplied (each fits bfloat16 exactly), and the product is
scaled, so that scales which are no powers of two round only once. Sums are those of the
platform's matmul; the device adds in another order.
"""

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gaudi_calib.engines.observe.fp8_cast import quantize
from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, quantize_weight, stand_in


class _Quantized:
    """Mixed into vLLM's unquantized methods, which then multiply FP8 values."""

    def __init__(self, name: str, source: ScaleSource):
        super().__init__()
        self.name, self.source = name, source
        self._input_scale: float | None = None
        self._weight_scale = torch.empty(0)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
        wanted = stand_in(1, 2 if isinstance(layer, RowParallelLinear) else None, weight)
        found = self.source.find({self.name: wanted}, {self.name: weight}).get(self.name)
        if found is not None:
            values, self._weight_scale = quantize_weight(weight, found, self.source.device)
            # A new tensor: the embedding may share this one.
            layer.weight = nn.Parameter(values, requires_grad=False)
            self._input_scale = float(found.inputs[0])
        super().process_weights_after_loading(layer)  # type: ignore[misc]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        multiply = super().apply  # type: ignore[misc]
        if self._input_scale is None:
            return multiply(layer, x, bias)
        scale = self.source.scale_input(x, self._input_scale, self.name, type(layer).__name__)
        product = multiply(layer, quantize(x, scale, self.source.device), None)
        out = (product.float() * (self._weight_scale * scale)).to(x.dtype)
        return out if bias is None else out + bias.to(out.dtype)


@register_weight_loader_v2_supported_method
class QuantizedLinearMethod(_Quantized, UnquantizedLinearMethod):
    """Computes a linear layer in FP8."""


class QuantizedHeadMethod(_Quantized, UnquantizedEmbeddingMethod):
    """Computes the output projection in FP8."""
