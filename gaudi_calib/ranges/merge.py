"""Ranks into fewer ranks, or into more. Ranges are merged, scales never: they are computed anew."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gaudi_calib.errors import FileError, RangeError, TopologyError
from gaudi_calib.files import stage_files
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.store import list_worlds, read_world_dir, write_rank_set

_EXPERT_LISTS = (".w13_list.", ".w2_list.")


def unify_ranks(ranks: Sequence[RankSet[Node]], world: int) -> list[RankSet[Node]]:
    """Merge tensor-parallel ranks into `world` of them: consecutive groups, elementwise maximum.

    Args:
        ranks: all ranks of one world, in rank order.
        world: how many ranks remain; divides their number.

    Raises:
        TopologyError: `world` does not divide the number of ranks; the ranks of a
            group have different nodes, or the model has experts.
        RangeError: NaN or infinity; names node and rank.
    """
    if world < 1 or len(ranks) % world:
        raise TopologyError(
            f"cannot unify {len(ranks)} ranks into {world}",
            why=f"{world} does not divide {len(ranks)}",
            fix="choose one of " + ", ".join(str(one) for one in range(1, len(ranks) + 1) if len(ranks) % one == 0),
        )
    _refuse_experts(ranks)
    size = len(ranks) // world
    return [_merge_group(ranks[index * size : (index + 1) * size], index, world) for index in range(world)]


def unify_dir(directory: Path, world: int, out: Path, *, source_world: int | None = None) -> list[Path]:
    """Unify the ranges in `directory` and write the merged ranks to `out`.

    Args:
        world: ranks that remain.
        out: where the results go; may be `directory` itself.
        source_world: the world to merge; None takes the only one larger than
            `world` that `world` divides.

    Returns:
        The files written.

    Raises:
        FileError: a rank is missing or malformed, or several worlds could be meant; nothing is written.
        TopologyError, RangeError: see `unify_ranks`.
    """
    source_world = source_world or _find_source(directory, world)
    merged = unify_ranks(read_world_dir(directory, source_world), world)
    with stage_files(out) as staging:
        written = [path for one in merged for path in write_rank_set(staging, one)]
    return [out / path.name for path in written]


def expand_rank(rank_set: RankSet[Node], world: int) -> list[RankSet[Node]]:
    """Give each of `world` tensor-parallel ranks the ranges of the one rank that was measured.

    A rank's part of a tensor never exceeds the whole, so every range is an upper bound,
    except the partial products of row-parallel layers (`outputs[0]`), which may cancel
    in the whole. Ranges of the parts themselves need `channel_ranges.safetensors`.

    Raises:
        TopologyError: `rank_set` is not the only rank, or the model has experts.
    """
    if rank_set.world != 1 or world < 1:
        raise TopologyError(
            f"cannot expand world size {rank_set.world} to {world}",
            why="only a single rank's ranges are those of the whole model",
            fix="unify to one rank first: `gaudi-calib unify -r 1`",
        )
    _refuse_experts([rank_set])
    return [replace(rank_set, rank=rank, world=world) for rank in range(world)]


def expand_dir(directory: Path, world: int, out: Path) -> list[Path]:
    """Expand the ranges of world size 1 in `directory` to `world` ranks, and write those to `out`.

    Returns:
        The files written.

    Raises:
        FileError: there are no ranges of world size 1, or they are malformed; nothing is written.
        TopologyError: see `expand_rank`.
    """
    (rank_set,) = read_world_dir(directory, 1)
    ranks = expand_rank(rank_set, world)
    with stage_files(out) as staging:
        written = [path for one in ranks for path in write_rank_set(staging, one)]
    return [out / path.name for path in written]


def _find_source(directory: Path, world: int) -> int:
    worlds = list(list_worlds(directory))
    candidates = [one for one in worlds if one > world and one % world == 0]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(map(str, candidates or worlds)) or "none"
    if candidates:
        raise FileError(
            f"several measurements could be unified into {world}: world sizes {found}",
            where=directory,
            fix="say which with --from-world N",
        )
    raise FileError(
        f"nothing to unify into {world}: the directory holds world sizes {found}",
        where=directory,
        fix="measure with a larger -t that the target divides, or check the directory",
    )


def _merge_group(group: Sequence[RankSet[Node]], index: int, world: int) -> RankSet[Node]:
    first = group[0]
    for other in group[1:]:
        _check_same_nodes(first, other)
    nodes = {name: _merge_nodes(name, group) for name in first.nodes}
    return replace(first, rank=index, world=world, nodes=nodes)


def _check_same_nodes(first: RankSet[Node], other: RankSet[Node]) -> None:
    only = next((name for name in first.nodes if name not in other.nodes), None)
    lacking, having = other, first
    if only is None:
        only = next((name for name in other.nodes if name not in first.nodes), None)
        lacking, having = first, other
    if only is not None:
        raise TopologyError(
            f"rank {lacking.rank} of {lacking.world} has no node {only!r}",
            why=f"rank {having.rank} measured it; a merge needs the same nodes on every rank",
            fix=f"measure again with -t {lacking.world}, with data that reaches every module on every rank",
        )


def _merge_nodes(name: str, group: Sequence[RankSet[Node]]) -> Node:
    nodes = [rank.nodes[name] for rank in group]
    first = nodes[0]
    if any(_shape(node) != _shape(first) for node in nodes):
        raise TopologyError(
            f"{name} has a different number of inputs, outputs or channels on different ranks",
            why="the files come from different runs or models",
            fix="measure all ranks in one run",
        )
    outputs = None
    if first.outputs is not None:
        outputs = tuple(
            _maximum(name, f"output {i}", group, [node.outputs[i] for node in nodes if node.outputs is not None])
            for i in range(len(first.outputs))
            if not _is_garbage(first, i, group)
        )
        if len(outputs) < len(first.outputs):
            outputs = (*outputs, outputs[0])
    weights = [node.weight for node in nodes if node.weight is not None]
    return Node(
        inputs=tuple(
            _maximum(name, f"input {i}", group, [node.inputs[i] for node in nodes]) for i in range(len(first.inputs))
        ),
        outputs=outputs,
        weight=_maximum(name, "weight", group, weights) if weights else None,
    )


def _is_garbage(node: Node, index: int, group: Sequence[RankSet[Node]]) -> bool:
    """A row-parallel layer's second output at world 1 is uninitialised memory."""
    return group[0].world == 1 and index == 1 and node.weight is not None


def _shape(node: Node) -> tuple:
    outputs = None if node.outputs is None else [one.shape for one in node.outputs]
    weight = None if node.weight is None else node.weight.shape
    return [one.shape for one in node.inputs], outputs, weight


def _maximum(name: str, what: str, group: Sequence[RankSet[Node]], values: Sequence[np.ndarray]) -> np.ndarray:
    for rank, value in zip(group, values, strict=True):
        if not np.isfinite(value).all():
            raise RangeError(
                f"{what} of {name} is not finite on rank {rank.rank} of {rank.world}",
                why=f"the range is {value[~np.isfinite(value)][0]}",
                fix="find the sample that overflows (measure with -b 1) and measure again",
            )
    return np.maximum.reduce(values)


def _refuse_experts(ranks: Sequence[RankSet[Node]]) -> None:
    expert = next((name for name in ranks[0].nodes if any(part in name for part in _EXPERT_LISTS)), None)
    if expert is not None:
        raise TopologyError(
            "cannot unify the ranks of a mixture of experts yet",
            where=expert,
            why="under expert parallelism rank r's expert 0 is not rank 0's; a maximum would mix experts",
            fix="serve with the tensor-parallel size that was measured",
        )
