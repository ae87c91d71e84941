"""Causal attention over packed sequences, observed.

Replaces the attention function of the Hugging Face modules, so that queries, keys
and values are seen after the rotary embedding, on every family in one place. The
sequences of a batch lie one behind the other; each attends to itself only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.overrides import TorchFunctionMode

ATTENTION_NAME = "gaudi_calib"
# Bounds the memory of the score matrix: heads x queries x keys values at a time.
_MAX_SCORES = 2**22


@dataclass
class AttentionRanges:
    """What one attention layer has seen, per head, in the compute dtype.

    Attributes:
        bounds: start of every sequence in the batch now running, and its end.
        tensors: tensor name -> largest magnitude, shape (heads,) or (KV heads,):
            `q`, `k`, `v`, `out`, `probability`, `softmax_sum`,
            `weight` (what multiplies v before the sum is divided by its denominator);
            with latent attention also `latent`, `latent_v`, `latent_q` and `latent_out`.
        scale: the factor on q·k.
        chunk: queries see keys of their own chunk of so many positions only; None for all.
        latent: where the layer caches latent vectors, else None.
    """

    bounds: Sequence[int] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0
    chunk: int | None = None
    latent: "LatentCache | None" = None

    def observe(self, name: str, values: torch.Tensor) -> None:
        """Take the maximum with `values`, shape (heads,)."""
        seen = self.tensors.get(name)
        self.tensors[name] = values if seen is None else torch.maximum(seen, values)


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

    def observe(self, query: torch.Tensor, key: torch.Tensor, ranges: AttentionRanges) -> None:
        """Note what decode would see, from queries and keys of shape (heads, tokens, dim)."""
        heads, nope = query.shape[0], self._head_dim
        weight: torch.Tensor = self._expand.weight.unflatten(0, (heads, -1))  # type: ignore[operator]
        absorbed = torch.bmm(query[..., :nope], weight[:, :nope])
        rotated = torch.maximum(_max_per_head(absorbed), _max_per_head(query[..., nope:].contiguous()))
        ranges.observe("latent_q", rotated)
        value = max_magnitude(self.vectors, (0, 1)).view(1)
        ranges.observe("latent_v", value)
        ranges.observe("latent", torch.maximum(value, max_magnitude(key[0, :, nope:], (0, 1)).view(1)))


@dataclass(frozen=True)
class Scoring:
    """How scores of queries and keys are formed.

    Attributes:
        scale: factor on q·k.
        window: how many keys back a query sees, itself included; None for all.
        chunk: queries see keys of their own chunk of so many positions only; None for all.
        softcap: scores become softcap * tanh(scores / softcap).
        bias: added to the scores, broadcast over (heads, tokens, tokens); one sequence only.
        sinks: one more score per head, shape (heads,), with a value of zero.
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


