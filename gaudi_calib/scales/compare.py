"""Two calibrations of one model, number by number: what differs, and what the scales of one would clip of the other.

Nodes go by the name that releases of vLLM have in common (`name_ageless`). What only one side has, a node or an output
that only one side measured, is left out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.experts import name_ageless
from gaudi_calib.ranges.node import Op, PerChannelWeight, ScaleNode, find_op
from gaudi_calib.ranges.sources import find_sources, list_read
from gaudi_calib.ranges.table import (
    Inventory,
    Part,
    RangeShape,
    RangeTable,
    ScaleTable,
    join_values,
    label_part,
    locate_parts,
)

_SPREAD = (5, 50, 95)  # percentiles of the ratios


class Change(NamedTuple):
    """How one part of all nodes of a kind differs between two sets.

    Attributes:
        kind: last part of the nodes' names, such as `o_proj`.
        part: `inputs[0]`, `weight`; all experts of a fused op are `outputs[1:]`, their scales `inputs[1:]`.
        numbers: how many both sides have.
        differing: those that differ.
        lost, found: those that are 0 only on the right, and only on the left.
        low, median, high: 5th, 50th and 95th percentile of right / left where both are above 0; NaN where none are.
        least, most: extremes of that ratio.
    """

    kind: str
    part: str
    numbers: int
    differing: int
    lost: int
    found: int
    low: float
    median: float
    high: float
    least: float
    most: float


class Clipped(NamedTuple):
    """A range on the right that a scale on the left does not bring into the FP8 range.

    Attributes:
        name: the node, as the left side calls it.
        part: of its ranges.
        range: the range.
        limit: the largest value that the scale can hold.
    """

    name: str
    part: str
    range: float
    limit: float


class Names(NamedTuple):
    """Nodes that one side has and the other has not."""

    left: tuple[str, ...]
    right: tuple[str, ...]


class _Group(NamedTuple):
    """Nodes of one kind that have the same shapes.

    Attributes:
        kind: last part of their names.
        names: as the left side calls them.
        left, right: their rows in either inventory, int64.
        shapes: on either side.
    """

    kind: str
    names: tuple[str, ...]
    left: np.ndarray
    right: np.ndarray
    shapes: tuple[RangeShape, RangeShape]


def flatten_scales(scales: ScaleTable) -> RangeTable:
    """Return scales as a table of numbers: each is what a range with so many channels would be."""
    if not scales.others:
        plain = {
            shape: RangeShape((1,) * shape.inputs, (1,) * shape.outputs, 1 if shape.weight else None)
            for shape in scales.inventory.distinct_shapes
        }
        return RangeTable(Inventory(scales.inventory.names, [plain[shape] for shape in scales.inventory.shapes]),
                          scales.numbers)  # fmt: skip
    shapes, values = [], []
    for node in scales.values():
        parts = _list_values(node)
        values += parts
        counts = tuple(map(len, parts))
        inputs, outputs = len(node.inputs), len(node.outputs)
        weight = None if node.weight is None else counts[-1]
        shapes.append(RangeShape(counts[:inputs], counts[inputs : inputs + outputs], weight))
    return RangeTable(Inventory(tuple(scales), shapes), join_values(values))


def _list_values(node: ScaleNode) -> list[np.ndarray]:
    weight = node.weight.out_channels if isinstance(node.weight, PerChannelWeight) else node.weight
    return [np.atleast_1d(value) for value in (*node.inputs, *node.outputs, weight) if value is not None]


def list_unpaired(left: Inventory[RangeShape], right: Inventory[RangeShape]) -> Names:
    """Return the nodes that only one side has."""
    there, here = set(map(name_ageless, right.names)), set(map(name_ageless, left.names))
    return Names(
        tuple(name for name in left.names if name_ageless(name) not in there),
        tuple(name for name in right.names if name_ageless(name) not in here),
    )


def compare_tables(left: Sequence[RangeTable], right: Sequence[RangeTable], *, read_only: bool) -> list[Change]:
    """Return how the numbers of all ranks differ, by kind of node and part.

    Args:
        left, right: the ranks of one world on either side, in rank order.
        read_only: the numbers are ranges: leave out those that no scale comes from.
    """
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for one, other in zip(left, right, strict=True):
        for group in _group_nodes(one.inventory, other.inventory):
            for part, starts, others, channels in _pair_parts(group, one.inventory, other.inventory, read_only):
                for channel in range(channels):
                    pair = one.numbers[starts + channel], other.numbers[others + channel]
                    found.setdefault((group.kind, part), []).append(pair)
    return [
        _summarize(kind, part, *(np.concatenate(side) for side in zip(*pairs, strict=True)))
        for (kind, part), pairs in found.items()
    ]


def find_clipped(ranges: Sequence[RangeTable], scales: Sequence[RangeTable], device: Device) -> list[Clipped]:
    """Return the ranges that are beyond what the scales of another calibration hold, the worst first.

    Args:
        ranges: of the calibration that says what comes, in rank order.
        scales: of the one that serves, flat (`flatten_scales`), in rank order.
        device: whose FP8 the scales are for.
    """
    clipped = [clip for seen, held in zip(ranges, scales, strict=True) for clip in _find_clipped(seen, held, device)]
    return sorted(clipped, key=lambda clip: clip.limit / clip.range)


def _find_clipped(ranges: RangeTable, scales: RangeTable, device: Device) -> Iterator[Clipped]:
    for group in _group_nodes(scales.inventory, ranges.inventory):
        held, shape = group.shapes
        sources = find_sources(find_op(group.kind, shape), shape)[0]
        for index, source in enumerate(sources[: len(held.inputs)]):
            if source not in locate_parts(shape):
                continue
            offset, _ = locate_parts(shape)[source]
            limits = scales.numbers[scales.inventory.starts[group.left] + index] * np.float32(device.fullscale)
            seen = ranges.numbers[ranges.inventory.starts[group.right] + offset]
            with np.errstate(invalid="ignore"):
                beyond = np.flatnonzero(seen > limits).tolist()
            for at in beyond:
                yield Clipped(group.names[at], label_part(source), float(seen[at]), float(limits[at]))


def _group_nodes(left: Inventory[RangeShape], right: Inventory[RangeShape]) -> Iterator[_Group]:
    """Yield the nodes that both sides have, by kind and shape."""
    places = {name_ageless(name): row for row, name in enumerate(right.names)}
    groups: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for row, name in enumerate(left.names):
        place = places.get(name_ageless(name))
        if place is not None:
            key = _find_kind(name), int(left.kinds[row]), int(right.kinds[place])
            groups.setdefault(key, []).append((row, place))
    for (kind, one, other), pairs in groups.items():
        rows = np.array(pairs, dtype=np.int64)
        names = tuple(left.names[row] for row in rows[:, 0].tolist())
        yield _Group(kind, names, rows[:, 0], rows[:, 1], (left.distinct_shapes[one], right.distinct_shapes[other]))


def _find_kind(name: str) -> str:
    """Return the last part of a name that is no number: `w13_list` of an expert's weight."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def _pair_parts(
    group: _Group, left: Inventory[RangeShape], right: Inventory[RangeShape], read_only: bool
) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """Yield each part that both sides have: its name, where its numbers start on either side, and its channels."""
    one, other = map(locate_parts, group.shapes)
    op, read = find_op(group.kind, group.shapes[0]), list_read(group.kind, group.shapes[0])
    for part, (offset, channels) in one.items():
        if part in other and other[part][1] == channels and not (read_only and label_part(part) not in read):
            starts = left.starts[group.left] + offset, right.starts[group.right] + other[part][0]
            yield _name_part(op, part), *starts, channels


def _name_part(op: Op, part: Part) -> str:
    """Return what a part is called; all experts of a fused op are one."""
    kind, index = part
    return f"{kind}[1:]" if op is Op.DYNAMIC_MOE and index else label_part(part)


def _summarize(kind: str, part: str, left: np.ndarray, right: np.ndarray) -> Change:
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    positive = (left > 0) & (right > 0) & np.isfinite(left) & np.isfinite(right)
    ratios = right[positive].astype(np.float64) / left[positive]
    low, median, high = np.percentile(ratios, _SPREAD).tolist() if len(ratios) else [np.nan] * 3
    extremes = (float(ratios.min()), float(ratios.max())) if len(ratios) else (np.nan, np.nan)
    lost, found = int(((left > 0) & (right == 0)).sum()), int(((left == 0) & (right > 0)).sum())
    return Change(kind, part, len(left), int((~same).sum()), lost, found, low, median, high, *extremes)
