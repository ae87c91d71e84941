"""Attention layers whose inputs, cache and output went through FP8.

    prefill   fused op: q, k, v and its output in FP8
    decode    batch2block and matmul_qk: scale·q; block2batch: the output; both: cached k and v
    cache     k and v, before they are cached

vLLM's kernel reads keys and values from the cache, so they are rounded once, by the cache's
scale; where the caches are blocked, by that of the fused op. Not emulated, because kernels
do not show them: the rounding of probabilities (`matmul_av.inputs[0]`, the fused op's amax),
of single blocks' results before they are added up, and of softmax denominators (Gaudi 2).

Dynamic methods leave the fused op alone: a prompt attends in bfloat16. What is cached has a scale per token and head;
other matmuls are scaled over the tokens of a pass. Not emulated: that keys and values of a prompt are rounded only
for what comes after it, and that values are rounded once more, by block.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from gaudi_calib.config.model import QuantConfig
from gaudi_calib.engines.observe.fp8_cast import pass_through
from gaudi_calib.engines.vllm_plugin.attention import find_metadata
from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, stand_in
from gaudi_calib.engines.vllm_plugin.sequences import Sequences
from gaudi_calib.errors import ConfigError
from gaudi_calib.fp8 import HP_DTYPES
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import ATTENTION_OPS, Op, ScaleNode

_SHAPES = {Op.MATMUL: (2, None), Op.B2B_MATMUL: (2, 1), Op.KV_CACHE: (1, None), Op.FUSED_SDPA: (3, 2)}
_FUSED = "fused_scaled_dot_product_attention"
# The dimension of (tokens, heads, channels) whose values share a scale where a dynamic method has one per channel:
# INC takes rows of a matmul's first input, columns of its second.
_DIMS = {"batch2block_matmul": 0, "block2batch_matmul": 0}

Scaler = Callable[[torch.Tensor], float | torch.Tensor]


class QuantizedAttention:
    """Stands in for `forward` of one of vLLM's attention layers."""

    def __init__(
        self, layer: Attention, names: Mapping[str, str], scales: Mapping[str, ScaleNode], source: ScaleSource
    ):
        """Take names and scales of the layer's ops by their short names; ops without scales stay in bfloat16."""
        self.layer, self.device = layer, source.device

        def enter(op: str, index: int) -> list[Scaler]:
            """Return what scales an input of `op`, nothing where it is not quantized."""
            if op not in scales:
                return []
            stored, layer_type = scales[op].inputs[index], find_layer_type(names[op], ATTENTION_OPS[op])
            return [lambda x: source.scale_input(x, stored, names[op], layer_type, dim=_DIMS.get(op, -1))]

        # Where both caches are blocked, the fused op rounds keys and values.
        self._key = enter("k_cache", 0) or enter(_FUSED, 1)
        self._value = enter("v_cache", 0) or enter(_FUSED, 2)
        self._prefill_query = enter(_FUSED, 0)
        self._decode_query = enter("batch2block_matmul", 1) + enter("matmul_qk", 0)
        self._prefill_out: list[Scaler] = [lambda _: float(scales[_FUSED].outputs[0])] if _FUSED in scales else []
        self._decode_out = enter("block2batch_matmul", 1)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        layer = self.layer
        metadata = find_metadata(layer.layer_name)
        if metadata is None:
            return type(layer).forward(layer, query, key, value, *args, **kwargs)
        decoded = Sequences.from_metadata(metadata).find_decodes().nonzero().flatten().to(query.device)
        factor = float(layer.impl.scale)
        query = self._round_rows(query, decoded, self._prefill_query, self._decode_query, factor)
        if key is not None and value is not None:
            key = self._round(key, layer.num_kv_heads, self._key)
            value = self._round(value, layer.num_kv_heads, self._value)
        out = type(layer).forward(layer, query, key, value, *args, **kwargs)
        return self._round_rows(out, decoded, self._prefill_out, self._decode_out)

    def _round_rows(
        self, x: torch.Tensor, decoded: torch.Tensor, prefill: list[Scaler], decode: list[Scaler], factor: float = 1.0
    ) -> torch.Tensor:
        """Round tokens of prompts one way, `decoded` ones, which are multiplied with `factor` before, another."""
        rounded = self._round(x, self.layer.num_heads, prefill)
        if not len(decoded):
            return rounded
        scaled = self._round((x[decoded] * factor).to(x.dtype), self.layer.num_heads, decode)
        return rounded.index_copy(0, decoded, (scaled.float() / factor).to(x.dtype))

    def _round(self, x: torch.Tensor, heads: int, scalers: list[Scaler]) -> torch.Tensor:
        """Pass `x`, of shape (tokens, ...), through FP8, once for each of `scalers`."""
        by_head = x.reshape(len(x), heads, -1)
        for scale in scalers:
            by_head = pass_through(by_head, scale(by_head), self.device)
        return by_head.reshape(x.shape)


def quantize_attention(layer: Attention, source: ScaleSource) -> None:
    """Make `layer` compute in FP8, as far as the config does not block its ops.

    Raises:
        ConfigError: vLLM is to quantize its cache itself.
        RangeError: an op that is not blocked was not measured.
    """
    config = source.session.config
    names = {op: f"{layer.layer_name}.impl.{op}" for op in _list_ops(layer.layer_name, config)}
    if not names:
        return
    _require_plain_cache(layer, source)
    found = source.find({name: stand_in(*_SHAPES[ATTENTION_OPS[op]]) for op, name in names.items()})
    scales = {op: found[name] for op, name in names.items() if name in found}
    layer.forward = QuantizedAttention(layer, names, scales, source)  # type: ignore[method-assign]


def _require_plain_cache(layer: Attention, source: ScaleSource) -> None:
    if layer.kv_cache_dtype not in ("auto", *HP_DTYPES):
        raise ConfigError(
            f"--kv-cache-dtype {layer.kv_cache_dtype} does not go with quantization gaudi_fp8",
            where=source.session.path,
            why="keys and values are rounded by their own scales before vLLM caches them",
            fix="leave --kv-cache-dtype out",
        )


def _list_ops(layer: str, config: QuantConfig) -> list[str]:
    """Ops that INC would quantize; softmax is patched and never called."""
    return [
        op
        for op, kind in ATTENTION_OPS.items()
        if kind in _SHAPES and not config.is_blocked(f"{layer}.impl.{op}", find_layer_type(f"{layer}.impl.{op}", kind))
    ]
