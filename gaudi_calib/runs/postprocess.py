"""`gaudi-calib postprocess`: KV-cache ranges into the attention matmuls, for every rank of a directory."""

from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import stage_files
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.conversion import open_record, set_aside_scales


def postprocess_dir(directory: Path, out: Path) -> list[Path]:
    """Apply `apply_kv_cache` to every rank of every world in `directory`.

    Args:
        out: where the results go; may be `directory` itself.

    Returns:
        The files written.

    Raises:
        FileError: no ranges in `directory`, or one is malformed; nothing is written.
    """
    source = CalibrationDir(directory)
    worlds = {
        world: [apply_kv_cache(rank_set) for rank_set in source.read_ranks(list(ranks.values()))]
        for world, ranks in source.require_worlds().items()
    }
    written: set[str] = set()
    with open_record(source, out) as record:
        with stage_files(out) as staging:
            for world, rank_sets in worlds.items():
                names = {path.name for path in write_rank_sets(staging, rank_sets)}
                set_aside_scales(out, staging, world, names)
                written |= names
        if record is not None:
            facts = source.manifest.worlds if source.manifest else {}
            record.update(worlds=facts, files=CalibrationDir(out).hash_files(written))
    return [out / name for name in sorted(written)]
