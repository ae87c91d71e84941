"""Whether files are what a manifest says they are: those its run wrote, made from the ranges in place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.errors import CalibrationError
from gaudi_calib.files import hash_file
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.table import tabulate_ranges
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.channel_file import read_channel_ranges

if TYPE_CHECKING:
    from gaudi_calib.manifest import Manifest, ScaleOrigin


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


def follow_channels(
    worlds: Iterable[int],
    read_world: Callable[[int], Sequence[RankSet[Node]]],
    channel_file: Path,
    made: "Manifest",
    device: Device | None,
) -> bool:
    """Return whether all ranks of one of `worlds` are, to the bit, what the channel ranges of `channel_file` give.

    Args:
        made: manifest of those ranks.
        device: the device they are for.
    """
    if device is None or "measure" not in made.config:
        return False
    from gaudi_calib.config.check import parse_quant_config
    from gaudi_calib.ranges.derive import derive_world

    channels = read_channel_ranges(channel_file)
    config = parse_quant_config(made.config["measure"], where=channel_file)
    for world in worlds:
        with suppress(CalibrationError):  # a world that is damaged, or was made otherwise, tells nothing
            derived = derive_world(
                channels, Topology(world, bool(made.shares_experts(world))), device, config, made.vllm
            )
            pairs = zip(derived, read_world(world), strict=True)
            if all(tabulate_ranges(one.nodes).equals(tabulate_ranges(other.nodes)) for one, other in pairs):
                return True
    return False


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
