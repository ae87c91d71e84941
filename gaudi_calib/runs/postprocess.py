"""`gaudi-calib postprocess`: KV-cache ranges into the attention matmuls, for every rank of a directory."""

from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import expand_path
from gaudi_calib.moved import warn_of_move
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.conversion import open_record, set_aside_outdated, warn_of_replaced
from gaudi_calib.staging import stage_files


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
    worlds = {
        world: [apply_kv_cache(rank_set) for rank_set in source.read_ranks(list(ranks.values()))]
        for world, ranks in source.require_worlds().items()
    }
    with open_record(source, out) as record, stage_files(out) as staging:
        written = [path for rank_sets in worlds.values() for path in write_rank_sets(staging, rank_sets)]
        replaced = set_aside_outdated(out, staging, written)
        if record is not None:
            record.update(worlds=source.manifest.worlds if source.manifest else {})
            record.update(files=CalibrationDir(out).hash_files(staging, without=replaced))
            record.stage(staging)
    warn_of_replaced(out, replaced)
    return [out / path.name for path in written]
