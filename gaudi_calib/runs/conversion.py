"""What unify, expand and reshard have in common: a directory of one world becomes one of another world.

Ranges are merged or copied; scales never: they are computed anew (rescale.py).
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import REPLACED_NAME, hash_file, set_aside, stage_files
from gaudi_calib.layout import MANIFEST_NAME, RankFile, parse_rank_file
from gaudi_calib.ranges.node import RankSet, ScaleNode
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.rescale import Converted, Recipe, rescale

if TYPE_CHECKING:
    from gaudi_calib.manifest import Manifest, Record

_log = logging.getLogger(__name__)

# What the manifest of a result elsewhere takes over from that of its source.
_INHERITED = (
    *("model", "dataset", "device", "platform", "engine", "config", "measured_world"),
    *("expert_parallel", "vllm", "merged", "merged_datasets"),
)


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


def write_converted(source: CalibrationDir, out: Path, converted: Converted, options: Conversion) -> list[Path]:
    """Write ranges, scales and manifest; everything that can fail for its content has been computed before."""
    scales = [] if options.skips_scales else rescale(source, converted, options.device)
    world = len(converted.ranks)
    with record_world(source, out, world, expert_parallel=converted.expert_parallel) as record:
        with stage_files(out) as staging:
            written = write_rank_sets(staging, converted.ranks)
            for recipe, rank_sets in scales:
                written += write_rank_sets(staging, rank_sets, method=recipe.tag)
            set_aside_scales(out, staging, world, {path.name for path in written})
        if record is not None:
            for recipe, rank_sets in scales:
                _record_scales(record, out, rank_sets, recipe)
    return [out / path.name for path in written]


@contextmanager
def record_world(
    source: CalibrationDir, out: Path, world: int, *, expert_parallel: bool | None, is_bounded: bool = False
) -> "Iterator[Record | None]":
    """Keep the manifest of `out` while files of `world` are written; None where there is no manifest to keep.

    A result elsewhere inherits what the source's manifest says about model and data.

    Args:
        expert_parallel: how the experts of `world` are split; None for a model without.
        is_bounded: some outputs are upper bounds.
    """
    target = out / MANIFEST_NAME
    if not (source.path / MANIFEST_NAME).is_file() and not target.is_file():
        yield None
        return
    from gaudi_calib.manifest import WorldFacts, record_run

    inherited = _inherit(source.manifest) if source.manifest and not target.is_file() else {}
    with record_run(target, fresh=False, **inherited) as record:
        others = record.manifest.worlds.keys() - {1, world}
        record.update(worlds={world: WorldFacts(expert_parallel=expert_parallel, is_bounded=is_bounded)})
        if expert_parallel is not None and not others:
            record.update(expert_parallel=expert_parallel)
        yield record
        record.update(files=CalibrationDir(out).hash_files())


def _inherit(manifest: "Manifest") -> dict:
    return {"history": manifest.steps, **{name: getattr(manifest, name) for name in _INHERITED}}


def _record_scales(record: "Record", out: Path, rank_sets: Iterable[RankSet[ScaleNode]], recipe: Recipe) -> None:
    """Note which ranges the scale files in `out` were computed from."""
    from gaudi_calib.manifest import ScaleOrigin

    for rank_set in rank_sets:
        ranges = RankFile(rank_set.dump, rank=rank_set.rank, world=rank_set.world, extension="npz").name
        origin = ScaleOrigin(ranges={ranges: hash_file(out / ranges)}, settings=recipe.settings)
        scales = RankFile(rank_set.dump, method=recipe.tag, rank=rank_set.rank, world=rank_set.world)
        names = (scales.name, scales.name.replace(".json", ".npz"))
        record.update(scales=dict.fromkeys(names, origin))


def set_aside_scales(out: Path, staging: Path, world: int, written: set[str]) -> None:
    """Move scale files of ranges that are about to change out of INC's sight: it would go on using them."""
    changed = any(
        not (out / name).is_file() or (out / name).read_bytes() != (staging / name).read_bytes()
        for name in written
        if (file := parse_rank_file(name)) and file.is_ranges and file.extension == "npz"
    )
    old = [path for path in CalibrationDir(out).list_scales(world) if path.name not in written]
    if not changed or not old:
        return
    set_aside(old)
    _log.warning("%d scale files of earlier ranges were moved to %s", len(old), out / REPLACED_NAME)
