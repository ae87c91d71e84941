"""Directories of several runs of one model into one: `gaudi-calib merge`.

A directory is a device directory (`OUT/<model>/g3`), or a run (`OUT/<model>`) with device
directories and `channel_ranges.safetensors`. Only what every directory has is merged:
a world, device or channel file of some of them would lack what the others saw. Ranks of
one world may lie in different directories. Scales are never merged.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaudi_calib.errors import FileError, ModelError, UsageError
from gaudi_calib.files import REPLACED_NAME, set_aside, stage_files
from gaudi_calib.fp8 import DEVICES
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME, RankFile, parse_rank_file
from gaudi_calib.manifest import Manifest, Step, Topology, hash_files, read_manifest, record_run
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.merge import combine_channels, combine_ranks
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.channel_file import read_channel_ranges, write_channel_ranges
from gaudi_calib.rankfiles.store import list_worlds, read_ranges, write_rank_set

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
    devices: Mapping[str, Path]
    has_channels: bool

    @property
    def is_device_dir(self) -> bool:
        return "" in self.devices


def combine_dirs(directories: Sequence[Path], out: Path) -> list[Path]:
    """Merge the ranges in `directories` and write them to `out`.

    Args:
        out: a directory of the same kind; may be one of `directories`. Its rank files
            that the result makes stale (scales, other worlds) move to `replaced/`.

    Returns:
        The files written, manifests left out.

    Raises:
        UsageError: fewer than two directories, or of different kinds.
        FileError: there is nothing to merge, or a rank is missing or malformed.
        ModelError: the directories are of different models, checkpoints or devices.
        TopologyError, RangeError: see `combine_ranks`.
            Nothing is written in any of these cases.
    """
    if len(directories) < 2:
        raise UsageError("nothing to merge with", where=directories, fix="give the directories of two or more runs")
    runs = _find_runs(directories)
    _check_kind(out, runs)
    manifests = {device: _read_manifests([run.devices[device] for run in runs]) for device in _shared_devices(runs)}
    channels = _combine_channel_files(runs)
    ranges = {device: _combine_device([run.devices[device] for run in runs]) for device in manifests}
    if channels is None and not any(ranges.values()):
        raise FileError(
            "the directories have no ranges of the same world size in common",
            where=", ".join(str(run.path) for run in runs),
            why="; ".join(f"{run.path} has {_describe_worlds(run)}" for run in runs),
            fix="measure each run with the same -t, or bring all to one world first: `gaudi-calib unify DIR -r N`",
        )
    written = _write(out, ranges, channels, manifests, [run.path for run in runs])
    _set_aside(out, written, is_device_dir=runs[0].is_device_dir)
    _log.info("Scales are not merged: `gaudi-calib quantize -m MODEL -o OUT -t N` computes them")
    return written


def _find_runs(directories: Sequence[Path]) -> list[_Run]:
    """Return the distinct ones of `directories`."""
    runs = []
    for path in {path.resolve(): path for path in directories}.values():
        if list_worlds(path):
            runs.append(_Run(path, {"": path}, False))
            continue
        devices = {name: path / name for name in DEVICES if (path / name).is_dir() and list_worlds(path / name)}
        runs.append(_Run(path, devices, (path / CHANNEL_RANGES_NAME).is_file()))
        if not devices and not runs[-1].has_channels:
            raise FileError(
                "no ranges to merge",
                where=path,
                why="it is neither a device directory (OUT/<model>/g3) nor a run (OUT/<model>)",
                fix="give the directory that `gaudi-calib measure` wrote",
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
    has_ranks = out.is_dir() and bool(list_worlds(out))
    if has_parts if runs[0].is_device_dir else has_ranks:
        kinds = ("a whole run", "a device") if has_parts else ("a device", "whole runs")
        raise UsageError(
            f"-o is the directory of {kinds[0]}, and the merged directories are those of {kinds[1]}",
            where=out,
            fix="give a new directory, or one of the same kind",
        )


def _shared_devices(runs: Sequence[_Run]) -> list[str]:
    found = sorted({device for run in runs for device in run.devices})
    return [one for one in found if _all_have(f"ranges of {one}", {run.path: one in run.devices for run in runs})]


def _all_have(what: str, present: Mapping[Path, bool]) -> bool:
    """Tell whether all directories have `what`; warn where only some do."""
    lacking = [str(path) for path, here in present.items() if not here]
    if lacking and len(lacking) < len(present):
        _log.warning("%s are left out: %s has none, and they would lack what it measured", what, ", ".join(lacking))
    return not lacking


def _combine_channel_files(runs: Sequence[_Run]) -> ChannelRanges | None:
    if not _all_have("channel ranges", {run.path: run.has_channels for run in runs}):
        return None
    paths = [run.path / CHANNEL_RANGES_NAME for run in runs]
    return combine_channels([read_channel_ranges(path) for path in paths], paths)


def _combine_device(directories: Sequence[Path]) -> list[RankSet[Node]]:
    """Return all ranks of all worlds that every directory has."""
    for directory in directories:
        _require_one_measurement(directory)
    found = [list_worlds(directory) for directory in directories]
    combined = []
    for world in sorted({world for worlds in found for world in worlds}):
        present = {path: world in worlds for path, worlds in zip(directories, found, strict=True)}
        if _all_have(f"ranges of world size {world}", present):
            combined += _combine_world(world, [worlds[world] for worlds in found], directories)
    return combined


def _require_one_measurement(directory: Path) -> None:
    """Raise FileError where two files are ranges of the same rank: of another dump name, or without a rank's suffix."""
    seen: dict[tuple[int, int], str] = {}
    for path in sorted(directory.glob("*.json")):
        file = parse_rank_file(path.name)
        if file is None or file.is_mod_list or file.method is not None or file.observer != "maxabs":
            continue
        key = (file.rank or 0, file.world or 1)
        if key in seen:
            raise FileError(
                f"two files are ranges of rank {key[0]} of {key[1]}: {seen[key]} and {path.name}",
                where=directory,
                why="they are of different measurements",
                fix="move one of the measurements to a directory of its own, and merge both",
            )
        seen[key] = path.name


