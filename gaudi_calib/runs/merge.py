"""`gaudi-calib merge`: directories of several runs of one model into one.

A directory is a device directory (`OUT/<model>/g3`), or a run (`OUT/<model>`) with device
directories and `channel_ranges.safetensors`. Only what every directory has is merged:
a world, device or channel file of some of them would lack what the others saw. Ranks of
one world may lie in different directories. Scales are never merged.
"""

import logging
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaudi_calib.advice import chain
from gaudi_calib.directory import CalibrationDir, list_devices
from gaudi_calib.errors import FileError, ModelError, UsageError
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import DEVICES
from gaudi_calib.layout import CHANNEL_RANGES_NAME, CONVERGENCE_NAME, MANIFEST_NAME, RankFile, list_rank_files
from gaudi_calib.manifest import Manifest, WorldFacts, record_run
from gaudi_calib.moved import warn_of_move
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.merge import merge_channels, merge_ranks
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.channel_file import read_channel_ranges, write_channel_ranges
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.recipe import advise_scales
from gaudi_calib.staging import REPLACED_NAME, set_aside, stage_files

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """One of the directories to merge.

    Attributes:
        path: as given.
        devices: its device directories by name; `{"": path}` where it is one itself.
        has_channels: whether it holds channel ranges.
    """

    path: Path
    devices: Mapping[str, CalibrationDir]
    has_channels: bool

    @property
    def is_device_dir(self) -> bool:
        return "" in self.devices


def merge_dirs(directories: Sequence[Path], out: Path, *, dump: str | None = None) -> list[Path]:
    """Merge the ranges in `directories` and write them to `out`.

    Args:
        out: a directory of the same kind; may be one of `directories`. Its rank files
            that the result makes stale (scales, other worlds) move to `replaced/`.
        dump: first part of the names of the measurement, where directories hold several.

    Returns:
        The files written, manifests left out.

    Raises:
        UsageError: fewer than two directories, or of different kinds.
        FileError: there is nothing to merge, or a rank is missing or malformed.
        ModelError: the directories are of different models, checkpoints or devices.
        TopologyError, RangeError: see `merge_ranks`.
            Nothing is written in any of these cases.
    """
    if len(directories) < 2:
        raise UsageError(
            "nothing to merge with",
            where=", ".join(map(str, directories)),
            fix="give the directories of two or more runs",
        )
    out = expand_path(out)
    runs = _find_runs([expand_path(path) for path in directories], dump)
    for places in (list(run.devices.values()) for run in runs if run.devices):
        warn_of_move(places[0])
    _check_kind(out, runs)
    manifests = {device: _read_manifests([run.devices[device] for run in runs]) for device in _shared_devices(runs)}
    channels = _merge_channel_files(runs)
    ranges = {device: _merge_device([run.devices[device] for run in runs]) for device in manifests}
    if channels is None and not any(ranges.values()):
        raise FileError(
            "the directories have no ranges of the same world size in common",
            where=", ".join(str(run.path) for run in runs),
            why="; ".join(f"{run.path} has {_describe_worlds(run)}" for run in runs),
            fix="; or ".join(["measure each run with the same -t", *_advise_common_world(runs)]),
        )
    written = _write(out, ranges, channels, manifests, runs, dump)
    _log.info("Scales are not merged.%s", _advise_scales(out, ranges, runs))
    return written


def _advise_common_world(runs: Sequence[_Run]) -> list[str]:
    """What brings rank files of all runs to the largest world that all can be unified to."""
    advices = [place.advise() for run in runs for place in run.devices.values()]
    if not all(run.devices for run in runs) or not all(advice.worlds for advice in advices):
        return []
    world = math.gcd(*(max(advice.worlds) for advice in advices))
    commands = [advice.convert(world) for advice in advices if world not in advice.worlds]
    return [f"bring all to {world} rank{'s' * (world > 1)} first: {chain(*commands)}"]


def _advise_scales(out: Path, ranges: Mapping[str, Sequence[RankSet[Node]]], runs: Sequence[_Run]) -> str:
    """What computes the scales of the merged ranges, by the methods that the runs have any of, or by the default."""
    commands = []
    for device, rank_sets in ranges.items():
        place, sources = CalibrationDir(out / device), [run.devices[device] for run in runs]
        known = next((source.device for source in sources if source.device), None)
        for world in sorted({ranks.world for ranks in rank_sets}):
            methods = sorted({method for source in sources for method in source.list_methods(world)})
            commands += [advise_scales(place, world, method, device=known) for method in (methods or (None,))]
    return f" To compute them: {chain(*commands)}" if any(commands) else " In a run, OUT/<model>, they can be computed"


