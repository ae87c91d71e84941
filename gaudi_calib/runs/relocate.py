"""`gaudi-calib relocate`: the configs of a run that was moved or copied name the place where it is now."""

import logging
from pathlib import Path
from typing import Any

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.files import read_json, write_json
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.moved import find_moved_configs, is_same_place, list_quant_configs
from gaudi_calib.staging import stage_files

_log = logging.getLogger(__name__)


def relocate_run(directory: Path) -> list[Path]:
    """Rewrite the `dump_stats_path` of every config of a run, also where its manifests quote them.

    Everything else stays. A second call changes nothing, and one that was stopped can be repeated.

    Args:
        directory: the run (`OUT/<model>`), or one of its device directories.

    Returns:
        The files changed.

    Raises:
        FileError: there is no run, or it cannot be written.
    """
    run = _find_run(directory.resolve())
    moved = find_moved_configs(run)
    changed: dict[Path, Any] = {path: {**read_json(path), "dump_stats_path": str(dump)} for path, dump in moved.items()}
    for path in sorted(run.glob(f"*/{MANIFEST_NAME}")):
        before = read_json(path)
        after = _relocate(before, path.parent)
        if after != before:
            changed[path] = after
    try:
        with stage_files(run) as staging:
            for path, content in changed.items():
                write_json(staging / path.relative_to(run), content)
    except FileError as error:
        fix = "run it where the run can be written; until then `serve` takes what lies beside the config"
        raise error.with_fix(fix) from error
    for path, named in list_quant_configs(run).items():
        if not Path(named).parent.is_dir():
            _log.warning("%s names %s, which is not there, nor is such a directory beside it", path, Path(named).parent)
    return list(changed)


def _find_run(directory: Path) -> Path:
    for run in (directory, directory.parent):
        if list_quant_configs(run) and (run is directory or CalibrationDir(directory).is_filled):
            return run
    raise FileError(
        "no run in the directory",
        where=directory,
        why="no QUANT_CONFIG lies in it",
        fix="give the directory of a run, OUT/<model>, which holds maxabs_quant_<device>.json",
    )


def _relocate(content: Any, directory: Path) -> Any:
    """Return the content of the manifest in `directory`; the configs that it quotes name that place."""
    if not isinstance(content, dict):
        return content
    moved = {key: _relocate(value, directory) for key, value in content.items()}
    named = Path(str(moved.get("dump_stats_path", "")))
    if named.parent.name == directory.name and not is_same_place(named.parent, directory):
        moved["dump_stats_path"] = str(directory / named.name)
    return moved
