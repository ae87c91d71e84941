"""Whether the ranks of a world held different experts, or slices of the same: found out, never assumed.

A maximum over ranks is right for slices and mixes experts otherwise. Files do not say which
it is; these do, the weightiest first:

1. `calibration_manifest.json` beside the ranges, where it covers the world;
2. the number of experts of the model (`channel_ranges.safetensors` of the run, `config.json`):
   a rank that has them all holds slices;
3. idle experts (ranges/experts.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import TopologyError
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.models.source import open_model
from gaudi_calib.ranges.experts import detect_expert_parallel
from gaudi_calib.ranges.unify import World
from gaudi_calib.rankfiles.channel_file import read_expert_count


class Evidence(NamedTuple):
    """A reason to take ranks as expert-parallel, or not.

    Attributes:
        expert_parallel: what it says.
        reason: where it comes from, for messages.
    """

    expert_parallel: bool
    reason: str


def find_evidence(source: CalibrationDir, world: World, model: Path | None = None) -> list[Evidence]:
    """Return what the surroundings of the ranges in `source` say, the weightiest first.

    Args:
        model: the checkpoint, whose config.json tells the number of experts.

    Raises:
        TopologyError: the ranks have neither all experts of the model nor their share.
        FileError: a file that should tell is damaged.
    """
    if not world.layers:
        return []
    found = [_ask_manifest(source, len(world.ranks))]
    if source.channel_file.is_file():
        found.append(_compare_count(world, read_expert_count(source.channel_file), source.channel_file))
    if model is not None:
        found.append(_compare_count(world, open_model(model).expert_count, model / "config.json"))
    return [clue for clue in found if clue is not None]


def settle_expert_parallel(world: World, flag: bool | None, evidence: Sequence[Evidence] = ()) -> bool:
    """Return whether the ranks of `world` hold different experts; False for a model without any.

    Args:
        flag: what the user says, or None.
        evidence: what the surroundings say, the weightiest first.

    Raises:
        TopologyError: nothing tells, or two sources contradict each other.
    """
    if not world.layers:
        return False
    found = list(evidence)
    by_data = detect_expert_parallel(world.tables, world.layers)
    if by_data is not None:
        same = (
            "other experts are idle on some ranks than on others" if by_data else "the same experts are idle everywhere"
        )
        found.append(Evidence(by_data, f"the ranges: {same}"))
    if flag is not None:
        found.append(Evidence(flag, "--expert-parallel" if flag else "--no-expert-parallel"))
    if len({clue.expert_parallel for clue in found}) > 1:
        told = [
            f"{'expert' if clue.expert_parallel else 'tensor'} parallel according to {clue.reason}" for clue in found
        ]
        raise TopologyError(
            "it is not clear how the experts were split over the ranks",
            where=world.layers[0].op,
            why="; ".join(told),
            fix="drop the flag if it was a mistake; otherwise the files are from different runs: measure again",
        )
    if not found:
        raise TopologyError(
            "it is not clear how the experts were split over the ranks",
            where=world.layers[0].op,
            why="every expert saw tokens on every rank, so rank 1's expert 0 may be a slice of rank 0's or another "
            "expert; a wrong guess would mix the ranges of different experts",
            fix="give --expert-parallel if each rank held experts of its own, --no-expert-parallel if each held a "
            "slice of all, or --model DIR, whose config.json tells the number of experts",
        )
    return found[0].expert_parallel


def _ask_manifest(source: CalibrationDir, world: int) -> Evidence | None:
    manifest = source.manifest
    if manifest is None or world not in (manifest.measured_world, *manifest.worlds):
        return None
    shared = manifest.shares_experts(world)
    return None if shared is None else Evidence(shared, MANIFEST_NAME)


def _compare_count(world: World, count: int | None, path: Path) -> Evidence | None:
    ranks = len(world.ranks)
    if count is None or ranks == 1:
        return None
    local = {layer.size for layer in world.layers}
    if local == {count}:
        return Evidence(False, f"{path.name}: each rank has all {count} experts")
    if {size * ranks for size in local} == {count}:
        return Evidence(True, f"{path.name}: each rank has a share of the {count} experts")
    raise TopologyError(
        f"ranks with {', '.join(map(str, sorted(local)))} experts are not those of a model with {count}",
        where=path,
        why=f"{ranks} ranks have {count} experts each, or {count} together",
        fix="check that the ranges are of this model, and measure all ranks in one run",
    )
