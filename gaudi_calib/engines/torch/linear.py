"""Observing linear layers: per-channel inputs, and the partial products of row parallelism."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from gaudi_calib.checkpoints.plan import LinearPlan, ModelPlan
from gaudi_calib.engines.observe.peak import Peak, max_magnitude
from gaudi_calib.engines.torch.sequences import Sequences
from gaudi_calib.errors import RangeError
from gaudi_calib.models.modules import Split
from gaudi_calib.ranges.channels import ChannelNode, ChannelRange
from gaudi_calib.ranges.node import Op

# Tokens whose partial products are formed together; bounds their memory.
_CHUNK = 1024
_WEIGHT_VALUES = 2**24  # of a weight, looked at at a time


class Scratch:
    """Memory that layers use in turn: getting fresh memory takes longer than filling it."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor of dtype and device of `like`; it is overwritten after the next call."""
        size = math.prod(shape)
        if self._flat.numel() < size or self._flat.dtype is not like.dtype:
            self._flat = like.new_empty(size)
        return self._flat[:size].view(shape)


@dataclass
class ObservedLinear:
    """What one linear layer has seen.

    Attributes:
        input: of shape (in,) where ranks split the input, else (1,).
        product: of row-parallel layers, without bias.
        products: world > 1 -> range of the partial products, without bias: one value for all
            ranks, which reduce them first, or one per rank.
        outputs: where asked for, of shape (rows,), pieces whose rows together are those of the weight as stored.
        detach: ends the observation.
    """

    input: Peak = field(default_factory=Peak)
    product: Peak = field(default_factory=Peak)
    products: dict[int, tuple[float, ...]] = field(default_factory=dict)
    outputs: list[Peak] = field(default_factory=list)
    detach: Callable[[], None] = lambda: None

    def to_node(self, plan: ModelPlan, linear: LinearPlan) -> ChannelNode:
        """Return the channel ranges of the layer, whose weight is read piece by piece.

        Raises:
            RangeError: the weight is not finite.
        """
        assert self.input.is_seen, linear.node
        weight = _measure_weight(plan, linear)
        require_finite_weight(linear.node, weight.values)
        outputs: tuple[ChannelRange, ...] | None = None
        products = dict(self.products)
        if linear.op is Op.ROW_PARALLEL_LINEAR:
            total = ChannelRange(self.product.to_array(), progress=self.product.to_progress())
            outputs, products[1] = (total, total), tuple(total.values.tolist())
        elif self.outputs:
            outputs = (_arrange_rows(plan, linear, [peak.to_array() for peak in self.outputs]),)
        inputs = (ChannelRange(self.input.to_array(), linear.in_axis, self.input.to_progress()),)
        return ChannelNode(linear.op, inputs, outputs, weight, partial_products=products)


def _measure_weight(plan: ModelPlan, linear: LinearPlan) -> ChannelRange:
    """Return the ranges of a weight, per input column for row-parallel layers, else per row."""
    dim = 0 if linear.split is Split.ROW else 1
    pieces = [max_magnitude(piece, dim).float().numpy() for piece in _read_pieces(plan, linear)]
    if linear.split is Split.ROW:
        return ChannelRange(np.maximum.reduce(pieces), linear.in_axis)
    return _arrange_rows(plan, linear, pieces)


def _arrange_rows(plan: ModelPlan, linear: LinearPlan, pieces: Sequence[np.ndarray]) -> ChannelRange:
    """Join ranges per stored output row, and bring them into the order of vLLM."""
    values, order = np.concatenate(pieces), plan.canonical_rows(linear)
    if order is not None:
        values = values[order]
    return ChannelRange(np.pad(values, (0, linear.padding)), linear.out_axis)


