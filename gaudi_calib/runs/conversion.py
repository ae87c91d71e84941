"""What commands over directories have in common: a directory of one world becomes one of another world.

Ranges are merged or copied; scales never: they are computed anew (rescale.py).
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.layout import MANIFEST_NAME, RankFile, parse_rank_file
from gaudi_calib.moved import is_same_place, warn_of_move
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.rescale import Converted, Rescaled, rescale
from gaudi_calib.staging import REPLACED_NAME, set_aside, stage_files

if TYPE_CHECKING:
    from gaudi_calib.manifest import Record, WorldFacts

_log = logging.getLogger(__name__)

# What the manifest of a result elsewhere takes over from that of its source.
_INHERITED = (
    *("model", "dataset", "device", "platform", "engine", "dtype", "config", "measured_world"),
    *("expert_parallel", "vllm", "measurement", "merged", "merged_datasets"),
)


class Conversion(NamedTuple):
    """How a directory is turned into another world.

    Attributes:
        expert_parallel: as the user says, None to find out.
        model: checkpoint whose config.json tells the number of experts, or None.
        device: the device that will serve, where neither manifest nor directory tells.
        skips_scales: leave out the scales.
        dump: first part of the names of the measurement, where the directory holds several.
    """

    expert_parallel: bool | None = None
    model: Path | None = None
    device: str | None = None
    skips_scales: bool = False
    dump: str | None = None


def write_converted(source: CalibrationDir, out: Path, converted: Converted, options: Conversion) -> list[Path]:
    """Write ranges, scales and manifest; everything that can fail for its content has been computed before."""
    warn_of_move(source)
    model = str(options.model) if options.model else None
    scales = (
        [] if options.skips_scales else rescale(source, converted, options.device, out=CalibrationDir(out), model=model)
    )
    return write_world(source, out, converted.ranks, scales, expert_parallel=converted.expert_parallel)


def write_world(
    source: CalibrationDir,
    out: Path,
    ranks: Sequence[RankSet[Node]],
    scales: Sequence[Rescaled] = (),
    *,
    expert_parallel: bool | None,
    is_bounded: bool = False,
) -> list[Path]:
    """Write the files of all ranks of a world to `out`, and keep its manifest.

    Args:
        source: where the ranges come from.
        expert_parallel: how the experts are split; None for a model without.
        is_bounded: some outputs are upper bounds.

    Returns:
        The files written.
    """
    from gaudi_calib.manifest import WorldFacts

    facts = WorldFacts(expert_parallel=expert_parallel, is_bounded=is_bounded)
    return write_files(source, out, ranks, scales, facts=facts)


def write_files(
    source: CalibrationDir,
    out: Path,
    ranks: Sequence[RankSet[Node]],
    scales: Sequence[Rescaled] = (),
    *,
    facts: "WorldFacts | None" = None,
    keeps_ranges: bool = False,
) -> list[Path]:
    """Write rank files to `out`, and keep its manifest.

    Args:
        source: where the ranges come from.
        ranks: ranges of ranks of any worlds.
        facts: of these worlds; None: those in the source's manifest.
        keeps_ranges: leave files of ranges as they are that are there.

    Returns:
        The files written.
    """
    with _open_record(source, out) as record, stage_files(out) as staging:
        made = write_rank_sets(staging, ranks)
        kept = {path for path in made if keeps_ranges and (out / path.name).is_file()}
        for path in kept:
            path.unlink()
        for recipe, rank_sets in scales:
            made += write_rank_sets(staging, rank_sets, method=recipe.tag)
        replaced = _set_aside_outdated(out, staging, made)
        if record is not None:
            _record_worlds(record, source, {rank_set.world for rank_set in ranks}, facts)
            for recipe, rank_sets in scales:
                recipe.record(record, staging, out, rank_sets)
            record.update(files=CalibrationDir(out).hash_files(staging, without=replaced))
            record.stage(staging)
    if replaced:
        _log.warning("%d files that the new ranges replace were moved to %s", len(replaced), out / REPLACED_NAME)
    return [out / path.name for path in made if path not in kept]


def _record_worlds(record: "Record", source: CalibrationDir, worlds: set[int], facts: "WorldFacts | None") -> None:
    others = record.manifest.worlds.keys() - {1, *worlds}
    if facts is not None:
        record.update(worlds=dict.fromkeys(worlds, facts))
        if facts.expert_parallel is not None and not others:
            record.update(expert_parallel=facts.expert_parallel)
    elif source.manifest is not None:
        record.update(worlds={world: told for world, told in source.manifest.worlds.items() if world in worlds})


def _open_record(source: CalibrationDir, out: Path) -> "AbstractContextManager[Record | None]":
    """Keep the manifest of `out`; None where there is no manifest to keep.

    A result elsewhere inherits what the source's manifest says about model and data.

    Raises:
        FileError: `out` holds another measurement.
    """
    there, made = CalibrationDir(out), source.manifest
    if made is None and there.newest_manifest is None:
        return nullcontext()
    from gaudi_calib.manifest import record_run

    inherited: dict[str, Any] = {}
    if there.manifest is None and made is not None:
        inherited = {name: getattr(made, name) for name in _INHERITED} | {"history": made.steps}
    elif there.manifest and not _is_same_measurement(source, there):
        raise FileError(
            f"{out} holds another measurement than {source.path}",
            where=out / MANIFEST_NAME,
            why="one directory has the ranges of one measurement; `merge` joins several",
            fix="give -o a new directory, or the one that the ranges are from",
        )
    return record_run(out / MANIFEST_NAME, fresh=False, **inherited)


def _is_same_measurement(source: CalibrationDir, there: CalibrationDir) -> bool:
    if is_same_place(source.path, there.path):
        return True
    return source.measurement is not None and source.measurement == there.measurement


def _set_aside_outdated(out: Path, staging: Path, written: Sequence[Path]) -> list[Path]:
    """Move out of INC's sight what it must not find beside the `written` files of one measurement, and return it.

    That is scales of ranges that are about to change, and ranges of the same ranks under another name: files of INC
    without torch.distributed lack rank and world in theirs.

    Args:
        written: files of `staging`, and those of `out` that stay as they are.
    """
    new = {path.name: file for path in written if (file := parse_rank_file(path.name))}
    dump = next(iter(new.values())).dump
    changed = {
        file.position[1]
        for name, file in new.items()
        if file.is_ranges
        and file.extension == "npz"
        and (staging / name).is_file()
        and (not (out / name).is_file() or (out / name).read_bytes() != (staging / name).read_bytes())
    }
    positions = {file.position for file in new.values()}
    outdated = [
        path
        for path, file in CalibrationDir(out, dump=dump).files.items()
        if path.name not in new
        and file.observer == RankFile().observer
        and (file.position[1] in changed if file.method else file.position in positions)
    ]
    if outdated:
        set_aside(staging, outdated)
    return outdated
