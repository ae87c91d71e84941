"""`gaudi-calib expand`: ranges of few ranks to every rank of a larger world, as upper bounds."""

from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import expand_path
from gaudi_calib.ranges.experts import choose_part
from gaudi_calib.ranges.unify import expand_ranks, gather_world
from gaudi_calib.runs.conversion import Conversion, write_converted
from gaudi_calib.runs.rescale import Converted
from gaudi_calib.runs.sharing import find_evidence, settle_expert_parallel


def expand_dir(
    directory: Path, world: int, out: Path, *, from_world: int = 1, conversion: Conversion | None = None
) -> list[Path]:
    """Expand the ranks of `from_world` in `directory` to `world` ranks; write those and their scales to `out`.

    Returns:
        The files written.

    Raises:
        FileError: a rank of `from_world` is missing or malformed; nothing is written.
        TopologyError, RangeError: see `gather_world`, `settle_expert_parallel`, `expand_ranks`.
    """
    conversion = conversion or Conversion()
    source = CalibrationDir(expand_path(directory), dump=conversion.dump)
    ranks = gather_world(source.read_world(from_world))
    evidence = find_evidence(source, ranks, conversion.model)
    if from_world == 1 and conversion.expert_parallel is not None:
        evidence = []  # one rank has all experts; how they are dealt out is free to choose
    split = settle_expert_parallel(ranks, conversion.expert_parallel, evidence)
    expanded = expand_ranks(ranks, world, expert_parallel=split)
    choose = choose_part(world // from_world, 0) if split else None
    converted = Converted(from_world, ranks.inventory, expanded, choose, split if ranks.layers else None)
    return write_converted(source, expand_path(out), converted, conversion)
