"""Routed experts in plain torch, one expert at a time: observed, or computed in FP8.

vLLM's router chooses; its kernels are left aside, because they show no expert's
intermediate values. Routing factors that vLLM applies behind the experts stay there.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from gaudi_calib.engines.observe.peak import Peak, max_magnitude
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.ranges.experts import list_children
from gaudi_calib.ranges.node import Node


class ExpertsMethod(FusedMoEMethodBase):
    """Computes this rank's part of a layer's experts in bfloat16."""

    # What these need of their class, the base class has.
    create_weights: Any = UnquantizedFusedMoEMethod.create_weights
    get_fused_moe_quant_config: Any = UnquantizedFusedMoEMethod.get_fused_moe_quant_config

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *shared: Any, **_: Any
    ) -> torch.Tensor:
        """Return this rank's sum over the experts.

        Args:
            x: shape (tokens, hidden size).
            topk_weights, topk_ids: of the experts of every token, shape (tokens, top k), numbered over all ranks.
        """
        local = topk_ids.long() if layer.expert_map is None else layer.expert_map[topk_ids.long()].long()
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in local.unique().tolist():
            if expert < 0:  # another rank's
                continue
            tokens, slot = torch.where(local == expert)
            weights = topk_weights[tokens, slot, None].float()
            out.index_add_(0, tokens, self._run_expert(layer, expert, x[tokens], weights))
        return out.to(x.dtype)

    def _run_expert(self, layer: Any, expert: int, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        inner = self.expand(layer, expert, x)
        if layer.apply_router_weight_on_input:
            return self.multiply(layer, "w2", expert, self.expand(layer, expert, (x * weights).to(x.dtype))).float()
        return self.multiply(layer, "w2", expert, inner).float() * weights

    def multiply(self, layer: Any, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return the product with a weight of an expert, `w13` or `w2`, and its bias, shape (tokens, rows)."""
        bias = getattr(layer, f"{part}_bias")[expert] if self.moe.has_bias else None
        return nn.functional.linear(x, getattr(layer, f"{part}_weight")[expert], bias)

    def expand(self, layer: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return act(gate) * up, shape (tokens, intermediate channels)."""
        product = self.multiply(layer, "w13", expert, x)
        if layer.activation is MoEActivation.SWIGLUOAI:
            return _clamp_and_gate(product)  # vLLM has no kernel of it for CPU
        config = ApplyMoEActivationConfig.from_configs(self.moe, self.get_fused_moe_quant_config(layer))
        inner = product.new_empty(product.shape[0], product.shape[1] // 2)
        return apply_moe_activation(layer.activation, inner, product, activation_config=config)


def _clamp_and_gate(product: torch.Tensor, limit: float = 7.0, slope: float = 1.702) -> torch.Tensor:
    """Activation `swigluoai`, with gate and up channels in turn."""
    gate, up = product[..., ::2].clamp(max=limit), product[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * slope))


class MeasuredExpertsMethod(ExpertsMethod):
    """Observes this rank's experts.

    Attributes:
        input, output: of the fused op; the output is this rank's own sum.
        inner: of each of this rank's experts; 0 where it saw no token.
        weights: ranges of the w13 and w2 weights, expert by expert.
    """

    def __init__(self, moe: Any, session: Session):
        super().__init__(moe)
        self.session = session
        self.input, self.output = Peak(), Peak()
        self.inner: list[Peak] = []
        self.weights: tuple[np.ndarray, ...] = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        self.inner = [Peak() for _ in layer.w13_weight]
        both = [max_magnitude(weight, (1, 2)).float().cpu().numpy() for weight in (layer.w13_weight, layer.w2_weight)]
        self.weights = tuple(np.concatenate(both).reshape(-1, 1))

    def reset(self) -> None:
        """Forget all but the weights."""
        for peak in (self.input, self.output, *self.inner):
            peak.reset()

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *shared: Any, **_: Any
    ) -> torch.Tensor:
        out = super().apply(layer, x, topk_weights, topk_ids)
        if self.session.is_live():
            self.input.observe(x)
            self.output.observe(out)
        return out

    def expand(self, layer: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        inner = super().expand(layer, expert, x)
        if self.session.is_live():
            self.inner[expert].observe(inner)
        return inner

    def to_nodes(self, name: str) -> dict[str, Node]:
        """Return the ranges of the fused op `name` and of its children; INC gives each child a dummy input of 0."""
        outputs = [self.output.to_range(), *(peak.to_range() for peak in self.inner)]
        nodes = {name: Node((self.input.to_range(),), tuple(outputs))}
        for child, weight in zip(list_children(len(self.inner)), self.weights, strict=True):
            nodes[f"{name}.{child}"] = Node((np.zeros(1, dtype=np.float32),), weight=weight)
        return nodes
