"""`gaudi-calib diff`: what changed between two calibrations of one model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.config.methods import DEFAULT_METHOD
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, ModelError, UsageError
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import Device
from gaudi_calib.moved import find_calibrations
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges, tabulate_scales
from gaudi_calib.ranges.unify import gather_world
from gaudi_calib.rankfiles.store import read_scales
from gaudi_calib.runs.conversion import Conversion
from gaudi_calib.runs.recipe import find_recipe
from gaudi_calib.runs.unify import bring_to_world
from gaudi_calib.scales.compare import (
    Change,
    Clipped,
    Names,
    compare_tables,
    find_clipped,
    flatten_scales,
    list_unpaired,
)

if TYPE_CHECKING:
    from gaudi_calib.manifest import Manifest

# Facts of a manifest that tell two measurements apart.
_FACTS = ("engine", "platform", "dtype", "vllm", "measured_world", "expert_parallel")


class Setting(NamedTuple):
    """Something that is said differently on the two sides; None where it is not said."""

    name: str
    left: Any
    right: Any


class Scales(NamedTuple):
    """The scales of one side.

    Attributes:
        method: in upper case.
        is_stored: they are in files; otherwise they follow from the ranges.
        device: whose FP8 they are for.
        ranks: in rank order, flat.
    """

    method: str
    is_stored: bool
    device: Device
    ranks: list[RangeTable]


@dataclass(frozen=True)
class Difference:
    """What differs between the files of two calibrations for one device.

    Attributes:
        left, right: their directories.
        worlds: the world that the ranges of each side are of.
        world: the one they were compared at.
        nodes: those that only one side has.
        ranges: by kind of node and part, numbers that no scale comes from left out.
        scales: the same of scales; None where there are none to compare.
        uncompared: why there are none.
        methods: how the scales of either side are made, and whether they were read or computed.
        clipped: ranges of the right side that the scales of the left side clip, the worst first.
        settings: of the configs that serve.
        origin: how the two were measured.
    """

    left: Path
    right: Path
    worlds: tuple[int, int]
    world: int
    nodes: Names
    ranges: list[Change]
    scales: list[Change] | None = None
    uncompared: str | None = None
    methods: tuple[str, ...] = ()
    clipped: list[Clipped] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    origin: list[Setting] = field(default_factory=list)

    def has(self, kind: str) -> bool:
        """Tell whether there is a difference of a kind.

        Args:
            kind: `scales` are what a deployment reads: nodes, scales and the QUANTIZE config; `ranges` are those and
                the ranges; `clipped` are ranges that the left side's scales clip.
        """
        if kind == "clipped":
            return bool(self.clipped)
        served = any(change.differing for change in self.scales or ()) or any(self.nodes) or bool(self.settings)
        return served or (kind == "ranges" and any(change.differing for change in self.ranges))


def diff_paths(
    left: Path, right: Path, *, world: int | None = None, device: str | None = None, options: Conversion | None = None
) -> list[Difference]:
    """Compare two calibrations of one model, device by device.

    Args:
        left, right: a run, one of its device directories, any directory of ranges, or a QUANT_CONFIG file.
        world: number of ranks to compare at; None takes the largest that both sides have or can be unified to.
        device: the only device to compare; for directories that do not tell, the one whose scales are meant.
        options: how experts are shared, where the files do not tell; and which measurement is meant on a side that
            holds several.

    Raises:
        FileError: ranges are missing or damaged. ModelError: the two are of different models.
        UsageError: the sides are not for a device that both have. TopologyError: see `bring_to_world`.
    """
    options = options or Conversion()
    sides = [find_calibrations(expand_path(path), options.dump) for path in (left, right)]
    return [_diff_places(one, other, world, device, options) for one, other in _pair(sides, device)]


def _pair(
    sides: Sequence[Mapping[str, CalibrationDir]], device: str | None
) -> list[tuple[CalibrationDir, CalibrationDir]]:
    """Return the directories of the same device, or the only ones there are."""
    first, second = ({name: place for name, place in side.items() if device in (None, name)} or side for side in sides)
    shared = [name for name in first if name in second]
    if shared:
        return [(first[name], second[name]) for name in shared]
    if len(first) == len(second) == 1:
        return list(zip(first.values(), second.values(), strict=True))
    told = " and ".join(", ".join(filter(None, side)) or "a device that it does not tell" for side in (first, second))
    raise UsageError(
        f"the two are not for the same device: {told}",
        where=", ".join(str(place.path) for place in (*first.values(), *second.values())),
        fix="give a device directory of each (OUT/<model>/g3), or --device",
    )


def _diff_places(
    left: CalibrationDir, right: CalibrationDir, world: int | None, device: str | None, options: Conversion
) -> Difference:
    worlds, world = _choose_worlds(left, right, world)
    ranks = [
        gather_world(place.read_world(own)).ranks if own == world else bring_to_world(place, own, world, options).ranks
        for place, own in zip((left, right), worlds, strict=True)
    ]
    tables = [[tabulate_ranges(rank.nodes) for rank in side] for side in ranks]
    nodes = list_unpaired(tables[0][0].inventory, tables[1][0].inventory)
    if len(nodes.left) == len(tables[0][0]):
        raise ModelError(
            "the two have no node in common",
            where=f"{left.path} and {right.path}",
            why=f"the first of each are {nodes.left[0]} and {nodes.right[0]}",
            fix="compare calibrations of one model",
        )
    scales = [_take_scales(place, side, device) for place, side in zip((left, right), ranks, strict=True)]
    found = Difference(
        left.path,
        right.path,
        worlds,
        world,
        nodes,
        compare_tables(*tables, read_only=True),
        settings=_compare_settings(_list_settings(left), _list_settings(right)),
        origin=_compare_settings(_list_facts(left.manifest), _list_facts(right.manifest)),
    )
    one, other = scales
    if isinstance(one, str) or isinstance(other, str):
        return replace(found, uncompared=one if isinstance(one, str) else str(other))
    return replace(
        found,
        scales=compare_tables(one.ranks, other.ranks, read_only=False),
        methods=tuple(f"{side.method.lower()}, {'stored' if side.is_stored else 'computed'}" for side in (one, other)),
        clipped=find_clipped(tables[1], one.ranks, one.device),
    )


def _choose_worlds(left: CalibrationDir, right: CalibrationDir, world: int | None) -> tuple[tuple[int, int], int]:
    """Return the world of each side to read, and the one to compare at."""
    pairs = [(one, other) for one in left.require_worlds() for other in right.require_worlds()]
    fitting = [(math.gcd(*pair), pair) for pair in pairs if world is None or (pair[0] % world == pair[1] % world == 0)]
    if not fitting:
        raise FileError(
            f"the two cannot be compared at {world} ranks",
            where=f"{left.path} and {right.path}",
            why="they hold world sizes " + " and ".join(", ".join(map(str, place.worlds)) for place in (left, right)),
            fix="give -t a number that divides a world of each side",
        )
    common, pair = max(fitting, key=lambda found: (world or found[0], -sum(found[1])))
    return pair, world or common


def _take_scales(place: CalibrationDir, ranks: Sequence[RankSet[Node]], device: str | None) -> Scales | str:
    """Return the scales of `ranks`: those in the files, else what the run's method gives; or why there are none."""
    world, config = len(ranks), place.quant_config
    stored = [tag for tag in place.list_methods(world) if len(place.find_scales(world, tag)) == world]
    tag = config.method_table.file_tag if config else next(iter(stored), DEFAULT_METHOD.upper())
    recipe = find_recipe(place, tag, device)
    known = place.settle_device(device)
    if tag in stored and known is not None:
        place.require_recorded(place.list_scales(world, tag))
        scales = [read_scales(path) for path in place.find_scales(world, tag).values()]
    elif isinstance(recipe, str):
        return recipe
    else:
        scales = list(recipe.compute(recipe.select(ranks), allows_idle=True))
    assert known is not None
    flat = [flatten_scales(tabulate_scales(rank.nodes)) for rank in scales]
    return Scales(tag, tag in stored, known if isinstance(recipe, str) else recipe.scales_device, flat)


def _compare_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Setting]:
    names = dict.fromkeys([*left, *right])
    pairs = ((name, left.get(name), right.get(name)) for name in names)
    return [Setting(name, one, other) for name, one, other in pairs if one != other]


def _list_settings(place: CalibrationDir) -> dict[str, Any]:
    """Return the keys of the config that serves, but for the place of its files."""
    if place.quant_config is None:
        return {}
    from gaudi_calib.config.model import to_content

    return {name: value for name, value in to_content(place.quant_config).items() if name != "dump_stats_path"}


def _list_facts(manifest: "Manifest | None") -> dict[str, Any]:
    """Return what a manifest says about model, data and how they were measured."""
    if manifest is None:
        return {}
    facts = {name: getattr(manifest, name) for name in _FACTS} | {"preset": manifest.preset.name}
    if manifest.model:
        facts |= {"model": manifest.model.name, "model.fingerprint": manifest.model.fingerprint}
    if manifest.dataset:
        facts |= {f"dataset.{name}": getattr(manifest.dataset, name) for name in ("name", "hash", "prompts", "tokens")}
    facts |= {f"measure.{name}": value for name, value in manifest.config.get("measure", {}).items()}
    return facts | {f"versions.{name}": version for name, version in manifest.versions.items()}
