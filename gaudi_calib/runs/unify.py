"""Directories of ranks into fewer ranks, or into more. Ranges are merged, scales never: they are computed anew."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from gaudi_calib.errors import FileError
from gaudi_calib.files import REPLACED_NAME, set_aside, stage_files
from gaudi_calib.layout import MANIFEST_NAME, RankFile, parse_rank_file
from gaudi_calib.ranges.experts import Choose, choose_joined, choose_part, rename_modules
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import Inventory, tabulate_ranges
from gaudi_calib.ranges.unify import expand_ranks, gather_world, unify_ranks
from gaudi_calib.rankfiles.background import BackgroundWriter
from gaudi_calib.rankfiles.store import list_worlds, read_world_dir, render_rank_sets
from gaudi_calib.runs.evidence import find_evidence, settle_expert_parallel
from gaudi_calib.runs.provenance import note_scales, record_conversion
from gaudi_calib.runs.rescale import Recipe, find_methods, find_recipe, read_scaled_names, recompute_scales

_log = logging.getLogger(__name__)


class Conversion(NamedTuple):
    """How a directory is turned into another world.

    Attributes:
        expert_parallel: as the user says, None to find out.
        model: checkpoint whose config.json tells the number of experts, or None.
        device: the device that will serve, where neither manifest nor directory tells.
        skips_scales: leave out the scales.
    """

    expert_parallel: bool | None = None
    model: Path | None = None
    device: str | None = None
    skips_scales: bool = False


class _Result(NamedTuple):
    """Ranks of the new world.

    Attributes:
        source: the world they come from.
        inventory: nodes of its ranks.
        ranks: in rank order.
        choose: which experts a rank has of those of its source rank, None where all are the same.
        expert_parallel: how experts are split, None without experts.
    """

    source: int
    inventory: Inventory
    ranks: list[RankSet[Node]]
    choose: Choose | None
    expert_parallel: bool | None

    def equals(self, other: "_Result") -> bool:
        tables = [[tabulate_ranges(rank.nodes) for rank in one.ranks] for one in (self, other)]
        return all(
            left.inventory.equals(right.inventory) and (left.numbers == right.numbers).all()
            for left, right in zip(*tables, strict=True)
        )


@contextmanager
def pause_collector() -> Iterator[None]:
    """Keep Python's cycle collector from walking the many small objects of a rank again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@pause_collector()
def unify_dir(
    directory: Path, world: int, out: Path, *, source_world: int | None = None, conversion: Conversion | None = None
) -> list[Path]:
    """Unify the ranks in `directory`, and write them and their scales to `out`.

    Args:
        world: ranks that remain.
        out: where the results go; may be `directory` itself.
        source_world: the world to merge; None takes the only one larger than
            `world` that `world` divides, else the measured one, else any where all give the same.

    Returns:
        The files written.

    Raises:
        FileError: a rank is missing or malformed, or several worlds could be meant; nothing is written.
        TopologyError, RangeError: see `gather_world`, `settle_expert_parallel`, `unify_ranks`.
    """
    conversion = conversion or Conversion()
    sources = [source_world] if source_world else _find_sources(directory, world)
    result, *others = [_unify_world(directory, source, world, conversion) for source in sources]
    if not all(other.equals(result) for other in others):
        raise FileError(
            f"several measurements could be unified into {world}: world sizes {', '.join(map(str, sources))}",
            where=directory,
            why="they give different ranges",
            fix="say which with --from-world N",
        )
    return _write_result(directory, out, result, conversion)


