"""`gaudi-calib postprocess`: KV-cache ranges into the attention matmuls, for every rank of a directory."""

from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import expand_path
from gaudi_calib.moved import warn_of_move
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.runs.conversion import write_files


def postprocess_dir(directory: Path, out: Path, *, dump: str | None = None) -> list[Path]:
    """Apply `apply_kv_cache` to every rank of every world in `directory`.

    Args:
        out: where the results go; may be `directory` itself.
        dump: first part of the names of the measurement, where `directory` holds several.

    Returns:
        The files written.

    Raises:
        FileError: no ranges in `directory`, or one is malformed; nothing is written.
    """
    directory, out = expand_path(directory), expand_path(out)
    source = CalibrationDir(directory, dump=dump)
    warn_of_move(source)
    worlds = [source.read_ranks(list(ranks.values())) for ranks in source.require_worlds().values()]
    return write_files(source, out, [apply_kv_cache(rank_set) for ranks in worlds for rank_set in ranks])
