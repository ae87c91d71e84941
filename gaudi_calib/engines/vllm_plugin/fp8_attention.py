"""Attention layers whose inputs, cache and output went through FP8.

    prefill   fused op: q, k, v and its output in FP8
    decode    batch2block and matmul_qk: scale·q; block2batch: the output; both: cached k and v
    cache     k and v, before they are cached

vLLM's kernel reads keys and values from the cache, so they are rounded once, by the cache's
scale; where the caches are blocked, by that of the fused op. Not emulated, because kernels
do not show them: the rounding of probabilities (`matmul_av.inputs[0]`, the fused op's amax),
of single blocks' results before they are added up, and of softmax denominators (Gaudi 2).
"""

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


class QuantizedAttention:
    """Stands in for `forward` of one of vLLM's attention layers."""

    def __init__(self, layer: Attention, scales: dict[str, ScaleNode], source: ScaleSource):
        """Take the scales of the layer's ops by their short names; ops that are missing stay in bfloat16."""
        self.layer, self.device = layer, source.device

        def find_input(op: str, index: int) -> float | None:
            return scales[op].inputs[index] if op in scales else None

        # Where both caches are blocked, the fused op rounds keys and values.
        self._key = find_input("k_cache", 0) or find_input(_FUSED, 1)
        self._value = find_input("v_cache", 0) or find_input(_FUSED, 2)
        self._prefill_query = find_input(_FUSED, 0)
        self._decode_query = find_input("batch2block_matmul", 1), find_input("matmul_qk", 0)
        self._prefill_out = float(scales[_FUSED].outputs[0]) if _FUSED in scales else None
        self._decode_out = find_input("block2batch_matmul", 1)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        layer = self.layer
        metadata = find_metadata(layer.layer_name)
        if metadata is None:
            return type(layer).forward(layer, query, key, value, *args, **kwargs)
        decodes = Sequences.from_metadata(metadata).find_decodes()
        query = self._round_query(query, decodes)
        if key is not None and value is not None:
            key, value = self._round(key, self._key), self._round(value, self._value)
        out = type(layer).forward(layer, query, key, value, *args, **kwargs)
        return _select(decodes, self._round(out, self._decode_out), self._round(out, self._prefill_out))

    def _round_query(self, query: torch.Tensor, decodes: torch.Tensor) -> torch.Tensor:
        prefill = self._round(query, self._prefill_query)
        if not bool(decodes.any()):
            return prefill
        factor = float(self.layer.impl.scale)
        scaled = self._round((query * factor).to(query.dtype), *self._decode_query)
        return _select(decodes, (scaled.float() / factor).to(query.dtype), prefill)

    def _round(self, x: torch.Tensor, *scales: float | None) -> torch.Tensor:
        for scale in scales:
            if scale is not None:
                x = pass_through(x, scale, self.device)
        return x


def quantize_attention(layer: Attention, source: ScaleSource) -> None:
    """Make `layer` compute in FP8, as far as the config does not block its ops.

    Raises:
        ConfigError: the config asks for dynamic quantization of attention, or vLLM is to quantize its cache itself.
        RangeError: an op that is not blocked was not measured.
    """
    config = source.session.config
    names = {op: f"{layer.layer_name}.impl.{op}" for op in _list_ops(layer.layer_name, config)}
    if not names:
        return
    _require_plain_cache(layer, source)
    if source.is_dynamic:
        raise ConfigError(
            "dynamic quantization of attention is not supported by quantization gaudi_fp8",
            where=source.session.path,
            why=f"it does not block {', '.join(names)}",
            fix='add "Matmul", "B2BMatmul" and "VLLMKVCache" to blocklist.types, as the presets do',
        )
    found = source.find({name: stand_in(*_SHAPES[ATTENTION_OPS[op]]) for op, name in names.items()})
    scales = {op: found[name] for op, name in names.items() if name in found}
    layer.forward = QuantizedAttention(layer, scales, source)  # type: ignore[method-assign]


def _require_plain_cache(layer: Attention, source: ScaleSource) -> None:
    if layer.kv_cache_dtype not in ("auto", *HP_DTYPES):
        raise ConfigError(
            f"--kv-cache-dtype {layer.kv_cache_dtype} does not go with quantization gaudi_fp8",
            where=source.session.path,
            why="keys and values are rounded by their own scales before vLLM caches them",
            fix="leave --kv-cache-dtype out",
        )


def _list_ops(layer: str, config: QuantConfig) -> list[str]:
    """Ops that INC would quantize; softmax is patched and never called, and the fused op is static only."""
    called = {op: kind for op, kind in ATTENTION_OPS.items() if kind in _SHAPES}
    if config.dynamic_quantization:
        called.pop(_FUSED)
    return [
        op
        for op, kind in called.items()
        if not config.is_blocked(f"{layer}.impl.{op}", find_layer_type(f"{layer}.impl.{op}", kind))
    ]


def _select(mask: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Rows of `chosen` where `mask`, shape (tokens,), else of `other`; rows beyond are padding."""
    if chosen is other:
        return other
    out = other.clone()
    rows = mask.nonzero().flatten().to(out.device)
    out[rows] = chosen[rows]
    return out
