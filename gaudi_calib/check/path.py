"""From a path to everything that is wrong with the calibrations it means."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.check import config, files, nodes, outliers, ranges, scales
from gaudi_calib.check.kinds import sort_findings
from gaudi_calib.check.mend import mend
from gaudi_calib.check.subject import Subject
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import CalibrationError, FileError, Finding, Findings
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import DEVICES
from gaudi_calib.moved import find_calibrations

_log = logging.getLogger(__name__)

# What looks at the ranges that were read, in this order; the first tells the others what the model is.
_FINDERS = (
    *(
        nodes.plan_model,
        config.find_idle,
        config.find_failure_of_attention,
        nodes.find_differing,
        nodes.find_silent,
        nodes.find_gaps,
    ),
    *(ranges.find_not_finite, ranges.find_extremes, ranges.find_idle_experts),
    *(
        ranges.find_cache_gaps,
        ranges.find_little_data,
        ranges.find_unsettled,
        outliers.find_outliers,
        scales.find_bad_scales,
    ),
)
# What is mended last is looked at once more: names of the place, lost files, what is computed.
_ROUNDS = 4


@dataclass(frozen=True)
class Asked:
    """What is asked of a check.

    Attributes:
        world: the only number of ranks to look at, which has to be there; None: all that are.
        device: the only device; for directories that do not tell, the one that will serve.
        model: directory of the checkpoint, or its hub name; None: the one that was measured, if it is there.
    """

    world: int | None = None
    device: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Report(Findings):
    """What a check found.

    Attributes:
        places: the directories that were looked at.
        done: what was mended.
    """

    places: tuple[Path, ...] = ()
    done: tuple[str, ...] = ()


def check_path(path: Path, asked: Asked | None = None, *, fixes: bool = False) -> Report:
    """Return everything that is wrong with the calibrations that `path` means.

    Args:
        path: a run, one of its device directories, any directory of rank files, or a QUANT_CONFIG file.
        fixes: mend what is safe to mend first: names of moved places, lost `.npz`, the ranges of the KV caches, stale
            and missing scales. A second call does nothing.

    Raises:
        UsageError: the device asked for is not that of the files. ModelError: there is no such model.
        FileError: something cannot be written.
    """
    path, asked = expand_path(path), asked or Asked()
    done: list[str] = []
    for _ in range(_ROUNDS):
        checked = list(_check_places(path, asked))
        kinds = [(subject, {finding.kind for finding in found}) for subject, found in checked if subject]
        before = len(done)
        for line in (line for subject, found in kinds if fixes for line in mend(subject, found)):
            _log.info("%s", line)
            done.append(line)
        if len(done) == before:
            break
    report = sort_findings(finding for _, findings in checked for finding in findings)
    places = tuple(dict.fromkeys(subject.place.path for subject, _ in checked if subject))
    return Report(report.errors, report.warnings, places, tuple(done))


def _check_places(path: Path, asked: Asked) -> Iterator[tuple[Subject | None, list[Finding]]]:
    """Yield every measurement that `path` means, None for what is none, and what was found there."""
    try:
        places = _list_places(path, asked.device)
    except CalibrationError as error:
        found = config.inspect_config(path, None)[1] if path.is_file() else []
        yield None, found if sort_findings(found).errors else [*found, Finding.of(error, "place-missing")]
        return
    for place in places:
        try:
            _ = place.newest_manifest
        except FileError as error:
            yield None, [Finding.of(error, "file-damaged")]
            continue
        subject = Subject(place, place.settle_device(asked.device), model=asked.model)
        yield subject, list(_check(subject, path, asked.world))


def _list_places(path: Path, device: str | None) -> list[CalibrationDir]:
    """Return the directories that `path` means, once for each measurement that one holds."""
    if path.is_file():
        return list(find_calibrations(path).values())
    inside = [CalibrationDir(path / name) for name in DEVICES if device in (None, name)]
    filled = [place for place in [CalibrationDir(path)] if place.is_filled] or [one for one in inside if one.is_filled]
    if not filled:
        CalibrationDir(path).require_worlds()
    return [
        CalibrationDir(place.path, dump=dump)
        for place in filled
        for dump in (place.dumps if len(place.dumps) > 1 else [None])
    ]


def _check(subject: Subject, path: Path, world: int | None) -> Iterator[Finding]:
    place = subject.place
    yield from files.find_unfinished(subject)
    subject.config_path = path if path.is_file() else place.quant_path
    if subject.config_path is not None:
        subject.config, found = config.inspect_config(subject.config_path, subject.device)
        yield from found
    measuring = place.layout.measure_config if place.layout else None
    if measuring is not None and measuring.is_file():
        yield from config.inspect_config(measuring, None)[1]
    yield from config.find_misplaced(subject)
    if place.newest_manifest is not None and place.manifest is None:
        return
    if subject.config is not None and subject.config.mode == "QUANTIZE" and not subject.config.uses_stats_files:
        return
    if subject.device is None:
        yield Finding(
            str(place.path),
            "nothing tells which device will serve",
            "neither a manifest nor the directory's name; ranges that are too large, and scales, are not checked",
            f"give --device {' or --device '.join(DEVICES)}",
            "device-unknown",
        )
    try:
        subject.worlds = (world,) if world else tuple(place.require_worlds())
    except CalibrationError as error:
        yield Finding.of(error, "place-missing")
        return
    yield from _check_files(subject)
    for find in _FINDERS:
        yield from find(subject)


def _check_files(subject: Subject) -> Iterator[Finding]:
    yield from files.find_missing(subject)
    yield from files.find_changed(subject)
    for world in subject.worlds:
        yield from files.read_ranges(subject, world)
    yield from files.find_missing_scales(subject)
    yield from files.find_stale(subject)
