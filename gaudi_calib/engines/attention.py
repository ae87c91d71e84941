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
            `q`, `k`, `v`, `out`, `probability`, `softmax_sum`.
        scale: the factor on q·k.
    """

    bounds: Sequence[int] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0

    def observe(self, name: str, values: torch.Tensor) -> None:
        """Take the maximum with `values`, shape (heads,)."""
        seen = self.tensors.get(name)
        self.tensors[name] = values if seen is None else torch.maximum(seen, values)


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
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in the form transformers calls it: (1, heads, tokens, dim) in, (1, tokens, heads, dim) out."""
    ranges: AttentionRanges = module.calibration  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query[0], key[0], value[0], ranges, scale, sliding_window, softcap)
    return out.transpose(0, 1).unsqueeze(0), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: AttentionRanges,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence in `ranges.bounds`, and its ranges.

    Args:
        query: shape (heads, tokens, dim); key, value: (KV heads, tokens, dim).
        window: how many keys back a query sees, itself included; None for all.
        softcap: scores become softcap * tanh(scores / softcap).
        bias: added to the scores, broadcast over (heads, tokens, tokens); one sequence only.

    Returns:
        Shape (heads, tokens, dim).
    """
    ranges.scale = scale
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        ranges.observe(name, _max_per_head(tensor))
    out = torch.empty_like(query[..., : value.shape[-1]])
    for start, stop in pairwise(ranges.bounds):
        rows = max(1, min(stop - start, _MAX_SCORES // (query.shape[0] * (stop - start))))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            out[:, first:last] = _attend_rows(
                query[:, first:last], key[:, start:last], value[:, start:last], ranges, scale, window, softcap, bias
            )
    ranges.observe("out", _max_per_head(out))
    return out


def _attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: AttentionRanges,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last `query.shape[1]` positions of the sequence whose keys are given."""
    heads, rows, keys = query.shape[0], query.shape[1], key.shape[1]
    scores = _score(query, key, scale).view(heads, rows, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias[..., -rows:, :keys].to(scores.dtype)
    scores += _mask(rows, keys, window, scores)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    largest = probabilities.amax(-1)
    ranges.observe("probability", largest.amax(-1))
    # The largest term of a softmax is exp(0) over the sum.
    ranges.observe("softmax_sum", largest.amin(-1).reciprocal())
    probabilities = probabilities.to(query.dtype).unflatten(0, (key.shape[0], -1))
    if query.dtype is torch.float32:
        return torch.bmm(probabilities.flatten(1, 2), value).view(heads, rows, -1)
    return torch.matmul(probabilities, value.unsqueeze(1)).flatten(0, 1)


def _score(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled q·k; the query heads that share a key head are multiplied with it together.

    In bfloat16, head by head and scaled afterwards, which rounds as transformers' eager attention does.
    """
    grouped = query.unflatten(0, (key.shape[0], -1))
    if query.dtype is torch.float32:
        return torch.bmm((grouped * scale).flatten(1, 2), key.transpose(-2, -1))
    return torch.matmul(grouped, key.unsqueeze(1).transpose(-2, -1)).mul_(scale)


def _mask(rows: int, keys: int, window: int | None, scores: torch.Tensor) -> torch.Tensor:
    """-inf where a query must not see a key, else 0; the queries are the last `rows` positions."""
    distance = torch.arange(keys - rows, keys, device=scores.device)[:, None] - torch.arange(keys, device=scores.device)
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
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
            out = attend(query[0], key[0], value[0], self.ranges, scale, bias=None if bias is None else bias[0])
        return out.unsqueeze(0)
