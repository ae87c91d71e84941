"""`gaudi-calib postprocess`: KV-cache ranges into the attention matmuls, for every rank of a directory."""

from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import expand_path
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.rankfiles.store import read_world_files, write_rank_sets
from gaudi_calib.staging import stage_files


def postprocess_dir(directory: Path, out: Path) -> list[Path]:
    """Apply `apply_kv_cache` to every rank of every world in `directory`.

    Args:
        out: where the results go; may be `directory` itself.

    Returns:
        The files written.

    Raises:
        FileError: no ranges in `directory`, or one is malformed; nothing is written.
    """
    directory, out = expand_path(directory), expand_path(out)
    worlds = CalibrationDir(directory).require_worlds().values()
    rank_sets = [apply_kv_cache(rank_set) for ranks in worlds for rank_set in read_world_files(list(ranks.values()))]
    with stage_files(out) as staging:
        written = write_rank_sets(staging, rank_sets)
    return [out / path.name for path in written]
