"""Ranks into fewer ranks, or into more: pure functions on the flat arrays of table.py.

Dense layers and tensor-parallel experts: each number is the maximum over the ranks of a
group, or a copy. Experts under expert parallelism: lined up, or dealt out (experts.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gaudi_calib.errors import RangeError, TopologyError
from gaudi_calib.ranges.experts import (
    ExpertLayer,
    choose_joined,
    choose_part,
    find_expert_layers,
    regroup,
    rename_modules,
)
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.sources import find_damaged
from gaudi_calib.ranges.table import Inventory, RangeTable, tabulate_ranges


class World(NamedTuple):
    """All ranks of one world, with the same nodes in the same order.

    Attributes:
        ranks: in rank order, their nodes tables.
        inventory: their nodes.
        layers: their layers of experts.
    """

    ranks: tuple[RankSet[Node], ...]
    inventory: Inventory
    layers: tuple[ExpertLayer, ...]

    @property
    def tables(self) -> list[RangeTable]:
        return [tabulate_ranges(rank.nodes) for rank in self.ranks]


def gather_world(ranks: Sequence[RankSet[Node]]) -> World:
    """Check that `ranks` are ranks of one model.

    Raises:
        TopologyError: nodes, shapes or experts differ between ranks; see `find_expert_layers` too.
        RangeError: a range that scales come from is NaN or infinite; names node and rank.
    """
    tables = [tabulate_ranges(rank.nodes) for rank in ranks]
    first = tables[0].inventory
    if not all(table.inventory.equals(first) for table in tables):
        tables = _align_tables(ranks, tables)
    for rank, table in zip(ranks, tables, strict=True):
        _require_finite(rank, table)
    gathered = [replace(rank, nodes=table) for rank, table in zip(ranks, tables, strict=True)]
    return World(tuple(gathered), first, tuple(find_expert_layers(first)))


def unify_ranks(world: World, size: int, *, expert_parallel: bool) -> list[RankSet[Node]]:
    """Merge consecutive ranks into `size` of them.

    Raises:
        TopologyError: `size` does not divide the number of ranks.
    """
    count = len(world.ranks)
    if size < 1 or count % size:
        raise TopologyError(
            f"cannot unify {count} ranks into {size}",
            why=f"{size} does not divide {count}",
            fix="choose one of " + ", ".join(str(divisor) for divisor in range(1, count + 1) if count % divisor == 0),
        )
    group = count // size
    joins = expert_parallel and group > 1 and bool(world.layers)
    plan = regroup(world.inventory, world.layers, choose_joined(group)) if joins else None
    tables, merged = world.tables, []
    for index in range(size):
        banks = np.stack([table.numbers for table in tables[index * group : (index + 1) * group]])
        highest = np.maximum.reduce(banks)
        first = world.ranks[index * group]
        merged_rank = replace(first, rank=index, world=size, nodes=RangeTable(world.inventory, highest))
        if plan is not None:
            numbers = np.concatenate([highest, banks.ravel()])[plan.sources]
            modules = rename_modules(first.modules, world.inventory, plan.inventory, choose_joined(group))
            merged_rank = replace(merged_rank, nodes=RangeTable(plan.inventory, numbers), modules=modules)
        merged.append(merged_rank)
    return merged


def expand_ranks(world: World, size: int, *, expert_parallel: bool) -> list[RankSet[Node]]:
    """Give each of `size` ranks the ranges of the rank it is a part of.

    A part of a tensor never exceeds the whole, so every range is an upper bound, except the
    partial products of row-parallel layers (`outputs[0]`), which may cancel in the whole. Ranges
    of the parts themselves need `channel_ranges.safetensors`.

    Raises:
        TopologyError: `size` is no multiple of the number of ranks, or experts do not divide.
    """
    count = len(world.ranks)
    if size < 1 or size % count:
        raise TopologyError(
            f"cannot expand {count} ranks to {size}",
            why=f"{size} is no multiple of {count}",
            fix="unify to one rank first",
        )
    parts = size // count
    deals = expert_parallel and parts > 1 and bool(world.layers)
    choices = [choose_part(parts, part) for part in range(parts)]
    plans = [regroup(world.inventory, world.layers, choose) for choose in choices] if deals else []
    expanded: list[RankSet[Node]] = []
    for rank in range(size):
        source, part = world.ranks[rank // parts], rank % parts
        table, modules = tabulate_ranges(source.nodes), source.modules
        if deals:
            inventory = plans[part].inventory
            inventory = plans[0].inventory if inventory.equals(plans[0].inventory) else inventory
            modules = rename_modules(modules, world.inventory, inventory, choices[part])
            table = RangeTable(inventory, table.numbers[plans[part].sources])
        expanded.append(replace(source, rank=rank, world=size, nodes=table, modules=modules))
    return expanded


def _align_tables(ranks: Sequence[RankSet[Node]], tables: Sequence[RangeTable]) -> list[RangeTable]:
    """Bring the nodes of all ranks into the order of the first, or say what differs."""
    first = tables[0].inventory
    aligned = []
    for rank, table in zip(ranks, tables, strict=True):
        own = table.inventory
        if not own.equals(first):
            _require_same_experts(ranks[0], rank, first, own)
            _require_same_names(ranks[0], rank, first, own)
            order = np.array([own.index[name] for name in first.names], dtype=np.int64)
            for name, shape, place in zip(first.names, first.shapes, order.tolist(), strict=True):
                if own.shapes[place] != shape:
                    raise TopologyError(
                        f"{name} has a different number of inputs, outputs or channels on different ranks",
                        why=f"rank {rank.rank} differs from rank {ranks[0].rank}: the files come from different runs",
                        fix="measure all ranks in one run",
                    )
            places = np.repeat(own.starts[order] - first.starts, first.sizes) + np.arange(first.size)
            table = RangeTable(first, table.numbers[places])
        aligned.append(RangeTable(first, table.numbers))
    return aligned


def _require_same_names(left: RankSet[Node], right: RankSet[Node], first: Inventory, other: Inventory) -> None:
    for lacking, having, names, known in (
        (right, left, first.names, other.index),
        (left, right, other.names, first.index),
    ):
        missing = next((name for name in names if name not in known), None)
        if missing is not None:
            raise TopologyError(
                f"rank {lacking.rank} of {lacking.world} has no node {missing!r}",
                why=f"rank {having.rank} measured it; a merge needs the same nodes on every rank",
                fix=f"measure again with -t {lacking.world}, with data that reaches every module on every rank",
            )


def _require_same_experts(left: RankSet[Node], right: RankSet[Node], first: Inventory, other: Inventory) -> None:
    counts = {layer.op: layer.size for layer in find_expert_layers(first)}
    for layer in find_expert_layers(other):
        if counts.get(layer.op, layer.size) != layer.size:
            raise TopologyError(
                f"rank {right.rank} of {right.world} has {layer.size} experts, rank {left.rank} has {counts[layer.op]}",
                where=layer.op,
                why="ranks of one model have equally many; another layout cannot be put together",
                fix="measure again with a number of ranks that divides the experts",
            )


def _require_finite(rank: RankSet[Node], table: RangeTable) -> None:
    """Refuse NaN and infinity in ranges that are read; elsewhere they are passed on."""
    for name, part, value in find_damaged(table):
        raise RangeError(
            f"{part} of {name} is not finite on rank {rank.rank} of {rank.world}",
            why=f"the range is {value}",
            fix="find the sample that overflows (measure with -b 1) and measure again",
        )
