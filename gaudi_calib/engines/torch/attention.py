"""Causal attention of sequences that lie one behind the other; each attends to itself only.

Replaces the attention function of the Hugging Face modules, so that queries, keys
and values are seen after the rotary embedding, on every family in one place.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gaudi_calib.engines.observe.attention import AttentionRanges, Scoring, average, split_queries, weigh
from gaudi_calib.engines.observe.peak import max_per_head
from gaudi_calib.engines.torch.sequences import Sequences

ATTENTION_NAME = "gaudi_calib"
# Attribute of a Hugging Face attention module that holds its `PackedAttention`.
_PACKED = "gaudi_calib_packed"


class LatentCache:
    """The latent vectors of multi-head latent attention, from which keys and values expand.

    Decode multiplies queries with the expanding weight instead (absorbed queries) and
    attends to the cached vectors themselves.

    Attributes:
        vectors: of the batch now running, after their norm, shape (tokens, rank).
    """

    def __init__(self, expand: torch.nn.Module, head_dim: int):
        """Watch `expand`, which turns latent vectors into keys (first `head_dim` rows of a head) and values."""
        self.vectors = torch.empty(0)
        self._expand, self._head_dim = expand, head_dim
        self.detach = expand.register_forward_pre_hook(self._note).remove

    def _note(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.vectors = args[0].reshape(-1, args[0].shape[-1])

    def observe(self, query: torch.Tensor, key: torch.Tensor, sequences: Sequences, ranges: AttentionRanges) -> None:
        """Note what decode would see, from queries and keys of shape (heads, tokens, dim)."""
        heads, nope = query.shape[0], self._head_dim
        weight: torch.Tensor = self._expand.weight.unflatten(0, (heads, -1))  # type: ignore[operator]
        absorbed = torch.bmm(query[..., :nope], weight[:, :nope])
        rotated = sequences.max_per_head(query[..., nope:])
        ranges.take_samples("latent_q", torch.maximum(sequences.max_per_head(absorbed), rotated))
        value = sequences.max_magnitudes(self.vectors)
        ranges.take_samples("latent_v", value)
        ranges.take_samples("latent", torch.maximum(value, sequences.max_magnitudes(key[0, :, nope:])))


@dataclass
class PackedAttention:
    """The attention of one layer.

    Attributes:
        chunk: queries see keys of their own chunk of so many positions only; None for all.
        sequences: those of the batch now running.
        latent: watches the latent vectors, where the layer caches such and somebody wants to know.
        outputs: observe the outputs of the matmuls, too.
        ranges: what was seen.
    """

    chunk: int | None = None
    sequences: Sequences = field(default_factory=Sequences)
    latent: LatentCache | None = None
    outputs: bool = False
    ranges: AttentionRanges = field(default_factory=AttentionRanges)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Return the attention of every sequence to itself, shape (heads, tokens, dim).

        Args:
            query: shape (heads, tokens, dim); key, value: (KV heads, tokens, dim).
        """
        ranges = self.ranges
        ranges.scale = scoring.scale
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            ranges.take_samples(name, self.sequences.max_per_head(tensor))
        out = torch.empty_like(query[..., : value.shape[-1]])
        for start, stop in pairwise(self.sequences.bounds):
            seen = AttentionRanges()
            for rows in split_queries(query.shape[0], start, stop, stop - start):
                span = slice(start, rows.stop)
                cached = self._find_cached(value, span) if self.outputs else None
                probabilities = weigh(query[:, rows], key[:, span], seen, scoring, cached)
                out[:, rows] = average(probabilities, value[:, span])
                if self.latent is not None:
                    averaged = torch.matmul(probabilities, self.latent.vectors[span])
                    seen.take("latent_out", max_per_head(averaged))
            ranges.take_sample(seen)
        ranges.take_samples("out", self.sequences.max_per_head(out))
        return out

    def _find_cached(self, value: torch.Tensor, span: slice) -> torch.Tensor:
        """What decode has in its cache for values, shape (KV heads, keys, dim)."""
        return value[:, span] if self.latent is None else self.latent.vectors[None, span]


def attach_attention(module: Any, layer: int) -> PackedAttention:
    """Return the attention that `module`, of the layer with this index, will compute."""
    kinds = getattr(module.config, "layer_types", None) or ()  # config.json may leave them out
    is_chunked = layer < len(kinds) and kinds[layer] == "chunked_attention"
    packed = PackedAttention(int(module.config.attention_chunk_size) if is_chunked else None)
    setattr(module, _PACKED, packed)
    return packed


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION_NAME` select the attention that was attached to a module."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in the form transformers calls it: (1, heads, tokens, dim) in, (1, tokens, heads, dim) out."""
    packed: PackedAttention = getattr(module, _PACKED)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, sliding_window, packed.chunk, softcap, sinks=s_aux)
    if packed.latent is not None:
        packed.latent.observe(query[0], key[0], packed.sequences, packed.ranges)
    out = packed.attend(query[0], key[0], value[0], scoring)
    return out.transpose(0, 1).unsqueeze(0), None


class SdpaInterceptor(TorchFunctionMode):
    """Routes `scaled_dot_product_attention` to `attention`, for modules without an attention interface."""

    def __init__(self, attention: PackedAttention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        bias = kwargs.get("attn_mask")
        with torch._C.DisableTorchFunction():
            scoring = Scoring(scale, bias=None if bias is None else bias[0])
            out = self.attention.attend(query[0], key[0], value[0], scoring)
        return out.unsqueeze(0)