def _find_runs(directories: Sequence[Path], dump: str | None) -> list[_Run]:
    """Return the distinct ones of `directories`."""
    runs = []
    for path in {path.resolve(): path for path in directories}.values():
        devices = list_devices(path, dump)
        runs.append(_Run(path, devices, "" not in devices and (path / CHANNEL_RANGES_NAME).is_file()))
        if not runs[-1].devices and not runs[-1].has_channels:
            raise FileError(
                "no ranges to merge",
                where=path,
                why="it is neither a device directory (OUT/<model>/g3) nor a run (OUT/<model>)",
                fix="give the directory of a measurement",
            )
    kinds = {run.is_device_dir: run.path for run in runs}
    if len(kinds) > 1:
        raise UsageError(
            "cannot merge a device directory with a whole run",
            where=f"{kinds[True]} and {kinds[False]}",
            fix=f"give {kinds[False]}/<device> too, or the parent of {kinds[True]}",
        )
    names = {run.path.resolve().name for run in runs} & set(DEVICES)
    if runs[0].is_device_dir and len(names) > 1:
        _refuse_devices(runs[0].path, names)
    return runs


def _check_kind(out: Path, runs: Sequence[_Run]) -> None:
    """Raise UsageError where `out` holds a directory of the other kind."""
    has_parts = (out / CHANNEL_RANGES_NAME).is_file() or any((out / device).is_dir() for device in DEVICES)
    has_ranks = any(file.is_ranges for file in list_rank_files(out).values())
    if has_parts if runs[0].is_device_dir else has_ranks:
        kinds = ("a whole run", "a device") if has_parts else ("a device", "whole runs")
        raise UsageError(
            f"-o is the directory of {kinds[0]}, and the merged directories are those of {kinds[1]}",
            where=out,
            fix="give a new directory, or one of the same kind",
        )


def _shared_devices(runs: Sequence[_Run]) -> list[str]:
    found = sorted({device for run in runs for device in run.devices})
    return [name for name in found if _all_have(f"ranges of {name}", {run.path: name in run.devices for run in runs})]


def _all_have(what: str, present: Mapping[Path, bool]) -> bool:
    """Tell whether all directories have `what`; warn where only some do."""
    lacking = [str(path) for path, here in present.items() if not here]
    if lacking and len(lacking) < len(present):
        _log.warning("%s are left out: %s has none, and they would lack what it measured", what, ", ".join(lacking))
    return not lacking


def _merge_channel_files(runs: Sequence[_Run]) -> ChannelRanges | None:
    if not _all_have("channel ranges", {run.path: run.has_channels for run in runs}):
        return None
    for place in (place for run in runs for place in run.devices.values()):
        _require_channels(place, {run.path.resolve() for run in runs})
    paths = [run.path / CHANNEL_RANGES_NAME for run in runs]
    return merge_channels([read_channel_ranges(path) for path in paths], paths)


def _require_channels(place: CalibrationDir, joined: Container[Path]) -> None:
    """Check that channel ranges lack nothing of `place`, unless what they lack is among the runs that are `joined`."""
    merged = place.manifest.merged if place.manifest else []
    if not (merged and all(Path(path).parent in joined for path in merged)):
        place.require_channels()


def _merge_device(places: Sequence[CalibrationDir]) -> list[RankSet[Node]]:
    """Return all ranks of all worlds that every directory has."""
    merged = []
    for world in sorted({world for place in places for world in place.worlds}):
        if _all_have(f"ranges of world size {world}", {place.path: world in place.worlds for place in places}):
            merged += _merge_world(world, places)
    return merged


def _merge_world(world: int, places: Sequence[CalibrationDir]) -> list[RankSet[Node]]:
    """Merge each rank of `world` over the directories that hold it.

    Raises:
        FileError: no directory holds some rank.
    """
    counts = [sum(rank in place.worlds[world] for place in places) for rank in range(world)]
    if 0 in counts:
        missing = RankFile(rank=counts.index(0), world=world)
        raise FileError(
            f"no ranges of rank {missing.rank} of {world} in any of the directories",
            where=missing.name,
            why="searched " + ", ".join(str(place.path) for place in places),
            fix=f"add the directory of the machine that ran rank {missing.rank}; "
            f"or move the files of world size {world} away to merge the others",
        )
    if len(set(counts)) > 1:
        rank = counts.index(min(counts))
        lacking = [str(place.path) for place in places if rank not in place.worlds[world]]
        _log.warning(
            "rank %d of %d is in fewer directories than other ranks: its ranges lack what %s measured",
            rank, world, ", ".join(lacking),
        )  # fmt: skip
    merged = []
    for rank in range(world):
        having = [place for place in places if rank in place.worlds[world]]
        rank_sets = [rank_set for place in having for rank_set in place.read_ranks([place.worlds[world][rank]])]
        merged.append(merge_ranks(rank_sets, [place.path for place in having]))
    return merged


def _describe_worlds(run: _Run) -> str:
    worlds = sorted({world for place in run.devices.values() for world in place.worlds})
    return "world size " + ", ".join(map(str, worlds)) if worlds else CHANNEL_RANGES_NAME


