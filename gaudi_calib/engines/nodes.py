"""From what was observed to channel ranges, under the names and rules of vllm-gaudi."""

from collections.abc import Iterator

import numpy as np
import torch

from gaudi_calib.engines.attention import AttentionRanges, max_magnitude
from gaudi_calib.engines.base import ATTENTION_OPS, LinearPlan, ModelPlan
from gaudi_calib.engines.linear import LinearRanges
from gaudi_calib.families import Split
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.shard import Axis, ChannelNode, ChannelRange

_WEIGHT_VALUES = 2**24  # of a weight, looked at at a time


def linear_node(plan: ModelPlan, linear: LinearPlan, ranges: LinearRanges) -> ChannelNode:
    """Return the channel ranges of one linear layer."""
    assert ranges.seen is not None
    outputs = None
    if linear.op is Op.ROW_PARALLEL_LINEAR:
        total = ChannelRange(_array(torch.tensor([ranges.total])))
        outputs = (total, total)
    return ChannelNode(
        linear.op,
        inputs=(ChannelRange(_array(ranges.seen), linear.in_axis),),
        outputs=outputs,
        weight=_weight_range(plan, linear),
        partial_products=dict(ranges.products),
    )


def _weight_range(plan: ModelPlan, linear: LinearPlan) -> ChannelRange:
    """Read the weight from the checkpoint piece by piece; per input column for row-parallel layers, else per row."""
    if linear.split is Split.ROW:
        columns = torch.stack([_magnitudes(piece, 0) for piece in _weight_pieces(plan, linear)]).amax(0)
        return ChannelRange(_array(columns), linear.in_axis)
    values = np.concatenate([_array(_magnitudes(piece, 1)) for piece in _weight_pieces(plan, linear)])
    order = plan.canonical_rows(linear)
    if order is not None:
        values = values[order]
    return ChannelRange(np.pad(values, (0, linear.padding)), linear.out_axis)


def _weight_pieces(plan: ModelPlan, linear: LinearPlan) -> Iterator[torch.Tensor]:
    for name in linear.weights:
        weight = plan.checkpoint.read([name])[name]
        for piece in weight.split(max(1, _WEIGHT_VALUES // weight.shape[1])):
            yield plan.served(piece)


def _magnitudes(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest magnitudes over `dim`."""
    if weight.dtype is not torch.bfloat16:
        return max_magnitude(weight, (dim,))
    # Without its sign bit, a bfloat16 is ordered as the integer of the same bits (NaN above all).
    return (weight.view(torch.int16) & 0x7FFF).amax(dim).view(torch.bfloat16)


def attention_nodes(plan: ModelPlan, layer: int, seen: AttentionRanges) -> dict[str, ChannelNode]:
    """Return the channel ranges of one layer's attention ops.

    What each op sees in vllm-gaudi: prefill runs the fused op on unscaled queries;
    decode maps scale·q to blocks, multiplies with the cached keys, normalises by the
    block's own largest score (so the largest probability is 1), multiplies with the
    cached values and maps back. On Gaudi 2 the softmax denominators take the same
    two mappings.

    Source: vllm-gaudi `flat_pa`, `pipelined_pa`, vllm_gaudi/extension/ops.py.
    """
    heads, kv_heads = plan.head_axis, plan.kv_axis
    query, out = (ChannelRange(_array(seen.tensors[name]), heads) for name in ("q", "out"))
    key, value = (ChannelRange(_array(seen.tensors[name]), kv_heads) for name in ("k", "v"))
    scaled = ChannelRange(round_to_bf16(round_to_bf16(query.values) * np.float32(seen.scale)), heads)
    sums = ChannelRange(_array(seen.tensors["softmax_sum"]), heads)
    probability = ChannelRange(_array(seen.tensors["probability"]), heads)
    one = ChannelRange(np.ones(1, dtype=np.float32), Axis())
    nodes = {
        "matmul_qk": ChannelNode(Op.MATMUL, (scaled, key)),
        "matmul_av": ChannelNode(Op.MATMUL, (one, value)),
        "batch2block_matmul": ChannelNode(Op.B2B_MATMUL, (one, scaled), (scaled,), softmax_sums=sums),
        "block2batch_matmul": ChannelNode(Op.B2B_MATMUL, (one, out), (out,), softmax_sums=sums),
        "k_cache": ChannelNode(Op.KV_CACHE, (key,)),
        "v_cache": ChannelNode(Op.KV_CACHE, (value,)),
        "fused_scaled_dot_product_attention": ChannelNode(Op.FUSED_SDPA, (query, key, value), (out, probability)),
    }
    return {plan.attention_node(layer, op): nodes[op] for op in ATTENTION_OPS if op in nodes}


def _array(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy().copy()
