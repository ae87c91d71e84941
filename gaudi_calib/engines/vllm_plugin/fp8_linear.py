"""Linear layers and the output projection, computed as the target device would.

The FP8 values themselves are multiplied (each fits bfloat16 exactly), and the product is
scaled, so that scales which are no powers of two round only once. Sums are those of the
platform's matmul; the device adds in another order.
"""

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gaudi_calib.config.methods import TensorScaling
from gaudi_calib.engines.observe.fp8_cast import quantize
from gaudi_calib.engines.observe.peak import max_magnitude
from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, stand_in
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.node import PerChannelWeight, ScaleNode
from gaudi_calib.scales.tensor import scale_ranges


def scale_tokens(x: torch.Tensor, rule: TensorScaling, device: Device) -> torch.Tensor:
    """Return one scale per token, as the dynamic methods compute it.

    Args:
        x: shape (..., channels).

    Returns:
        float32, shape (..., 1); 1 for a token of zeros.
    """
    largest = max_magnitude(x, -1).unsqueeze(-1).float()
    scales = torch.from_numpy(scale_ranges(largest.cpu().numpy(), rule, device)).to(x.device)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def to_weight_scale(scales: ScaleNode, like: torch.Tensor) -> torch.Tensor:
    """Return a weight's scale as float32 on the device of `like`: shape (out,), or ()."""
    stored = scales.weight.out_channels if isinstance(scales.weight, PerChannelWeight) else scales.weight
    values = np.asarray(stored, dtype=np.float32)
    return torch.from_numpy(values if isinstance(scales.weight, PerChannelWeight) else values.reshape(())).to(
        like.device
    )


def read_weight(weight: torch.Tensor) -> np.ndarray:
    """Return a weight as scales are computed from it."""
    return weight.detach().float().cpu().numpy()


class _Quantized:
    """Mixed into vLLM's unquantized methods, which then multiply FP8 values."""

    name: str
    source: ScaleSource
    _input_scale: float | None = None
    _weight_scale: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
        wanted = stand_in(1, 2 if isinstance(layer, RowParallelLinear) else None, weight)
        found = self.source.find({self.name: wanted}, lambda name: read_weight(weight)).get(self.name)
        if found is not None:
            scale = to_weight_scale(found, weight)
            column = scale[:, None] if scale.ndim else scale
            # A new tensor: the embedding may share this one.
            layer.weight = nn.Parameter(quantize(weight, column, self.source.device), requires_grad=False)
            self._input_scale, self._weight_scale = float(found.inputs[0]), scale
        super().process_weights_after_loading(layer)  # type: ignore[misc]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        multiply = super().apply  # type: ignore[misc]
        if self._weight_scale is None or self._input_scale is None:
            return multiply(layer, x, bias)
        scale: float | torch.Tensor = self._input_scale
        if self.source.is_dynamic:
            scale = scale_tokens(
                x, self.source.table.for_node(self.name, type(layer).__name__).activation, self.source.device
            )
        product = multiply(layer, quantize(x, scale, self.source.device), None)
        out = (product.float() * (self._weight_scale * scale)).to(x.dtype)
        return out if bias is None else out + bias.to(out.dtype)


@register_weight_loader_v2_supported_method
class QuantizedLinearMethod(_Quantized, UnquantizedLinearMethod):
    """Computes a linear layer in FP8."""

    def __init__(self, name: str, source: ScaleSource):
        super().__init__()
        self.name, self.source = name, source


class QuantizedHeadMethod(_Quantized, UnquantizedEmbeddingMethod):
    """Computes the output projection in FP8."""

    def __init__(self, name: str, source: ScaleSource):
        super().__init__()
        self.name, self.source = name, source
