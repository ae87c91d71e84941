"""Several runs of one model into one, as values: elementwise maxima of what each saw.

The same model may have been measured on different data, or its ranks on different
machines. Combining is commutative, associative and idempotent, so it does not matter
how the work was split: maxima of ranges and of counts, equality of what belongs to the
model (weights, ops, axes), and only those topologies' sums that every run measured.
"""

import heapq
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from graphlib import CycleError, TopologicalSorter
from numbers import Real
from typing import Any, NoReturn, TypeVar

import numpy as np

from gaudi_calib.errors import ModelError, RangeError, TopologyError
from gaudi_calib.layout import DUMP_NAME
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.sources import find_damaged, list_read
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges

T = TypeVar("T")

# Fields that the model decides, whatever data it sees.
_OF_THE_MODEL = {"op", "axis", "weight", "gate_up", "down", "bias"}
# Fields that count the samples of one run, and mean nothing in the order of several.
_OF_ONE_RUN = {"progress"}


@dataclass(frozen=True)
class _Place:
    """What is being combined, for errors.

    Attributes:
        node: its name.
        rank: ` on rank 1 of 2`, or nothing.
        sources: where each of the values comes from.
        read: the parts of it that must be finite; None for all.
    """

    node: str
    rank: str
    sources: Sequence[object]
    read: Collection[str] | None = None


def merge_ranks(runs: Sequence[RankSet[Node]], sources: Sequence[object]) -> RankSet[Node]:
    """Combine what several runs measured on the same rank.

    Args:
        runs: at least one; nodes that only some runs reached are kept.
        sources: where each comes from, to name in errors.

    Returns:
        Nodes in module order, `num_samples` the largest.

    Raises:
        TopologyError: the runs are of different ranks, or a node has another number of
            inputs, outputs or channels.
        ModelError: a weight range differs.
        RangeError: a range that scales come from is NaN or infinite; names node, rank and source.
    """
    first = runs[0]
    for run, source in zip(runs, sources, strict=True):
        if (run.rank, run.world) != (first.rank, first.world):
            raise TopologyError(
                f"cannot combine rank {run.rank} of {run.world} with rank {first.rank} of {first.world}",
                where=source,
                fix="combine the same rank of each run",
            )
    tables = [tabulate_ranges(run.nodes) for run in runs]
    samples = [run.num_samples for run in runs if run.num_samples is not None]
    modules = join_names([run.modules for run in runs])
    combined = _combine_alike(tables)
    if combined is None:
        nodes = _combine_nodes(tables, modules, sources, f" on rank {first.rank} of {first.world}")
        combined = tabulate_ranges(nodes)
    return RankSet(
        first.rank,
        first.world,
        combined,
        modules,
        max(samples, default=None),
        first.dump if {run.dump for run in runs} == {first.dump} else DUMP_NAME,
    )


def merge_channels(runs: Sequence[ChannelRanges], sources: Sequence[object]) -> ChannelRanges:
    """Combine the per-channel measurements of several runs.

    Args:
        runs, sources: as for `merge_ranks`.

    Returns:
        Maxima per channel. Partial sums of topologies that some run did not measure are
        left out, and are bounded where they are needed. Token counts are the largest.

    Raises:
        TopologyError, ModelError, RangeError: as `merge_ranks`.
    """
    modules = join_names([run.modules for run in runs])
    nodes = _combine_nodes([run.nodes for run in runs], modules, sources, "")
    return ChannelRanges(nodes, modules, max(run.num_samples for run in runs))