def _combine_world(world: int, files: Sequence[Mapping[int, Path]], directories: Sequence[Path]) -> list[RankSet[Node]]:
    """Combine each rank of `world` over the directories that hold it.

    Raises:
        FileError: no directory holds some rank.
    """
    counts = [sum(rank in ranks for ranks in files) for rank in range(world)]
    if 0 in counts:
        missing = RankFile(rank=counts.index(0), world=world)
        raise FileError(
            f"no ranges of rank {missing.rank} of {world} in any of the directories",
            where=missing.name,
            why="searched " + ", ".join(map(str, directories)),
            fix=f"add the directory of the machine that ran rank {missing.rank}; "
            f"or move the files of world size {world} away to merge the others",
        )
    if len(set(counts)) > 1:
        rank = counts.index(min(counts))
        lacking = [str(path) for path, ranks in zip(directories, files, strict=True) if rank not in ranks]
        _log.warning(
            "rank %d of %d is in fewer directories than other ranks: its ranges lack what %s measured",
            rank, world, ", ".join(lacking),
        )  # fmt: skip
    combined = []
    for rank in range(world):
        having = [(ranks[rank], path) for ranks, path in zip(files, directories, strict=True) if rank in ranks]
        combined.append(combine_ranks([read_ranges(file) for file, _ in having], [path for _, path in having]))
    return combined


def _describe_worlds(run: _Run) -> str:
    worlds = sorted({world for path in run.devices.values() for world in list_worlds(path)})
    return "world size " + ", ".join(map(str, worlds)) if worlds else CHANNEL_RANGES_NAME


