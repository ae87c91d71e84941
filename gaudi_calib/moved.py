"""Where files are: `dump_stats_path` of a QUANT_CONFIG is absolute, and runs are moved and copied."""

import contextlib
import logging
import os
from pathlib import Path

from gaudi_calib.advice import advise_relocation
from gaudi_calib.directory import CalibrationDir, list_devices
from gaudi_calib.files import read_json

_log = logging.getLogger(__name__)

_MOST_OF_A_CONFIG = 1 << 20  # bytes; what is larger is something else


def find_beside(config_path: Path, dump_stats_path: str) -> Path | None:
    """Return what the `dump_stats_path` of a config would be where the config is now, None where it leads there.

    A run that was copied, or is mounted elsewhere, names its old place, which may be there as well.
    None, too, where no rank files lie beside the config: then the path alone tells where they are.
    """
    named = Path(os.path.abspath(dump_stats_path))
    for parent in dict.fromkeys((config_path.absolute().parent, config_path.resolve().parent)):
        for directory in (parent / named.parent.name, parent):
            if directory.name == named.parent.name and CalibrationDir(directory, dump=named.name).is_filled:
                place = directory.parent.resolve() / directory.name
                return None if is_same_place(place, named.parent) else place / named.name
    return None


def is_same_place(directory: Path, other: Path) -> bool:
    """Whether two paths lead to one directory that exists."""
    try:
        return directory.samefile(other)
    except OSError:
        return False


def list_quant_configs(run: Path) -> dict[Path, str]:
    """Return the `dump_stats_path` of every QUANT_CONFIG file directly in a run directory."""
    found = {}
    for path in sorted(run.glob("[!.]*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # anybody's JSON
            content = read_json(path) if path.is_file() and path.stat().st_size <= _MOST_OF_A_CONFIG else None
            if isinstance(content, dict) and isinstance(content.get("dump_stats_path"), str):
                os.fsencode(content["dump_stats_path"])  # no path otherwise
                found[path] = content["dump_stats_path"]
    return found


def find_moved_configs(run: Path) -> dict[Path, Path]:
    """Return what the `dump_stats_path` of every QUANT_CONFIG of a run should be, where it leads elsewhere."""
    beside = {path: find_beside(path, named) for path, named in list_quant_configs(run).items()}
    return {path: dump for path, dump in beside.items() if dump is not None}


def warn_of_move(source: CalibrationDir) -> None:
    """Warn where configs of the run name another place, from which serving would take ranges and scales."""
    run = source.path.resolve().parent
    moved = [path.name for path in find_moved_configs(run)]
    if moved:
        names, advice = ", ".join(moved), advise_relocation(run)
        _log.warning("The run in %s has moved: %s name another place; run `%s`", run, names, advice)


def find_calibrations(path: Path, dump: str | None = None) -> dict[str, CalibrationDir]:
    """Return the directories of rank files that a path means, by device; `""` where the path is of one itself.

    Args:
        path: a run (OUT/<model>), a directory of rank files, or a QUANT_CONFIG file, which names one.
        dump: first part of the names of the measurement, where directories hold several.

    Raises:
        FileError: there are none. ConfigError: the file is no QUANT_CONFIG.
    """
    if path.is_file():
        from gaudi_calib.config.file import read_quant_config
        from gaudi_calib.config.model import with_dump_stats_path

        config = read_quant_config(path)
        beside = find_beside(path, config.dump_stats_path)
        placed = CalibrationDir.named_by(with_dump_stats_path(config, beside) if beside else config, path)
        found = {"": placed}
    else:
        found = list_devices(path, dump) or {"": CalibrationDir(path, dump=dump)}
    for place in found.values():
        place.require_worlds()
    return {place.device.name if place.device else "": place for place in found.values()}