@pause_collector()
def expand_dir(
    directory: Path, world: int, out: Path, *, source_world: int = 1, conversion: Conversion | None = None
) -> list[Path]:
    """Expand the ranks of `source_world` in `directory` to `world` ranks; write those and their scales to `out`.

    Returns:
        The files written.

    Raises:
        FileError: a rank of `source_world` is missing or malformed; nothing is written.
        TopologyError, RangeError: see `gather_world`, `settle_expert_parallel`, `expand_ranks`.
    """
    conversion = conversion or Conversion()
    ranks = gather_world(_read_ranks(directory, source_world))
    evidence = find_evidence(directory, ranks, conversion.model)
    if source_world == 1 and conversion.expert_parallel is not None:
        evidence = []  # one rank has all experts; how they are dealt out is free to choose
    split = settle_expert_parallel(ranks, conversion.expert_parallel, evidence)
    expanded = expand_ranks(ranks, world, expert_parallel=split)
    choose = choose_part(world // source_world, 0) if split else None
    result = _Result(source_world, ranks.inventory, expanded, choose, split if ranks.layers else None)
    return _write_result(directory, out, result, conversion)


def _unify_world(directory: Path, source: int, world: int, conversion: Conversion) -> _Result:
    ranks = gather_world(_read_ranks(directory, source))
    split = source > 1 and settle_expert_parallel(
        ranks, conversion.expert_parallel, find_evidence(directory, ranks, conversion.model)
    )
    merged = unify_ranks(ranks, world, expert_parallel=split)
    return _Result(
        source,
        ranks.inventory,
        merged,
        choose_joined(source // world) if split else None,
        split if ranks.layers else None,
    )


def _read_ranks(directory: Path, world: int) -> list[RankSet[Node]]:
    """Read a world, unless two sets of files could be it."""
    names = [(path.name, parse_rank_file(path.name)) for path in sorted(directory.iterdir())]
    firsts = [
        name
        for name, file in names
        if file and (file.method, file.is_mod_list, file.extension) == (None, False, "json")
        if file.observer == "maxabs" and (file.rank or 0, file.world or 1) == (0, world)
    ]
    if len(firsts) > 1:
        raise FileError(
            f"several files are rank 0 of {world}: {', '.join(firsts)}",
            where=directory,
            why="they are of different measurements",
            fix="move one of the measurements to a directory of its own",
        )
    return read_world_dir(directory, world)


def _find_sources(directory: Path, world: int) -> list[int]:
    """Return the worlds that may be meant: one, or several that have to give the same."""
    worlds = list(list_worlds(directory))
    candidates = [one for one in worlds if one > world and one % world == 0]
    if not candidates:
        raise FileError(
            f"nothing to unify into {world}: the directory holds world sizes {', '.join(map(str, worlds)) or 'none'}",
            where=directory,
            fix="measure with a larger -t that the target divides, or check the directory",
        )
    if len(candidates) > 1 and (directory / MANIFEST_NAME).is_file():
        from gaudi_calib.manifest import read_manifest

        manifest = read_manifest(directory / MANIFEST_NAME).good
        if manifest is not None and manifest.topology.measured_world in candidates:
            return [manifest.topology.measured_world]
    return candidates[::-1]


def _write_result(directory: Path, out: Path, result: _Result, conversion: Conversion) -> list[Path]:
    """Write ranges, scales and manifest; everything that can fail for its content has been computed before."""
    scales = [] if conversion.skips_scales else _recompute(directory, result, conversion.device)
    world = len(result.ranks)
    with ExitStack() as stack:
        record = stack.enter_context(record_conversion(directory, out, world, expert_parallel=result.expert_parallel))
        with stage_files(out) as staging:
            with BackgroundWriter() as writer:
                written = render_rank_sets(staging, result.ranks, writer)
                for recipe, rank_sets in scales:
                    written += render_rank_sets(staging, rank_sets, writer, method=recipe.tag)
            set_aside_scales(out, staging, world, {path.name for path in written})
        if record is not None:
            for recipe, rank_sets in scales:
                note_scales(record, out, _name_origins(rank_sets, recipe.tag), recipe.settings)
    return [out / path.name for path in written]


def _recompute(directory: Path, result: _Result, device: str | None) -> list[tuple[Recipe, list[RankSet[ScaleNode]]]]:
    """Compute scales of the new ranks for every method the old ones have."""
    computed = []
    for tag in find_methods(directory, result.source):
        recipe = find_recipe(directory, tag, device)
        if recipe is None:
            continue
        count = len(result.ranks)
        sources = [rank * result.source // count for rank in range(count)]
        named = read_scaled_names(directory, result.source, tag, sorted(set(sources)))
        names = [named[source] for source in sources]
        if result.choose is not None:
            tables = [tabulate_ranges(rank.nodes) for rank in result.ranks]
            names = [
                rename_modules(one, result.inventory, table.inventory, result.choose)
                for one, table in zip(names, tables, strict=True)
            ]
        computed.append((recipe, recompute_scales(result.ranks, recipe, names)))
    return computed


def _name_origins(rank_sets: Sequence[RankSet[ScaleNode]], tag: str) -> dict[str, str]:
    """Return the range file by scale file."""
    origins = {}
    for one in rank_sets:
        ranges = RankFile(dump=one.dump, rank=one.rank, world=one.world, extension="npz").name
        for extension in ("json", "npz"):
            scale = RankFile(dump=one.dump, method=tag, rank=one.rank, world=one.world, extension=extension)
            origins[scale.name] = ranges
    return origins


def set_aside_scales(out: Path, staging: Path, world: int, written: set[str]) -> None:
    """Move scale files of ranges that are about to change out of INC's sight: it would go on using them."""
    changed = any(
        not (out / name).is_file() or (out / name).read_bytes() != (staging / name).read_bytes()
        for name in written
        if (file := parse_rank_file(name)) and file.method is None and name.endswith(".npz")
    )
    old = [
        path
        for path in sorted(out.iterdir())
        if (file := parse_rank_file(path.name)) and file.method and (file.world or 1) == world
        if path.name not in written
    ]
    if not changed or not old:
        return
    set_aside(old)
    _log.warning("%d scale files of earlier ranges were moved to %s", len(old), out / REPLACED_NAME)