def join_names(orders: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return all names, each list's order kept; the result does not depend on the order of the lists.

    Names that no list puts in order, and those two lists put in opposite order, are sorted
    with numbers by value.

    >>> join_names([["layers.2", "head"], ["layers.2", "layers.10", "head"]])
    ('layers.2', 'layers.10', 'head')
    """
    distinct = {tuple(order) for order in orders}
    if len(distinct) == 1:
        return next(iter(distinct))
    sorter: TopologicalSorter[str] = TopologicalSorter({name: () for order in distinct for name in order})
    for before, name in itertools.chain.from_iterable(map(itertools.pairwise, distinct)):
        sorter.add(name, before)
    try:
        sorter.prepare()
    except CycleError:
        return tuple(sorted({name for order in distinct for name in order}, key=_sort_key))
    ready: list[tuple[list[str | int], str]] = []
    joined: list[str] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, _sort_key(name))
        joined.append(heapq.heappop(ready)[-1])
        sorter.done(joined[-1])
    return tuple(joined)


def _sort_key(name: str) -> tuple[list[str | int], str]:
    parts: list[str | int] = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def _combine_alike(tables: Sequence[RangeTable]) -> RangeTable | None:
    """Combine runs with the same nodes at once; None where they differ, or something is wrong."""
    inventory = tables[0].inventory
    if not all(table.inventory.equals(inventory) for table in tables):
        return None
    numbers = np.stack([table.numbers for table in tables])
    weights = inventory.per_node([shape.weight or 0 for shape in inventory.distinct_shapes])
    ends = inventory.starts + inventory.sizes
    is_weight = np.arange(inventory.size) >= np.repeat(ends - weights, inventory.sizes)
    if any(map(any, map(find_damaged, tables))) or (numbers != numbers[0])[:, is_weight].any():
        return None
    return RangeTable(inventory, np.maximum.reduce(numbers))


def _combine_nodes(
    runs: Sequence[Mapping[str, T]], modules: Iterable[str], sources: Sequence[object], rank: str
) -> dict[str, T]:
    order = join_names([tuple(modules), *(tuple(run) for run in runs)])
    combined = {}
    for name in order:
        having = [(run[name], source) for run, source in zip(runs, sources, strict=True) if name in run]
        if having:
            nodes, origins = zip(*having, strict=True)
            read = list_read(name, nodes[0]) if isinstance(nodes[0], Node) else None
            combined[name] = _combine("", nodes, _Place(name, rank, origins, read), equal=False)
    return combined


def _combine(part: str, values: Sequence[Any], place: _Place, *, equal: bool) -> Any:
    """Combine one part of a node; `equal` where the runs must agree."""
    first = values[0]
    if any(_kind(value) is not _kind(first) for value in values):
        _refuse_structure(part, values, place)
    if first is None:
        return None
    if isinstance(first, np.ndarray):
        return _combine_arrays(part, values, place, equal=equal)
    if is_dataclass(first) and not isinstance(first, type):
        return replace(
            first,
            **{
                field.name: None
                if field.name in _OF_ONE_RUN
                else _combine(
                    f"{part} {field.name}".strip(),
                    [getattr(value, field.name) for value in values],
                    place,
                    equal=equal or field.name in _OF_THE_MODEL,
                )
                for field in fields(first)
                if field.init
            },
        )
    if isinstance(first, Sequence):
        if any(len(value) != len(first) for value in values):
            _refuse_structure(part, values, place)
        return tuple(
            _combine(f"{part}[{i}]", [value[i] for value in values], place, equal=equal) for i in range(len(first))
        )
    if isinstance(first, Mapping):
        shared = [key for key in sorted(first) if all(key in value for value in values)]
        return {key: _combine(f"{part}[{key}]", [value[key] for value in values], place, equal=equal) for key in shared}
    if equal:
        differing = next((i for i, value in enumerate(values) if value != first), None)
        return first if differing is None else _refuse_model(part, values, differing, place)
    for value, source in zip(values, place.sources, strict=True):
        if not math.isfinite(value):
            _refuse_number(part, value, place, source)
    return max(values)


def _kind(value: Any) -> type:
    """The type that values must share to be combined."""
    return next((kind for kind in (Mapping, Sequence, Real) if isinstance(value, kind)), type(value))


def _combine_arrays(part: str, values: Sequence[np.ndarray], place: _Place, *, equal: bool) -> np.ndarray:
    first = values[0]
    if any(value.shape != first.shape for value in values):
        _refuse_structure(part, values, place)
    for value, source in zip(values, place.sources, strict=True):
        finite = np.isfinite(value)
        if not finite.all() and (place.read is None or part in place.read):
            _refuse_number(part, value[~finite][0], place, source)
    if not equal:
        return np.maximum.reduce(values)
    differing = next((i for i, value in enumerate(values) if not np.array_equal(value, first)), None)
    return first if differing is None else _refuse_model(part, values, differing, place)


def _refuse_number(part: str, value: float, place: _Place, source: object) -> NoReturn:
    raise RangeError(
        f"{part} of {place.node} is not finite{place.rank}",
        where=source,
        why=f"the range is {value}",
        fix="find the sample that overflows (measure with -b 1) and measure this run again, or leave it out",
    )


def _refuse_structure(part: str, values: Sequence[Any], place: _Place) -> NoReturn:
    described = [_describe(value) for value in values]
    other = next(i for i, text in enumerate(described) if text != described[0])
    raise TopologyError(
        f"{part} of {place.node} has another form in different runs{place.rank}",
        where=place.sources[other],
        why=f"{described[other]} here, {described[0]} in {place.sources[0]}: the runs are of different models, "
        "topologies or MEASURE configs",
        fix="merge only runs of one model, measured with the same config and the same number of ranks",
    )


def _describe(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, np.ndarray):
        return f"shape {value.shape}"
    return f"{len(value)} entries" if isinstance(value, Sequence) else type(value).__name__


def _refuse_model(part: str, values: Sequence[Any], differing: int, place: _Place) -> NoReturn:
    ours, theirs = values[differing], values[0]
    if isinstance(ours, np.ndarray):
        channel = tuple(np.argwhere(ours != theirs)[0])
        ours, theirs = ours[channel], theirs[channel]
    raise ModelError(
        f"{part} of {place.node} differs between the runs{place.rank}",
        where=place.sources[differing],
        why=f"{ours} here, {theirs} in {place.sources[0]}: another checkpoint, or its weights in another format",
        fix="merge only runs of the same checkpoint",
    )
