"""From what an attention layer has seen to channel ranges, under the names and rules of vllm-gaudi."""

import numpy as np

from gaudi_calib.checkpoints.plan import ModelPlan
from gaudi_calib.engines.observe.attention import AttentionRanges
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.channels import ChannelNode, ChannelRange
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.topology import Axis


def attention_nodes(plan: ModelPlan, layer: int, seen: AttentionRanges) -> dict[str, ChannelNode]:
    """Return the channel ranges of one layer's attention ops.

    What each op sees in vllm-gaudi: prefill runs the fused op on unscaled queries;
    decode maps scale·q to blocks, multiplies with the cached keys, normalises by the
    block's own largest score (so the largest probability is 1), multiplies with the
    cached values and maps back. On Gaudi 2 the softmax denominators take the same
    two mappings. Latent attention decodes on the cached latent vectors, with absorbed
    queries, and returns to heads behind the last mapping.

    Source: vllm-gaudi `flat_pa`, `flat_pa_mla`, `pipelined_pa`, vllm_gaudi/extension/ops.py.
    """
    heads = plan.head_axis

    def per_head(name: str) -> ChannelRange:
        axis = plan.kv_axis if name in ("k", "v") else heads
        peak = seen.peaks[name]
        return ChannelRange(peak.to_array(), Axis() if name in ("latent", "latent_v") else axis, peak.to_progress())

    def scale(values: np.ndarray) -> np.ndarray:
        return round_to_bf16(round_to_bf16(values) * np.float32(seen.scale))

    latent = plan.layout.attention.latent
    query, key, value, out = (per_head(name) for name in ("q", "k", "v", "out"))
    decoded = per_head("latent_q") if latent else query
    scaled = ChannelRange(scale(decoded.values), heads, decoded.progress and decoded.progress.map(scale))
    averaged = per_head("latent_out") if latent else out
    sums, probability, weight = (per_head(name) for name in ("softmax_sum", "probability", "weight"))
    ones = ChannelRange(np.ones(1, dtype=np.float32), Axis())
    scores, block_sums = ((per_head(name),) if name in seen.peaks else None for name in ("scores", "block_sums"))
    nodes = {
        "matmul_qk": ChannelNode(Op.MATMUL, (scaled, per_head("latent") if latent else key), scores),
        "matmul_av": ChannelNode(Op.MATMUL, (weight, per_head("latent_v") if latent else value), block_sums),
        "batch2block_matmul": ChannelNode(Op.B2B_MATMUL, (ones, scaled), (scaled,), softmax_sums=sums),
        "block2batch_matmul": ChannelNode(Op.B2B_MATMUL, (ones, averaged), (averaged,), softmax_sums=sums),
        "k_cache": ChannelNode(Op.KV_CACHE, (key,)),
        "v_cache": ChannelNode(Op.KV_CACHE, (value,)),
        "fused_scaled_dot_product_attention": ChannelNode(Op.FUSED_SDPA, (query, key, value), (out, probability)),
    }
    if latent:
        nodes["latent_cache_k"] = ChannelNode(Op.KV_CACHE, (per_head("latent"),))
    return {plan.attention_node(layer, op): nodes[op] for op in plan.attention_ops if op in nodes}
