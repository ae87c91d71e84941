"""What one attention layer has seen, and its softmax, for both engines."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gaudi_calib.engines.observe.peak import Peak, max_magnitude

# Keys in a block of vllm-gaudi's cache: decode multiplies with the values of one block at a time.
_BLOCK = 128
# Bounds the memory of the score matrix: heads x queries x keys values at a time.
MAX_SCORES = 2**22


@dataclass
class AttentionRanges:
    """What one attention layer has seen, per head.

    Attributes:
        peaks: by tensor, of shape (heads,) or (KV heads,): `q`, `k`, `v`, `out`, `probability`, `softmax_sum`,
            `weight` (what multiplies v before the sum is divided by its denominator);
            with latent attention also `latent`, `latent_v`, `latent_q` and `latent_out`;
            where asked for, `scores` and `block_sums`, what the two matmuls of decode return.
        scale: the factor on q·k.
    """

    peaks: dict[str, Peak] = field(default_factory=dict)
    scale: float = 1.0

    def take(self, name: str, values: torch.Tensor) -> None:
        """Take in magnitudes of a tensor, shape (heads,)."""
        self.peaks.setdefault(name, Peak()).take(values)

    def take_samples(self, name: str, values: torch.Tensor) -> None:
        """Take in magnitudes of a tensor in each of the samples that follow, shape (samples, heads)."""
        self.peaks.setdefault(name, Peak()).take_samples(values)

    def take_sample(self, seen: "AttentionRanges") -> None:
        """Take in what was seen of one sample, the one that follows."""
        for name, peak in seen.peaks.items():
            assert peak.values is not None
            self.take_samples(name, peak.values[None])


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


def split_queries(heads: int, start: int, stop: int, keys: int) -> Iterator[slice]:
    """Yield the queries from `start` to `stop` in groups that are scored at a time."""
    rows = max(1, MAX_SCORES // (heads * keys))
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


def weigh(
    query: torch.Tensor,
    key: torch.Tensor,
    ranges: AttentionRanges,
    scoring: Scoring,
    cached: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities, shape (heads, rows, keys), of the last `query.shape[1]` positions of the sequence.

    Args:
        query: shape (heads, rows, dim); key: (KV heads, keys, dim), from the start of the sequence.
        cached: what decode multiplies with the weights of `keys`, shape (KV heads, keys, dim), where the
            outputs of its matmuls are to be observed.
    """
    heads, rows, keys = query.shape[0], query.shape[1], key.shape[1]
    scores = _score(query, key, scoring.scale).view(heads, rows, keys)
    mask = _mask(rows, keys, scoring, scores)
    if cached is not None:
        ranges.take("scores", max_magnitude(scores.masked_fill(mask < 0, 0), (1, 2)))
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if scoring.bias is not None:
        scores = scores + scoring.bias[..., -rows:, :keys].to(scores.dtype)
    scores += mask
    if cached is not None:
        _observe_blocks(scores, cached, scoring.sinks, ranges)
    if scoring.sinks is not None:
        return _weigh_with_sinks(scores, scoring.sinks, ranges).to(query.dtype)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    largest = probabilities.amax(-1)
    ranges.take("probability", largest.amax(-1))
    # The largest term of a softmax is exp(0) over the sum.
    ranges.take("softmax_sum", largest.amin(-1).reciprocal())
    ranges.take("weight", torch.ones(heads, device=scores.device))
    return probabilities.to(query.dtype)


def _observe_blocks(
    scores: torch.Tensor, cached: torch.Tensor, sinks: torch.Tensor | None, ranges: AttentionRanges
) -> None:
    """Take in what the second matmul of decode returns: sums over the keys of a block, not normalised yet.

    Source: vllm-gaudi `pipelined_pa`, vllm_gaudi/extension/ops.py.
    """
    for part, values in zip(scores.split(_BLOCK, dim=-1), cached.split(_BLOCK, dim=1), strict=True):
        highest = part.amax(-1, keepdim=True)
        if sinks is not None:
            highest = torch.maximum(highest, sinks.to(part.dtype).view(-1, 1, 1))
        weights = (part - highest.clamp_(min=torch.finfo(part.dtype).min)).exp_()  # a block may be hidden as a whole
        ranges.take("block_sums", max_magnitude(average(weights, values), (1, 2)))


def average(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Weights times values, shape (heads, rows, dim); heads that share a value head are multiplied together."""
    heads, rows = weights.shape[:2]
    grouped = weights.unflatten(0, (value.shape[0], -1))
    if weights.dtype is torch.float32:
        return torch.bmm(grouped.flatten(1, 2), value).view(heads, rows, -1)
    return torch.matmul(grouped, value.unsqueeze(1)).flatten(0, 1)


def _weigh_with_sinks(scores: torch.Tensor, sinks: torch.Tensor, ranges: AttentionRanges) -> torch.Tensor:
    """Probabilities of the keys where one more score per head, the sink's, takes its share."""
    with_sink = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    # transformers' eager attention takes this softmax in the model's dtype.
    probabilities = torch.softmax(with_sink - with_sink.amax(-1, keepdim=True), dim=-1).float()
    largest, of_keys = probabilities.amax(-1), probabilities[..., :-1].amax(-1)
    ranges.take("probability", of_keys.amax(-1))
    ranges.take("softmax_sum", largest.amin(-1).reciprocal())
    ranges.take("weight", (of_keys / largest).amax(-1))
    return probabilities[..., :-1]


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
