"""Whether files are what a manifest says they are: those its run wrote, made from the ranges in place."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.files import hash_file

if TYPE_CHECKING:
    from gaudi_calib.manifest import ScaleOrigin


class StaleFile(NamedTuple):
    """A scale file that does not fit the ranges in place.

    Attributes:
        path: the file.
        why: what does not fit.
    """

    path: Path
    why: str


def hash_paths(paths: Iterable[Path]) -> dict[str, str]:
    """Return the hash of each file by name."""
    return {path.name: hash_file(path) for path in paths}


def find_changed(recorded: Mapping[str, str], paths: Iterable[Path]) -> Path | None:
    """Return the first of `paths` that is there and is not the file whose hash was recorded.

    Args:
        recorded: hash of files by name; where it is empty nothing was recorded, and nothing can be told.
    """
    present = (path for path in paths if recorded and path.is_file())
    return next((path for path in present if hash_file(path) != recorded.get(path.name)), None)


def find_stale(
    paths: Iterable[Path], scales: "Mapping[str, ScaleOrigin]", settings: Mapping[str, Any] | None
) -> list[StaleFile]:
    """Return those scale files that were made from other ranges or settings; see `CalibrationDir.find_stale`."""
    hash_once = cache(hash_file)
    told = ((path, _explain_staleness(path.parent, scales.get(path.name), settings, hash_once)) for path in paths)
    return [StaleFile(path, why) for path, why in told if why is not None]


def _explain_staleness(
    directory: Path,
    origin: "ScaleOrigin | None",
    settings: Mapping[str, Any] | None,
    hash_once: Callable[[Path], str],
) -> str | None:
    if origin is None:
        return "the manifest does not say what it was computed from"
    for name, expected in origin.ranges.items():
        path = directory / name
        if not path.is_file():
            return f"its ranges {name} are gone"
        if hash_once(path) != expected:
            return f"its ranges {name} have changed since"
    if settings is not None and dict(settings) != origin.settings:
        keys = dict.fromkeys([*origin.settings, *settings])
        changed = [key for key in keys if origin.settings.get(key) != settings.get(key)]
        return "it was computed with other settings: " + ", ".join(changed)
    return None
