"""Routed experts, computed as the target device would: its fused op takes FP8 in and multiplies FP8.

hidden states   scale inputs[0] of the op; dynamic methods: per token
intermediate    scale inputs[1 + i] of expert i; dynamic methods: per token
weights         those of w13_list.i and w2_list.i
"""

from typing import Any

import torch
from torch import nn

from gaudi_calib.engines.observe.fp8_cast import quantize
from gaudi_calib.engines.vllm_plugin.experts import ExpertsMethod
from gaudi_calib.engines.vllm_plugin.fp8_linear import read_weight, scale_tokens, to_weight_scale
from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, stand_in
from gaudi_calib.ranges.experts import list_children
from gaudi_calib.ranges.node import ScaleNode


class QuantizedExpertsMethod(ExpertsMethod):
    """Computes this rank's part of a layer's experts in FP8.

    Attributes:
        name: of the module that holds the fused op.
    """

    def __init__(self, moe: Any, name: str, source: ScaleSource):
        super().__init__(moe)
        self.name, self.source = name, source
        self._input_scales: list[float] = []
        self._weight_scales: dict[str, torch.Tensor] = {}

    def process_weights_after_loading(self, layer: Any) -> None:
        count = len(layer.w13_weight)
        op = self.source.choose_name(f"{self.name}.routed_experts.moe_op", f"{self.name}.moe_op")
        weights = {
            f"{op}.{child}": (layer.w13_weight if child.startswith("w13") else layer.w2_weight)[index % count]
            for index, child in enumerate(list_children(count))
        }
        wanted = {op: stand_in(1, 1 + count)} | {name: stand_in(1, None, weight) for name, weight in weights.items()}
        found = self.source.find(wanted, lambda name: read_weight(weights[name]))
        if len(found) < len(wanted):
            return
        self._input_scales = [float(scale) for scale in found[op].inputs]
        for name, weight in weights.items():
            self._weight_scales[name.removeprefix(f"{op}.")] = self._quantize_weight(weight, found[name])

    def _quantize_weight(self, weight: torch.Tensor, scales: ScaleNode) -> torch.Tensor:
        """Put a weight's FP8 values in its place; return its scale."""
        scale = to_weight_scale(scales, weight)
        column = scale[:, None] if scale.ndim else scale
        weight.copy_(quantize(weight, column, self.source.device))
        return scale

    def expand(self, layer: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        if not self._input_scales:
            return super().expand(layer, expert, x)
        product = self._multiply(x, layer.w13_weight[expert], f"w13_list.{expert}", 0)
        return self.activate(layer, product if not self.moe.has_bias else product + layer.w13_bias[expert])

    def shrink(self, layer: Any, expert: int, inner: torch.Tensor) -> torch.Tensor:
        if not self._input_scales:
            return super().shrink(layer, expert, inner)
        product = self._multiply(inner, layer.w2_weight[expert], f"w2_list.{expert}", 1 + expert)
        return product if not self.moe.has_bias else product + layer.w2_bias[expert]

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, child: str, index: int) -> torch.Tensor:
        scale: float | torch.Tensor = self._input_scales[index]
        if self.source.is_dynamic:
            rule = self.source.table.for_node(f"{self.name}.routed_experts.moe_op", "VllmMixtureOfExpertsOp").activation
            scale = scale_tokens(x, rule, self.source.device)
        product = nn.functional.linear(quantize(x, scale, self.source.device), weight)
        return (product.float() * (self._weight_scales[child] * scale)).to(x.dtype)
