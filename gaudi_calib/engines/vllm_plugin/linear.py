"""Linear layers and the output projection, observed."""

import torch
from torch import nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gaudi_calib.engines.observe.peak import Peak
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.ranges.node import Node


class MeasuredLinear:
    """Mixed into vLLM's unquantized methods: observes one linear layer of this rank, and computes as they do.

    Attributes:
        calls: how often the layer ran.
        input, weight: of the layer.
        partial: row parallel only: this rank's product before the ranks' are summed; where
            they are summed at once, the elementwise signed maximum over the ranks, as INC has it.
        total: row parallel only: their sum.
    """

    def __init__(self, session: Session):
        super().__init__()
        self.session, self.calls = session, 0
        self.input, self.weight, self.partial, self.total = Peak(), Peak(), Peak(), Peak()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.weight.observe(layer.weight)  # type: ignore[arg-type]
        super().process_weights_after_loading(layer)  # type: ignore[misc]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        compute = super().apply  # type: ignore[misc]
        if not self.session.is_live():
            return compute(layer, x, bias)
        self.calls += 1
        self.input.observe(x)
        if not isinstance(layer, RowParallelLinear):
            return compute(layer, x, bias)
        product = compute(layer, x, None)
        self._observe_product(layer, product)
        return product if bias is None else product + bias.to(product.dtype)

    def _observe_product(self, layer: RowParallelLinear, product: torch.Tensor) -> None:
        """Take in a row-parallel layer's own product, without bias. All ranks have to call it.

        Source: INC `PatchedRowParallelLinear.forward_measure_reduce`, `forward_measure_no_reduce`.
        """
        largest, total = product, product
        if layer.reduce_results and layer.tp_size > 1:
            largest = product.to(torch.float32, copy=True)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
            total = tensor_model_parallel_all_reduce(product.clone())
        self.partial.observe(largest)
        self.total.observe(total)

    def reset(self) -> None:
        """Forget all but the weight."""
        self.calls = 0
        for peak in (self.input, self.partial, self.total):
            peak.reset()

    def to_node(self) -> Node:
        """Return the ranges of the layer."""
        outputs = (self.partial.to_range(), self.total.to_range()) if self.partial.is_seen else None
        return Node((self.input.to_range(),), outputs, self.weight.to_range())


@register_weight_loader_v2_supported_method
class MeasuredLinearMethod(MeasuredLinear, UnquantizedLinearMethod):
    """Observes a linear layer."""


class MeasuredHeadMethod(MeasuredLinear, UnquantizedEmbeddingMethod):
    """Observes the output projection."""
