"""The files of a calibration: those of every rank, in both forms, as the run wrote them."""

import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gaudi_calib.advice import advise_mending, advise_repeating
from gaudi_calib.check.subject import Subject
from gaudi_calib.config.model import describe_scaling
from gaudi_calib.errors import CalibrationError, Finding, count, name_first
from gaudi_calib.layout import MANIFEST_NAME, RankFile
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.store import read_world_files
from gaudi_calib.runs.recipe import advise_scales


def find_unfinished(subject: Subject) -> Iterator[Finding]:
    """Yield what the manifest says about a run that is not ok."""
    newest = subject.place.newest_manifest
    if newest is None or newest.status == "ok":
        return
    failed = newest.good is None
    yield Finding(
        str(subject.place.path / MANIFEST_NAME),
        "the calibration did not finish" if failed else "the last run did not finish; the files are of the one before",
        f"its status is {newest.status}" + (f": {newest.error}" if newest.error else ""),
        advise_repeating(newest.command, newest.directory),
        "run-unfinished" if failed else "run-repeated",
    )


def find_changed(subject: Subject) -> Iterator[Finding]:
    """Yield the files that are not those the manifest recorded."""
    for path, file in subject.place.files.items():
        if file.position[1] in subject.worlds:
            try:
                subject.place.require_recorded([path])
            except CalibrationError as error:
                yield Finding.of(error, "file-changed")


def find_missing(subject: Subject) -> Iterator[Finding]:
    """Yield the worlds that lack ranks, and the files that lack their `.npz`."""
    place, bare = subject.place, list_bare(subject)
    for world in subject.worlds:
        ranks = place.worlds.get(world, {})
        if len(ranks) < world:
            try:
                place.read_world(world)
            except CalibrationError as error:
                yield Finding.of(error, "rank-missing" if ranks else "world-missing")
    if bare:
        yield Finding(
            name_first(bare, 1),
            f"files without their .npz: {len(bare)}",
            "the .npz is all that INC reads; the .json is for people",
            f"restore them; or write them from the .json: {advise_mending(place.path, subject.device)}",
            "npz-missing",
        )


def list_bare(subject: Subject) -> list[Path]:
    """Return the ranges and scales that have a `.json` and no `.npz`."""
    return [
        path
        for path, file in subject.place.files.items()
        if file.extension == "json" and not file.is_mod_list and file.observer == RankFile().observer
        if file.position[1] in subject.worlds and not path.with_suffix(".npz").is_file()
    ]


def read_ranges(subject: Subject, world: int) -> Iterator[Finding]:
    """Read the ranges of all ranks of `world` into `subject`; yield what cannot be read."""
    paths = list(subject.place.worlds.get(world, {}).values())
    try:
        subject.ranges[world] = read_world_files(paths)
    except CalibrationError:
        readable: list[RankSet[Node]] = []
        for path in paths:
            try:
                readable += read_world_files([path])
            except CalibrationError as error:
                yield Finding.of(error, "file-damaged")
        subject.ranges[world] = readable


def find_missing_scales(subject: Subject) -> Iterator[Finding]:
    """Yield the methods of which some ranks that have ranges have no scales."""
    place = subject.place
    for world in subject.worlds:
        for tag in subject.list_methods(world):
            there = {place.files[path].position[0] for path in place.list_scales(world, tag)}
            missing = [rank for rank in place.worlds.get(world, ()) if rank not in there]
            if missing:
                more = f" (nor of {len(missing) - 1} more)" if len(missing) > 1 else ""
                yield Finding(
                    str(place.name_file(missing[0], world, method=tag)),
                    f"no {tag} scales of rank {missing[0]} of {world}{more}",
                    "each rank reads its own file",
                    advise_recomputing(subject, world, tag),
                    "scales-missing",
                )


def find_stale(subject: Subject) -> Iterator[Finding]:
    """Yield scales that were made from other ranges or settings, as far as the manifest tells."""
    place = subject.place
    if place.manifest is None:
        return
    for world in subject.worlds:
        stale: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for tag in place.list_methods(world):
            is_served = tag == subject.tag and subject.config is not None and subject.device is not None
            settings = describe_scaling(subject.config, subject.device) if is_served else None  # type: ignore[arg-type]
            for found in place.find_stale(place.list_scales(world, tag), settings=settings):
                stale[tag, found.why].append(found.path)
        for (tag, why), paths in stale.items():
            yield Finding(
                name_first(paths, 1),
                f"{tag} scales of {count(world, 'rank')} are stale",
                why,
                advise_recomputing(subject, world, tag),
                "scales-stale",
            )


def advise_recomputing(subject: Subject, world: int, tag: str) -> str:
    """Return what computes scales anew."""
    command = advise_scales(subject.place, world, tag, subject.model, subject.device)
    dump = f" --dump {shlex.quote(subject.place.dump)}" if subject.place.dump else ""
    return f"compute them: {command}{dump}" if command else "compute them with the method that made them"
