"""Observing linear layers: per-channel inputs, and the partial products of row parallelism."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from gaudi_calib.engines.observe.attention import max_magnitude
from gaudi_calib.errors import RangeError

# Tokens whose partial products are formed together; bounds their memory.
_CHUNK = 1024


class Scratch:
    """Memory that layers use in turn: getting fresh memory takes longer than filling it."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor; it is overwritten after the next call."""
        size = math.prod(shape)
        if self._flat.numel() < size or self._flat.dtype is not dtype:
            self._flat = torch.empty(size, dtype=dtype)
        return self._flat[:size].view(shape)


@dataclass
class LinearRanges:
    """What one linear node has seen.

    Attributes:
        seen: largest input magnitude, shape (in,) where ranks split the input, else (1,); or None.
        products: world -> range of the partial products, without bias: one value for all
            ranks, which reduce them first, or one per rank.
    """

    seen: torch.Tensor | None = None
    products: dict[int, tuple[float, ...]] = field(default_factory=dict)
    detach: Callable[[], None] = lambda: None

    def observe(self, x: torch.Tensor, *, per_channel: bool) -> None:
        """Take in an input of shape (..., in)."""
        if per_channel:
            values = max_magnitude(x.flatten(0, -2), (0,))
        else:  # every rank sees all channels; one pass over memory is several times faster
            lowest, highest = torch.aminmax(x)
            values = torch.maximum(highest, -lowest).view(1)
        self.seen = values if self.seen is None else torch.maximum(self.seen, values)


def observe_input(module: nn.Module) -> LinearRanges:
    """Watch the input of a layer that every rank feeds with all of it."""
    ranges = LinearRanges()
    handle = module.register_forward_pre_hook(lambda module, args: ranges.observe(args[0], per_channel=False))
    ranges.detach = handle.remove
    return ranges


def observe_row_parallel(
    module: nn.Module, worlds: Sequence[int], scratch: Scratch, *, reduces: bool = True
) -> LinearRanges:
    """Watch a row-parallel layer's input and its partial products over each of `worlds`.

    With `reduces`, a partial product's range is that of the elementwise maximum over
    the ranks, as INC all-reduces with MAX before it observes the magnitude
    (`PatchedRowParallelLinear.forward_measure_reduce`); without, each rank has its own
    (`forward_measure_no_reduce`).

    In float32 the product, and those of coarser worlds, are formed as sums of the
    finest partial products, at no extra multiplications; in bfloat16, where sums
    round, each is formed on its own, as the devices would.
    """
    ranges = LinearRanges()
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    sums = weight.dtype is torch.float32
    chains = chain_worlds(worlds) if sums else [[world] for world in worlds if world > 1]

    def observe(world: int, parts: torch.Tensor) -> None:
        before = ranges.products.get(world, (0.0,) * (1 if reduces else world))
        if reduces:
            ranges.products[world] = (max_signed(parts, before[0]),)
        else:
            largest = (_max_product(part) for part in parts)
            ranges.products[world] = tuple(max(pair) for pair in zip(before, largest, strict=True))

    def forward(x: torch.Tensor) -> torch.Tensor:
        ranges.observe(x, per_channel=True)
        flat = x.flatten(0, -2)
        parts = [_observe_products(flat, weight, chain, observe, scratch) for chain in chains]
        exact = not sums or not parts
        product = flat @ weight.T if exact else parts[0]
        observe(1, product.unsqueeze(0))
        if exact and bias is not None:
            return nn.functional.linear(x, weight, bias)
        return (product if bias is None else product.add_(bias)).unflatten(0, x.shape[:-1])

    module.forward = forward
    ranges.detach = lambda: module.__dict__.pop("forward")
    return ranges


def chain_worlds(worlds: Sequence[int]) -> list[list[int]]:
    """Group worlds > 1 so that in each group every world divides the one before it.

    >>> chain_worlds([1, 2, 3, 4, 8])
    [[8, 4, 2], [3]]
    """
    chains: list[list[int]] = []
    for world in sorted({world for world in worlds if world > 1}, reverse=True):
        for chain in chains:
            if chain[-1] % world == 0:
                chain.append(world)
                break
        else:
            chains.append([world])
    return chains


def _observe_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    chain: Sequence[int],
    observe: Callable[[int, torch.Tensor], None],
    scratch: Scratch,
) -> torch.Tensor:
    """Form x @ weight.T as the sum of partial products over `chain[0]` ranks, and note their ranges.

    One batched product over all ranks is faster than one product per rank: each core takes whole ranks.
    """
    tokens, width, rows = x.shape[0], x.shape[1] // chain[0], weight.shape[0]
    weight_by_rank = weight.unflatten(1, (chain[0], width)).permute(1, 2, 0)
    product = x.new_empty(tokens, rows)
    for start in range(0, tokens, _CHUNK):
        chunk = x[start : start + _CHUNK]
        parts = scratch.take((chain[0], chunk.shape[0], rows), x.dtype)
        torch.bmm(chunk.unflatten(1, (chain[0], width)).transpose(0, 1), weight_by_rank, out=parts)
        for world in chain:
            parts = sum_neighbours(parts, world)
            observe(world, parts)
        product[start : start + _CHUNK] = sum_neighbours(parts, 1)[0]
    return product


def require_finite_weight(node: str, ranges: torch.Tensor) -> None:
    """Raise RangeError where the weight ranges of `node` are not finite."""
    if not torch.isfinite(ranges).all():
        raise RangeError(
            f"{node} has NaN or infinity in its weight",
            why="the checkpoint is damaged, or was converted wrongly",
            fix="download or convert the checkpoint again",
        )


def _max_product(part: torch.Tensor) -> float:
    lowest, highest = torch.aminmax(part)
    return max(float(highest), -float(lowest))


def sum_neighbours(parts: torch.Tensor, world: int) -> torch.Tensor:
    """Sum consecutive ranks' partial products, shape (ranks, tokens, rows), in place down to `world` ranks."""
    step = parts.shape[0] // world
    total = parts[::step]
    for offset in range(1, step):
        total.add_(parts[offset::step])
    return total


def max_signed(parts: torch.Tensor, floor: float) -> float:
    """Largest magnitude of the elementwise maximum over ranks of `parts`, or `floor` where that is larger.

    The maximum of the elementwise maximum is the maximum of all values. Its minimum
    matters only where some element is very negative on every rank at once, which the
    ranks' own minima nearly always exclude, without forming the elementwise maximum.

    Args:
        parts: partial products, shape (ranks, tokens, rows).
        floor: the largest seen before.
    """
    extremes = [torch.aminmax(part) for part in parts]
    largest = max(floor, *(float(extreme.max) for extreme in extremes))
    if max(float(extreme.min) for extreme in extremes) < -largest:
        largest = max(largest, -float(parts.amax(0).min()))
    return largest


def max_weight(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest magnitudes of a weight over `dim`."""
    if weight.dtype is not torch.bfloat16:
        return max_magnitude(weight, (dim,))
    # Without its sign bit, a bfloat16 is ordered as the integer of the same bits (NaN above all).
    return (weight.view(torch.int16) & 0x7FFF).amax(dim).view(torch.bfloat16)
