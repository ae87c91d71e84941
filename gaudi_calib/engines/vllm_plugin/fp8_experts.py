"""Routed experts, computed as the target device would: its fused op takes FP8 in and multiplies FP8.

hidden states   scale inputs[0] of the op; dynamic methods: of each token, or of all
intermediate    scale inputs[1 + i] of expert i; dynamic methods: as the hidden states, expert by expert (the
                device's fused op scales it inside, nobody says how)
weights         those of w13_list.i and w2_list.i
"""

from typing import Any

import torch
from torch import nn

from gaudi_calib.engines.observe.fp8_cast import quantize
from gaudi_calib.engines.vllm_plugin.experts import ExpertsMethod
from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, quantize_weight, stand_in
from gaudi_calib.ranges.experts import list_children


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
        self._hidden: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        count = len(layer.w13_weight)
        op = self.source.choose_name(f"{self.name}.routed_experts.moe_op", f"{self.name}.moe_op")
        weights = {
            f"{op}.{child}": (layer.w13_weight if child.startswith("w13") else layer.w2_weight)[index % count]
            for index, child in enumerate(list_children(count))
        }
        wanted = {op: stand_in(1, 1 + count)} | {name: stand_in(1, None, weight) for name, weight in weights.items()}
        found = self.source.find(wanted, weights)
        if len(found) < len(wanted):
            return
        self._input_scales = [float(scale) for scale in found[op].inputs]
        for name, weight in weights.items():
            values, self._weight_scales[name.removeprefix(f"{op}.")] = quantize_weight(
                weight, found[name], self.source.device
            )
            weight.copy_(values)

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *shared: Any, **_: Any
    ) -> torch.Tensor:
        self._hidden = x
        return super().apply(layer, x, topk_weights, topk_ids)

    def multiply(self, layer: Any, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        if not self._input_scales:
            return super().multiply(layer, part, expert, x)
        stored = self._input_scales[0 if part == "w13" else 1 + expert]
        op, among = f"{self.name}.routed_experts.moe_op", self._hidden if part == "w13" else None
        scale = self.source.scale_input(x, stored, op, "VllmMixtureOfExpertsOp", among=among)
        product = nn.functional.linear(quantize(x, scale, self.source.device), getattr(layer, f"{part}_weight")[expert])
        out = (product.float() * (self._weight_scales[f"{part}_list.{expert}"] * scale)).to(x.dtype)
        return out + getattr(layer, f"{part}_bias")[expert] if self.moe.has_bias else out