def _read_manifests(places: Sequence[CalibrationDir]) -> list[Manifest]:
    """Return the manifests there are, of the files in place.

    Raises:
        ModelError: they are of different checkpoints, devices or types of the model.
    """
    manifests = [place.manifest for place in places if place.manifest is not None]
    models = [manifest.model for manifest in manifests if manifest.model and manifest.model.fingerprint]
    prints = {model.fingerprint: model.name for model in models}
    if len(prints) > 1:
        raise ModelError(
            "the runs measured different checkpoints",
            where=", ".join(str(place.path) for place in places),
            why="the manifests name " + " and ".join(f"{name} ({print_})" for print_, name in prints.items()),
            fix="merge only runs of the same checkpoint",
        )
    devices = {manifest.device for manifest in manifests if manifest.device}
    if len(devices) > 1:
        _refuse_devices(places[0].path, devices)
    dtypes = {manifest.dtype for manifest in manifests if manifest.dtype}
    if len(dtypes) > 1:
        raise ModelError(
            f"the runs are for different types of the model: {', '.join(sorted(dtypes))}",
            where=", ".join(str(place.path) for place in places),
            why="weights were rounded to the type before they were measured (--dtype)",
            fix="merge only runs of one type",
        )
    return manifests


def _refuse_devices(where: Path, devices: Iterable[str]) -> None:
    raise ModelError(
        f"the runs are for different devices: {', '.join(sorted(devices))}",
        where=where,
        why="other tensors pass through the block-to-batch matmuls of each, and their ranges differ",
        fix="merge g2 with g2 and g3 with g3, or give the runs' own directories, OUT/<model>",
    )


def _write(
    out: Path,
    ranges: Mapping[str, Sequence[RankSet[Node]]],
    channels: ChannelRanges | None,
    manifests: Mapping[str, Sequence[Manifest]],
    runs: Sequence[_Run],
    dump: str | None,
) -> list[Path]:
    written: list[Path] = []
    sources = [run.path for run in runs]
    with stage_files(out) as staging:
        if channels is not None:
            write_channel_ranges(staging / CHANNEL_RANGES_NAME, channels)
            written.append(staging / CHANNEL_RANGES_NAME)
        for device, rank_sets in ranges.items():
            if rank_sets:
                written += write_rank_sets(staging / device, rank_sets)
                facts = _gather_facts(manifests[device], sources, sorted({ranks.world for ranks in rank_sets}))
                placed = CalibrationDir(staging / device)
                measurement = placed.identify(staging / CHANNEL_RANGES_NAME if channels is not None else None)
                with record_run(placed.path / MANIFEST_NAME, measurement=measurement, **facts) as record:
                    record.update(files=placed.hash_files())
        results = [out / path.relative_to(staging) for path in written]
        stale = _find_stale(out, results, dump, is_device_dir=runs[0].is_device_dir)
        set_aside(staging, stale)
    for directory in sorted({path.parent for path in stale}):
        _log.warning("files that the merged ranges make stale were moved to %s", directory / REPLACED_NAME)
    return results


def _gather_facts(manifests: Sequence[Manifest], sources: Sequence[Path], worlds: Iterable[int]) -> dict[str, Any]:
    """Return what the manifest of merged ranges says about where they come from."""
    steps = {step.model_dump_json(): step for manifest in manifests for step in manifest.steps}
    facts: dict[str, Any] = {
        "history": sorted(steps.values(), key=lambda step: step.started_at),
        "expert_parallel": any(manifest.expert_parallel for manifest in manifests) if manifests else None,
        "merged": [str(path.resolve()) for path in sources],
        "merged_datasets": [
            *(dataset for manifest in manifests for dataset in manifest.merged_datasets),
            *(manifest.dataset for manifest in manifests if manifest.dataset),
        ],
    }
    for name in ("model", "vllm"):
        facts[name] = next(filter(None, (getattr(manifest, name) for manifest in manifests)), None)
    for name in ("device", "platform", "engine", "dtype", "measured_world"):
        values = {getattr(manifest, name) for manifest in manifests}
        facts[name] = values.pop() if len(values) == 1 else None
    if manifests and all(manifest.preset == manifests[0].preset for manifest in manifests):
        facts["preset"] = manifests[0].preset
    configs = [manifest.config["measure"] for manifest in manifests if "measure" in manifest.config]
    if configs and all(config.get("blocklist") == configs[0].get("blocklist") for config in configs):
        facts["config"] = {"measure": configs[0]}  # which nodes are blocked, for worlds that are derived later
    facts["worlds"] = {world: _join_worlds([manifest.worlds.get(world) for manifest in manifests]) for world in worlds}
    return facts


def _join_worlds(told: Iterable[WorldFacts | None]) -> WorldFacts:
    known = [facts for facts in told if facts is not None]
    shared = known[0].expert_parallel if known else None
    return WorldFacts(expert_parallel=shared, is_bounded=any(facts.is_bounded for facts in known))


def _find_stale(out: Path, written: Iterable[Path], dump: str | None, *, is_device_dir: bool) -> list[Path]:
    """Return what the merged ranges make stale."""
    old = [out / CHANNEL_RANGES_NAME, out / CONVERGENCE_NAME]
    for directory in (out,) if is_device_dir else (out / device for device in DEVICES):
        old += CalibrationDir(directory, dump=dump).files
    return [path for path in sorted(set(old) - set(written)) if path.is_file()]
