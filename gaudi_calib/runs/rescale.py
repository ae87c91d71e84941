"""Scales of a world that was made from another: computed anew from its ranges, by the source's method."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, RangeError
from gaudi_calib.ranges.experts import Choose, rename_modules
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import Inventory, RangeTable, tabulate_ranges
from gaudi_calib.rankfiles.store import read_any_names
from gaudi_calib.runs.recipe import Recipe, advise_scales, find_recipe

_log = logging.getLogger(__name__)


class Converted(NamedTuple):
    """Ranges of a new world.

    Attributes:
        from_world: the world they come from.
        inventory: nodes of its ranks.
        ranks: in rank order.
        choose: which experts a rank has of those of its source rank, None where all are the same.
        expert_parallel: how experts are split, None without experts.
    """

    from_world: int
    inventory: Inventory
    ranks: list[RankSet[Node]]
    choose: Choose | None
    expert_parallel: bool | None

    def equals(self, other: "Converted") -> bool:
        """Whether the ranges are the same, wherever they come from."""
        pairs = zip(self.ranks, other.ranks, strict=True)
        return all(tabulate_ranges(one.nodes).equals(tabulate_ranges(another.nodes)) for one, another in pairs)


# How scales are made, and those of all ranks.
Rescaled = tuple[Recipe, list[RankSet[ScaleNode]]]


def rescale(
    source: CalibrationDir, converted: Converted, device: str | None, *, out: CalibrationDir, model: str | None = None
) -> list[Rescaled]:
    """Compute scales of the new ranks for every method the old ones have.

    Args:
        source: where the old ranks are.
        device: the device that will serve, where `source` does not tell.
        out: where the new ranks will be, and `model` the checkpoint, if it is known: for what warnings advise.

    Raises:
        UsageError: `device` contradicts what is known. ConfigError: the run's config is invalid.
        FileError: scale files of some ranks are missing, malformed or of other ranges.
        RangeError: a range gives no usable scale.
    """
    computed: list[Rescaled] = []
    count = len(converted.ranks)
    old_ranks = [rank * converted.from_world // count for rank in range(count)]
    for tag in source.list_methods(converted.from_world):
        recipe = find_recipe(source, tag, device)
        if isinstance(recipe, str):
            later = advise_scales(out, count, tag, model or source.advise().model, source.settle_device(device))
            _log.warning("No scales of %s: %s.%s", tag, recipe, f" Afterwards run `{later}`" if later else "")
            continue
        named = _read_scaled_names(source, converted.from_world, tag, sorted(set(old_ranks)))
        names = [named[rank] for rank in old_ranks]
        if converted.choose is not None:
            names = [
                rename_modules(old, converted.inventory, tabulate_ranges(rank_set.nodes).inventory, converted.choose)
                for old, rank_set in zip(names, converted.ranks, strict=True)
            ]
        computed.append((recipe, _compute(recipe, _pick_scaled(converted.ranks, names))))
    return computed


def _compute(recipe: Recipe, ranks: Sequence[RankSet[Node]]) -> list[RankSet[ScaleNode]]:
    try:
        return list(recipe.compute(ranks))
    except RangeError as error:
        raise error.with_fix(f"{error.fix}; or leave scales out with --skip-scales") from error


def _read_scaled_names(
    source: CalibrationDir, world: int, tag: str, ranks: Sequence[int]
) -> dict[int, tuple[str, ...]]:
    """Return the names of the nodes that have scales on some `ranks`, after checking that no rank's file is missing."""
    files = source.find_scales(world, tag)
    missing = [rank for rank in range(world) if rank not in files]
    if missing:
        raise FileError(
            f"no {tag} scales of rank {missing[0]} of {world}",
            where=source.name_file(missing[0], world, method=tag, extension="json"),
            why="other ranks have scales of this method",
            fix="restore the file, delete the other ranks' scales, or leave scales out with --skip-scales",
        )
    return {rank: read_any_names(files[rank]) for rank in ranks}


def _pick_scaled(ranks: Sequence[RankSet[Node]], names: Sequence[tuple[str, ...]]) -> list[RankSet[Node]]:
    """Return the nodes `names`, given by rank; consecutive ranks of the same ranges and names share a table."""
    picked: list[RankSet[Node]] = []
    last: tuple[RangeTable, tuple[str, ...], RangeTable] | None = None
    for rank_set, chosen in zip(ranks, names, strict=True):
        table = tabulate_ranges(rank_set.nodes)
        if last is None or last[0] is not table or last[1] != chosen:
            last = table, chosen, _pick_nodes(table, chosen)
        picked.append(replace(rank_set, nodes=last[2]))
    return picked


def _pick_nodes(table: RangeTable, names: tuple[str, ...]) -> RangeTable:
    lost = [name for name in names if name not in table.inventory.index]
    if lost:
        raise FileError(
            f"node {lost[0]!r} has scales and no ranges",
            where=lost[0],
            why="the scale files are not of these ranges",
            fix="delete the scale files, or leave scales out with --skip-scales",
        )
    chosen = set(names)
    return table.select([name in chosen for name in table.inventory.names])