def _read_manifests(directories: Sequence[Path]) -> list[Manifest]:
    """Return the manifests there are, of the files in place.

    Raises:
        ModelError: they are of different checkpoints or devices.
    """
    paths = [path / MANIFEST_NAME for path in directories if (path / MANIFEST_NAME).is_file()]
    manifests = [manifest for path in paths if (manifest := read_manifest(path).good) is not None]
    prints = {one.model.fingerprint: one.model.name for one in manifests if one.model and one.model.fingerprint}
    if len(prints) > 1:
        raise ModelError(
            "the runs measured different checkpoints",
            where=", ".join(map(str, directories)),
            why="the manifests name " + " and ".join(f"{name} ({print_})" for print_, name in prints.items()),
            fix="merge only runs of the same checkpoint",
        )
    devices = {one.device for one in manifests if one.device}
    if len(devices) > 1:
        _refuse_devices(directories[0], devices)
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
    sources: Sequence[Path],
) -> list[Path]:
    written: list[Path] = []
    with stage_files(out) as staging:
        if channels is not None:
            write_channel_ranges(staging / CHANNEL_RANGES_NAME, channels)
            written.append(staging / CHANNEL_RANGES_NAME)
        for device, rank_sets in ranges.items():
            files = [path for one in rank_sets for path in write_rank_set(staging / device, one)]
            written += files
            if files:
                facts = _gather_facts(manifests[device], sources, rank_sets)
                with record_run(staging / device / MANIFEST_NAME, **facts) as record:
                    record.update(files=hash_files(staging / device))
    return [out / path.relative_to(staging) for path in written]


def _gather_facts(
    manifests: Sequence[Manifest], sources: Sequence[Path], rank_sets: Sequence[RankSet[Node]]
) -> dict[str, Any]:
    """Return what the manifest of merged ranges says about where they come from."""
    steps = [
        step
        for one in manifests
        for step in (
            *one.history,
            Step(command=one.command, started_at=one.started_at, finished_at=one.finished_at),
        )
    ]
    distinct = {step.model_dump_json(): step for step in steps}
    facts: dict[str, Any] = {
        "history": sorted(distinct.values(), key=lambda step: step.started_at),
        "notes": _join_notes(manifests),
        "model": next((one.model for one in manifests if one.model), None),
    }
    for name in ("device", "platform", "engine"):
        values = {getattr(one, name) for one in manifests}
        facts[name] = values.pop() if len(values) == 1 else None
    configs = [one.config["measure"] for one in manifests if "measure" in one.config]
    if configs and all(one.get("blocklist") == configs[0].get("blocklist") for one in configs):
        facts["config"] = {"measure": configs[0]}  # which nodes are blocked, for worlds that are derived later
    measured = {one.topology.measured_world for one in manifests}
    facts["topology"] = Topology(
        measured_world=measured.pop() if len(measured) == 1 else None,
        worlds=sorted({one.world for one in rank_sets}),
        expert_parallel=any(one.topology.expert_parallel for one in manifests),
    )
    data = [one.dataset.model_dump() for one in manifests if one.dataset]
    data = [*facts["notes"].pop("merged_datasets", []), *data]
    facts["notes"] |= {"merged": [str(path.resolve()) for path in sources], "merged_datasets": data}
    return facts


def _join_notes(manifests: Iterable[Manifest]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for key, note in (item for one in manifests for item in one.notes.items()):
        notes[key] = {**notes[key], **note} if isinstance(note, dict) and isinstance(notes.get(key), dict) else note
    return notes


def _set_aside(out: Path, written: Iterable[Path], *, is_device_dir: bool) -> None:
    """Move what the merged ranges make stale out of their way."""
    old = [out / CHANNEL_RANGES_NAME]
    for directory in (out,) if is_device_dir else (out / device for device in DEVICES):
        old += [path for path in directory.glob("*.*") if parse_rank_file(path.name)]
    stale = [path for path in sorted(set(old) - set(written)) if path.is_file()]
    set_aside(stale)
    for directory in sorted({path.parent for path in stale}):
        _log.warning("files that the merged ranges make stale were moved to %s", directory / REPLACED_NAME)