def register_attention() -> None:
    """Make the observed attention selectable as `attn_implementation="gaudi_calib"`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, observed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def observed_attention(
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
    ranges: AttentionRanges = module.calibration  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, sliding_window, ranges.chunk, softcap, sinks=s_aux)
    if ranges.latent is not None:
        ranges.latent.observe(query[0], key[0], ranges)
    out = attend(query[0], key[0], value[0], ranges, scoring)
    return out.transpose(0, 1).unsqueeze(0), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: AttentionRanges, scoring: Scoring
) -> torch.Tensor:
    """Causal attention of every sequence to itself; updates `ranges`.

    Args:
        query: shape (heads, tokens, dim); key, value: (KV heads, tokens, dim).

    Returns:
        Shape (heads, tokens, dim).
    """
    ranges.scale = scoring.scale
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        ranges.observe(name, _max_per_head(tensor))
    out = torch.empty_like(query[..., : value.shape[-1]])
    for start, stop in pairwise(ranges.bounds):
        rows = max(1, min(stop - start, _MAX_SCORES // (query.shape[0] * (stop - start))))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            span = slice(start, last)
            probabilities = weigh(query[:, first:last], key[:, span], ranges, scoring)
            out[:, first:last] = _average(probabilities, value[:, span])
            if ranges.latent is not None:
                average = torch.matmul(probabilities, ranges.latent.vectors[span])
                ranges.observe("latent_out", _max_per_head(average))
    ranges.observe("out", _max_per_head(out))
    return out


def weigh(query: torch.Tensor, key: torch.Tensor, ranges: AttentionRanges, scoring: Scoring) -> torch.Tensor:
    """Probabilities, shape (heads, rows, keys), of the last `query.shape[1]` positions of the sequence."""
    heads, rows, keys = query.shape[0], query.shape[1], key.shape[1]
    scores = _score(query, key, scoring.scale).view(heads, rows, keys)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if scoring.bias is not None:
        scores = scores + scoring.bias[..., -rows:, :keys].to(scores.dtype)
    scores += _mask(rows, keys, scoring, scores)
    if scoring.sinks is not None:
        return _weigh_with_sinks(scores, scoring.sinks, ranges).to(query.dtype)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    largest = probabilities.amax(-1)
    ranges.observe("probability", largest.amax(-1))
    # The largest term of a softmax is exp(0) over the sum.
    ranges.observe("softmax_sum", largest.amin(-1).reciprocal())
    ranges.observe("weight", torch.ones(heads, device=scores.device))
    return probabilities.to(query.dtype)


def _weigh_with_sinks(scores: torch.Tensor, sinks: torch.Tensor, ranges: AttentionRanges) -> torch.Tensor:
    """Probabilities of the keys where one more score per head, the sink's, takes its share."""
    with_sink = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    # transformers' eager attention takes this softmax in the model's dtype.
    probabilities = torch.softmax(with_sink - with_sink.amax(-1, keepdim=True), dim=-1).float()
    largest, of_keys = probabilities.amax(-1), probabilities[..., :-1].amax(-1)
    ranges.observe("probability", of_keys.amax(-1))
    ranges.observe("softmax_sum", largest.amin(-1).reciprocal())
    ranges.observe("weight", (of_keys / largest).amax(-1))
    return probabilities[..., :-1]


def _average(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Probabilities times values, shape (heads, rows, dim); heads that share a value head are multiplied together."""
    heads, rows = probabilities.shape[:2]
    grouped = probabilities.unflatten(0, (value.shape[0], -1))
    if probabilities.dtype is torch.float32:
        return torch.bmm(grouped.flatten(1, 2), value).view(heads, rows, -1)
    return torch.matmul(grouped, value.unsqueeze(1)).flatten(0, 1)


def _score(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled q·k; the query heads that share a key head are multiplied with it together.

    In bfloat16, head by head and scaled afterwards, which rounds as transformers' eager attention does.
    """
    grouped = query.unflatten(0, (key.shape[0], -1))
    if query.dtype is torch.float32:
        return torch.bmm((grouped * scale).flatten(1, 2), key.transpose(-2, -1))
    return torch.matmul(grouped, key.unsqueeze(1).transpose(-2, -1)).mul_(scale)


def _mask(rows: int, keys: int, scoring: Scoring, scores: torch.Tensor) -> torch.Tensor:
    """-inf where a query must not see a key, else 0; the queries are the last `rows` positions."""
    queries = torch.arange(keys - rows, keys, device=scores.device)[:, None]
    distance = queries - torch.arange(keys, device=scores.device)
    hidden = distance < 0
    if scoring.window is not None:
        hidden |= distance >= scoring.window
    if scoring.chunk is not None:
        hidden |= distance > queries % scoring.chunk
    return torch.zeros_like(distance, dtype=scores.dtype).masked_fill_(hidden, float("-inf"))


def max_magnitude(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Largest magnitude over `dims`; two reductions are faster than one over a copy of magnitudes."""
    return torch.maximum(tensor.amax(dims), -tensor.amin(dims))


def _max_per_head(tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitude per head of (heads, tokens, dim), whichever way it lies in memory."""
    if tensor.is_contiguous():
        return max_magnitude(tensor, (1, 2))
    by_channel = max_magnitude(tensor.transpose(0, 1).flatten(1), (0,))
    return by_channel.unflatten(0, (tensor.shape[0], -1)).amax(1)


class SdpaInterceptor(TorchFunctionMode):
    """Routes `scaled_dot_product_attention` to `attend`, for modules without an attention interface.

    Attributes:
        ranges: of the layer now running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ranges = AttentionRanges()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        bias = kwargs.get("attn_mask")
        with torch._C.DisableTorchFunction():
            scoring = Scoring(scale, bias=None if bias is None else bias[0])
            out = attend(query[0], key[0], value[0], self.ranges, scoring)
        return out.unsqueeze(0)