def _read_pieces(plan: ModelPlan, linear: LinearPlan) -> Iterator[torch.Tensor]:
    for name in linear.weights:
        weight = plan.checkpoint.read([name])[name]
        for piece in weight.split(max(1, _WEIGHT_VALUES // weight.shape[1])):
            yield plan.served(piece)


def observe_fused(modules: Sequence[nn.Module], split: Split, sequences: Sequences, *, outputs: bool) -> ObservedLinear:
    """Watch a layer whose input every rank has all of, and that is fused from `modules`.

    Args:
        sequences: those that run.
        outputs: of each module, too; see `multiply`.
    """
    observed = ObservedLinear()

    def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        observed.input.take_samples(sequences.max_magnitudes(args[0].flatten(0, -2)))

    first = modules[0]  # they share their input
    handles = [first.register_forward_pre_hook(observe)]
    for module in modules if outputs else ():
        peak = Peak()
        observed.outputs.append(peak)
        handles.append(module.register_forward_hook(partial(_observe_output, peak, split)))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    observed.detach = detach
    return observed


def _observe_output(
    peak: Peak, split: Split, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor
) -> None:
    is_whole = split is Split.NONE or module.bias is None
    if type(module).forward is not nn.Linear.forward or not is_whole:  # routers return something else, too
        out = multiply(module, args[0], split)
    peak.observe(out.flatten(0, -2), 0)


def multiply(module: nn.Module, x: torch.Tensor, split: Split) -> torch.Tensor:
    """Return the output of a layer as INC measures it: with its bias where ranks replicate it, else without.

    Source: INC `PatchedReplicatedLinear`, `PatchedColumnParallelLinear` and `PatchedRowParallelLinear`.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = getattr(module, "bias", None) if split is Split.NONE else None
    return nn.functional.linear(x, weight, bias)


def measure_products(plan: ModelPlan, linear: LinearPlan, inputs: Sequence[torch.Tensor]) -> list[Peak]:
    """Return the outputs of a layer that was never loaded, in pieces of shape (rows,); its weight is read as often."""
    pieces = []
    for piece in _read_pieces(plan, linear):
        weight, peak = piece.to(inputs[0].device, inputs[0].dtype), Peak()
        for x in inputs:
            peak.observe(x.flatten(0, -2) @ weight.T, 0)
        pieces.append(peak)
    return pieces


def observe_row_parallel(
    module: nn.Module, worlds: Sequence[int], scratch: Scratch, sequences: Sequences, *, reduces: bool = True
) -> ObservedLinear:
    """Watch a row-parallel layer's input and its partial products over each of `worlds`, while `sequences` run.

    With `reduces`, a partial product's range is that of the elementwise maximum over
    the ranks, as INC all-reduces with MAX before it observes the magnitude
    (`PatchedRowParallelLinear.forward_measure_reduce`); without, each rank has its own
    (`forward_measure_no_reduce`).

    In float32 the product, and those of coarser worlds, are formed as sums of the
    finest partial products, at no extra multiplications.
    """
    observed = ObservedLinear()
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    chains = chain_worlds(worlds, weight.dtype)

    def observe(world: int, parts: torch.Tensor) -> None:
        before = observed.products.get(world, (0.0,) * (1 if reduces else world))
        if reduces:
            observed.products[world] = (max_signed(parts, before[0]),)
        else:
            largest = (float(max_magnitude(part)) for part in parts)
            observed.products[world] = tuple(max(pair) for pair in zip(before, largest, strict=True))

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        observed.input.take_samples(sequences.max_magnitudes(flat, by_channel=True))
        parts = [_observe_products(flat, weight, chain, observe, scratch) for chain in chains]
        exact = not parts or weight.dtype is not torch.float32
        product = flat @ weight.T if exact else parts[0]
        observed.product.take_samples(sequences.max_magnitudes(product))
        if exact and bias is not None:
            return nn.functional.linear(x, weight, bias)
        return (product if bias is None else product.add_(bias)).unflatten(0, x.shape[:-1])

    module.forward = forward
    observed.detach = lambda: module.__dict__.pop("forward")
    return observed


def chain_worlds(worlds: Sequence[int], dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """Group worlds > 1 so that in each group the sums of every world follow from those of the one before it.

    Below float32 sums round, so each is formed on its own, as the devices would.

    >>> chain_worlds([1, 2, 3, 4, 8])
    [[8, 4, 2], [3]]
    """
    if dtype is not torch.float32:
        return [[world] for world in worlds if world > 1]
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
        parts = scratch.take((chain[0], chunk.shape[0], rows), x)
        torch.bmm(chunk.unflatten(1, (chain[0], width)).transpose(0, 1), weight_by_rank, out=parts)
        for world in chain:
            parts = sum_neighbours(parts, world)
            observe(world, parts)
        product[start : start + _CHUNK] = sum_neighbours(parts, 1)[0]
    return product


def require_finite_weight(node: str, ranges: np.ndarray) -> None:
    """Raise RangeError where the weight ranges of `node` are not finite."""
    if not np.isfinite(ranges).all():
        raise RangeError(
            f"{node} has NaN or infinity in its weight",
            why="the checkpoint is damaged, or was converted wrongly",
            fix="download or convert the checkpoint again",
        )


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
