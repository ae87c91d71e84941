"""Observing linear layers: per-channel inputs, and the partial products of row parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from gaudi_calib.engines.attention import max_magnitude

# Tokens whose partial products are formed together; bounds their memory.
_CHUNK = 512


@dataclass
class LinearRanges:
    """What one linear node has seen.

    Attributes:
        modules: the Hugging Face modules it fuses.
        seen: largest input magnitude per input channel, shape (in,), or None.
        products: world -> largest magnitude of the elementwise maximum over ranks of
            the partial products.
        total: largest magnitude of the whole product, without bias.
    """

    modules: Sequence[nn.Module]
    seen: torch.Tensor | None = None
    products: dict[int, float] = field(default_factory=dict)
    total: float = 0.0
    detach: Callable[[], None] = lambda: None

    def observe(self, x: torch.Tensor) -> None:
        """Take in an input of shape (..., in)."""
        values = max_magnitude(x.flatten(0, -2), (0,))
        self.seen = values if self.seen is None else torch.maximum(self.seen, values)


def observe_input(modules: Sequence[nn.Module]) -> LinearRanges:
    """Watch the input of fused modules (they share it, so the first one's)."""
    ranges = LinearRanges(modules)
    handle = modules[0].register_forward_pre_hook(lambda module, args: ranges.observe(args[0]))
    ranges.detach = handle.remove
    return ranges


def observe_row_parallel(module: nn.Module, worlds: Sequence[int]) -> LinearRanges:
    """Watch a row-parallel layer's input and its partial products over each of `worlds`.

    In float32 the product, and those of coarser worlds, are formed as sums of the
    finest partial products, at no extra multiplications; in bfloat16, where sums
    round, each is formed on its own, as the devices would.
    """
    ranges = LinearRanges([module])
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    sums = weight.dtype is torch.float32
    chains = chain_worlds(worlds) if sums else [[world] for world in worlds if world > 1]

    def forward(x: torch.Tensor) -> torch.Tensor:
        ranges.observe(x)
        flat = x.flatten(0, -2)
        parts = [_observe_products(flat, weight, chain, ranges) for chain in chains]
        exact = not sums or not parts
        product = flat @ weight.T if exact else parts[0]
        ranges.total = max(ranges.total, float(max_magnitude(product, (0, 1))))
        ranges.products[1] = ranges.total
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
    x: torch.Tensor, weight: torch.Tensor, chain: Sequence[int], ranges: LinearRanges
) -> torch.Tensor:
    """Form x @ weight.T as the sum of partial products over `chain[0]` ranks, and note their ranges."""
    tokens, width, rows = x.shape[0], x.shape[1] // chain[0], weight.shape[0]
    product = x.new_empty(tokens, rows)
    buffer = x.new_empty(chain[0], min(tokens, _CHUNK), rows)
    for start in range(0, tokens, _CHUNK):
        chunk = x[start : start + _CHUNK]
        parts = buffer[:, : chunk.shape[0]]
        for rank in range(chain[0]):
            columns = slice(rank * width, (rank + 1) * width)
            torch.mm(chunk[:, columns], weight[:, columns].T, out=parts[rank])
        for world in chain:
            parts = _sum_neighbours(parts, world)
            ranges.products[world] = max_signed(parts, ranges.products.get(world, 0.0))
        _sum_neighbours(parts, 1, out=product[start : start + _CHUNK])
    return product


def _sum_neighbours(parts: torch.Tensor, world: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum consecutive ranks' partial products, shape (ranks, tokens, rows), down to `world` of them, in place."""
    step = parts.shape[0] // world
    if out is not None:
        return torch.sum(parts, 0, out=out) if step > 2 else torch.add(parts[0], parts[-1], out=out)
    if step == 1:
        return parts
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

    Source: INC all-reduces with MAX before it observes the magnitude
    (`PatchedRowParallelLinear.forward_measure_reduce`).
    """
    extremes = [torch.aminmax(part) for part in parts]
    largest = max(floor, *(float(extreme.max) for extreme in extremes))
    if max(float(extreme.min) for extreme in extremes) < -largest:
        largest = max(largest, -float(parts.amax(0).min()))
    return largest
