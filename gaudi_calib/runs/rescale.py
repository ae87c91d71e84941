"""Scales of a world that was made from another: computed anew from its ranges, by the source's method."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.config.methods import SCALE_METHODS, MethodTable
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.experts import Choose, rename_modules
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import Inventory, RangeTable, tabulate_ranges
from gaudi_calib.rankfiles.store import read_node_names
from gaudi_calib.scales.compute import compute_scales

if TYPE_CHECKING:
    from gaudi_calib.config.model import QuantConfig

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


class Recipe(NamedTuple):
    """How the scale files of one method are made.

    Attributes:
        tag: the method in their names, upper case.
        table: the method of every node.
        device: the device that will serve.
        config: what says so; None for the method's own backoffs.
    """

    tag: str
    table: MethodTable
    device: Device
    config: "QuantConfig | None" = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest records about it."""
        from gaudi_calib.config.model import QuantConfig, describe_scaling

        config = self.config or QuantConfig(scale_method=self.tag, dump_stats_path="./ranges")
        return describe_scaling(config, self.device)

    @property
    def hp_dtype(self) -> str:
        """What INC computes them in."""
        return self.config.hp_dtype if self.config else "BF16"

    @property
    def scales_device(self) -> Device:
        """The device whose FP8 range and free scales apply."""
        if self.config is None:
            return self.device
        from gaudi_calib.config.model import get_scales_device

        return get_scales_device(self.config, self.device)


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
        recipe = _find_recipe(source, tag, device)
        if isinstance(recipe, str):
            later = advise_scales(out, count, tag, model or source.advise().model)
            _log.warning("No scales of %s: %s.%s", tag, recipe, f" Afterwards run `{later}`" if later else "")
            continue
        named = _read_scaled_names(source, converted.from_world, tag, sorted(set(old_ranks)))
        names = [named[rank] for rank in old_ranks]
        if converted.choose is not None:
            names = [
                rename_modules(old, converted.inventory, tabulate_ranges(rank_set.nodes).inventory, converted.choose)
                for old, rank_set in zip(names, converted.ranks, strict=True)
            ]
        computed.append((recipe, _compute(converted.ranks, recipe, names)))
    return computed


def advise_scales(place: CalibrationDir, world: int, tag: str, model: str | None = None) -> str | None:
    """Return what computes the scales in `place` of the method called `tag`; None where no command does.

    Args:
        model: the checkpoint; None: the one that was measured.
    """
    advice = place.advise(model)
    if place.quant_config and place.quant_config.method_table.file_tag == tag:
        return advice.compute_scales(world)
    return advice.compute_scales(world, method=tag) if tag in SCALE_METHODS else None


def _find_recipe(source: CalibrationDir, tag: str, device: str | None) -> Recipe | str:
    """Tell how the scales of method `tag` in `source` are computed, from its surroundings, or why they cannot be.

    Backoffs and overrides come from the run's QUANTIZE config where its method is `tag`.
    """
    known = source.settle_device(device)
    if known is None:
        return "nothing says which device will serve (--device does)"
    if tag not in SCALE_METHODS:
        return "the method is not known"
    config = source.quant_config
    if config is not None and config.method_table.file_tag != tag:
        config = None
    table = MethodTable(SCALE_METHODS[tag]) if config is None else config.method_table
    if any(method.weight.is_per_channel or method.weight.scale_value_type == "OPT" for method in table.methods):
        return "they need the weights"
    return Recipe(tag, table, known, config)


def _read_scaled_names(
    source: CalibrationDir, world: int, tag: str, ranks: Sequence[int]
) -> dict[int, tuple[str, ...]]:
    """Return the names of the nodes that have scales on some `ranks`, after checking that no rank's file is missing."""
    files = [source.name_file(rank, world, method=tag, extension="json") for rank in range(world)]
    missing = [path for path in files if path not in source.files]
    if missing:
        raise FileError(
            f"no {tag} scales of rank {files.index(missing[0])} of {world}",
            where=missing[0],
            why="other ranks have scales of this method",
            fix="restore the file, delete the other ranks' scales, or leave scales out with --skip-scales",
        )
    return {rank: read_node_names(files[rank]) for rank in ranks}


def _compute(
    ranks: Sequence[RankSet[Node]], recipe: Recipe, names: Sequence[tuple[str, ...]]
) -> list[RankSet[ScaleNode]]:
    """Return the scales of the nodes `names`, given by rank; consecutive ranks of the same ranges are solved once."""
    scales: list[RankSet[ScaleNode]] = []
    last: tuple[RangeTable, tuple[str, ...]] | None = None
    for rank_set, chosen in zip(ranks, names, strict=True):
        table = tabulate_ranges(rank_set.nodes)
        if last is None or last[0] is not table or last[1] != chosen:
            picked = replace(rank_set, nodes=_pick_nodes(table, chosen))
            solved = compute_scales(
                picked, recipe.table, recipe.scales_device, weights=lambda _: None, hp_dtype=recipe.hp_dtype
            )
            last = table, chosen
        scales.append(replace(solved, rank=rank_set.rank, dump=rank_set.dump))
    return scales


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
