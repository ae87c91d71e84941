"""`gaudi-calib unify`: ranges of many ranks to ranges of fewer. Scales, where there are any, are computed anew."""

from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.files import expand_path
from gaudi_calib.ranges.experts import choose_joined
from gaudi_calib.ranges.unify import gather_world, unify_ranks
from gaudi_calib.runs.conversion import Conversion, write_converted
from gaudi_calib.runs.rescale import Converted
from gaudi_calib.runs.sharing import find_evidence, settle_expert_parallel


def unify_dir(
    directory: Path, world: int, out: Path, *, from_world: int | None = None, conversion: Conversion | None = None
) -> list[Path]:
    """Unify the ranks in `directory`, and write them and their scales to `out`.

    Args:
        world: ranks that remain.
        out: where the results go; may be `directory` itself.
        from_world: the world to merge; None takes the only one larger than
            `world` that `world` divides, else the measured one, else any where all give the same.

    Returns:
        The files written.

    Raises:
        FileError: a rank is missing or malformed, or several worlds could be meant; nothing is written.
        TopologyError, RangeError: see `gather_world`, `settle_expert_parallel`, `unify_ranks`.
    """
    conversion = conversion or Conversion()
    source = CalibrationDir(expand_path(directory), dump=conversion.dump)
    candidates = [from_world] if from_world else _find_candidates(source, world)
    result, *others = [_unify_world(source, candidate, world, conversion) for candidate in candidates]
    if not all(other.equals(result) for other in others):
        raise FileError(
            f"several measurements could be unified into {world}: world sizes {', '.join(map(str, candidates))}",
            where=directory,
            why="they give different ranges",
            fix="say which with --from-world N",
        )
    return write_converted(source, expand_path(out), result, conversion)


def _unify_world(source: CalibrationDir, from_world: int, world: int, conversion: Conversion) -> Converted:
    ranks = gather_world(source.read_world(from_world))
    split = from_world > 1 and settle_expert_parallel(
        ranks, conversion.expert_parallel, find_evidence(source, ranks, conversion.model)
    )
    merged = unify_ranks(ranks, world, expert_parallel=split)
    choose = choose_joined(from_world // world) if split else None
    return Converted(from_world, ranks.inventory, merged, choose, split if ranks.layers else None)


def _find_candidates(source: CalibrationDir, world: int) -> list[int]:
    """Return the worlds that may be meant: one, or several that have to give the same."""
    candidates = [size for size in source.require_worlds() if size > world and size % world == 0]
    if not candidates:
        raise FileError(
            f"nothing to unify into {world}: the directory holds world sizes {', '.join(map(str, source.worlds))}",
            where=source.path,
            fix="measure with a larger -t that the target divides, or check the directory",
        )
    if len(candidates) > 1 and source.manifest is not None and source.manifest.measured_world in candidates:
        return [source.manifest.measured_world]
    return candidates[::-1]
