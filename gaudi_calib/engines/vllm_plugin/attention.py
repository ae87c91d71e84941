"""Attention layers, observed."""

from itertools import pairwise
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention

from gaudi_calib.engines.observe.attention import AttentionRanges, Scoring, split_queries, weigh
from gaudi_calib.engines.observe.peak import max_magnitude
from gaudi_calib.engines.vllm_plugin.sequences import KeyHistory, Sequences
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.fp8 import GAUDI2


def find_metadata(layer: str) -> Any:
    """Return what vLLM's model runner says about the pass now running, for `layer`; None in passes of its own."""
    if not is_forward_context_available():
        return None
    metadata: Any = get_forward_context().attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    return metadata.get(layer) if isinstance(metadata, dict) else metadata


class ObservedAttention:
    """Stands in for `forward` of one of vLLM's attention layers: computes the same and notes ranges.

    Queries, keys, values and the output are vLLM's own. Softmax denominators, which Gaudi 2
    sends through its block matmuls and no kernel gives away, are computed again in plain
    torch; Gaudi 3 has no use for them.

    Attributes:
        ranges: what was seen, per head of this rank.
    """

    def __init__(self, layer: Attention, session: Session):
        self.layer, self.session = layer, session
        self._needs_sums = session.device is GAUDI2
        self.ranges = AttentionRanges()
        self._history = KeyHistory()
        self._cache_config = get_current_vllm_config().cache_config

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        layer = self.layer
        out = type(layer).forward(layer, query, key, value, *args, **kwargs)
        metadata = find_metadata(layer.layer_name)
        if metadata is not None and self.session.is_live():
            sequences = Sequences.from_metadata(metadata)
            heads = {"q": layer.num_heads, "k": layer.num_kv_heads, "v": layer.num_kv_heads, "out": layer.num_heads}
            tensors = zip(heads.items(), (query, key, value, out), strict=True)
            self._observe({name: _split(x, count, sequences.tokens) for (name, count), x in tensors}, sequences)
        return out

    def reset(self) -> None:
        """Forget what was seen; cached keys stay."""
        self.ranges = AttentionRanges()

    def _observe(self, tensors: dict[str, torch.Tensor], sequences: Sequences) -> None:
        impl = self.layer.impl
        self.ranges.scale = impl.scale
        for name, tensor in tensors.items():
            self.ranges.take(name, max_magnitude(tensor, (0, 2)))
        query, key = tensors["q"], tensors["k"]
        sinks = getattr(impl, "sinks", None)
        if not self._needs_sums and sinks is None:
            # Every sequence begins with a token that sees itself alone: the largest probability is 1.
            _observe_bound(self.ranges, query[0], 1)
        elif sequences.slots is None or getattr(impl, "alibi_slopes", None) is not None:
            _observe_bound(self.ranges, query[0], max(sequences.lengths))
        else:
            self._history.store(key, sequences.slots[: sequences.tokens])
            softcap = getattr(impl, "logits_soft_cap", None) or None  # vLLM has 0 for none
            scoring = Scoring(impl.scale, window=self.layer.sliding_window, softcap=softcap, sinks=sinks)
            self._observe_scores(query, sequences, scoring)

    def _observe_scores(self, query: torch.Tensor, sequences: Sequences, scoring: Scoring) -> None:
        """Take in the softmax of every token, of queries of shape (tokens, heads, dim)."""
        for index, (start, stop) in enumerate(pairwise(sequences.starts)):
            if start == stop:
                continue
            slots, length = sequences.find_slots(index, self._cache_config.block_size), sequences.lengths[index]
            if slots is None:
                # No term of a denominator is larger than 1, so it is at most the number of keys.
                _observe_bound(self.ranges, query[0], length)
                continue
            keys = self._history.fetch(slots).float()
            for rows in split_queries(query.shape[1], start, stop, length):
                seen = keys[:, : length - (stop - rows.stop)]
                weigh(query[rows].transpose(0, 1).float(), seen, self.ranges, scoring)


def _split(tensor: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """Shape (tokens, heads, dim), without padding."""
    return tensor.reshape(tensor.shape[0], heads, -1)[:tokens]


def _observe_bound(ranges: AttentionRanges, query: torch.Tensor, keys: int) -> None:
    """Take in what no softmax over `keys` keys exceeds, for a query of shape (heads, dim)."""
    ones = torch.ones(query.shape[0], device=query.device)
    ranges.take("probability", ones)
    ranges.take("weight", ones)
    ranges.take("softmax_sum", ones * keys)
