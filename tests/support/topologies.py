"""Random rank sets of models with experts, and the rule of `unify` and `expand` written plainly."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.store import write_rank_set

OPS = (
    "mlp.experts.moe_op",
    "mlp.experts.routed_experts.moe_op",
    "mlp.experts.hpu_fused_moe.MoeOp",
    "mlp.experts.hpu_fused_moe",
)
LAYER = "model.layers.2." + OPS[1]


def is_equal(left: RankSet[Node], right: RankSet[Node]) -> bool:
    """Equality of everything a rank's files hold."""
    return repr(replace(left, nodes=dict(left.nodes))) == repr(replace(right, nodes=dict(right.nodes)))


def make_rank(
    seed: int, rank: int, world: int, *, experts: int, layers: int = 3, idle: Sequence[int] = (), op: str = OPS[1]
) -> RankSet[Node]:
    """One rank with `experts` local experts per layer; those of `idle` saw no token in layer 1."""
    random = np.random.default_rng((seed, rank))

    def draw(count: int) -> tuple[np.ndarray, ...]:
        return tuple(round_to_bf16(value.reshape(1)) for value in random.lognormal(0, 1, count).astype(np.float32))

    nodes = {}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        nodes[start + "self_attn.qkv_proj"] = Node(draw(1), None, draw(1)[0])
        nodes[start + "self_attn.o_proj"] = Node(draw(1), draw(2), draw(1)[0])
        nodes[start + "self_attn.attn.impl.matmul_qk"] = Node(draw(2))
        nodes[start + "self_attn.attn.impl.k_cache"] = Node(draw(1))
        nodes[start + "block_sparse_moe.gate"] = Node(draw(1), None, draw(1)[0])
        if layer == 0:
            continue
        maxima = [
            np.zeros(1, np.float32) if layer == 1 and i in idle else value for i, value in enumerate(draw(experts))
        ]
        nodes[start + op] = Node(draw(1), (*draw(1), *maxima))
        for kind in ("w13_list", "w2_list"):
            for expert in range(experts):
                nodes[f"{start}{op}.{kind}.{expert}"] = Node((np.zeros(1, np.float32),), None, draw(1)[0])
    modules = (*nodes, "model.layers.0.self_attn.attn.impl.softmax")
    return RankSet(rank, world, nodes, modules, 10)


def make_ranks(
    seed: int, world: int, *, experts: int, idle: Sequence[Sequence[int]] | None = None, op: str = OPS[1]
) -> list[RankSet[Node]]:
    """All ranks of a world; `idle` says which experts each rank's layer 1 left without a token."""
    idle = idle or [()] * world
    return [make_rank(seed, rank, world, experts=experts, idle=idle[rank], op=op) for rank in range(world)]


def write_world(directory: Path, ranks: Sequence[RankSet[Node]]) -> Path:
    """Write `ranks` and return the directory."""
    for rank in ranks:
        write_rank_set(directory, rank)
    return directory


def merge_plainly(ranks: Sequence[RankSet[Node]], *, expert_parallel: bool) -> dict[str, Node]:
    """Ranks of one group into one, node by node."""
    merged: dict[str, Node] = {}
    for name, node in ranks[0].nodes.items():
        parts = [rank.nodes[name] for rank in ranks]
        op, kind, index = name.rsplit(".", 2) if "_list." in name else (name, "", "0")
        local = sum(name.startswith(f"{op}.w13_list.") for name in ranks[0].nodes)
        if expert_parallel and kind:
            if index == "0":
                for number in range(local * len(ranks)):
                    source = ranks[number // local].nodes[f"{op}.{kind}.{number % local}"]
                    merged[f"{op}.{kind}.{number}"] = source
            continue
        outputs = None if node.outputs is None else [_highest([part.outputs[i] for part in parts]) for i in _all(node)]
        if expert_parallel and local and outputs is not None:
            outputs = [outputs[0], *(maximum for part in parts for maximum in part.outputs[1:])]
        merged[name] = Node(
            tuple(_highest([part.inputs[i] for part in parts]) for i in range(len(node.inputs))),
            None if outputs is None else tuple(outputs),
            None if node.weight is None else _highest([part.weight for part in parts]),
        )
    return merged


def _all(node: Node) -> range:
    return range(len(node.outputs or ()))


def _highest(values: Sequence[np.ndarray]) -> np.ndarray:
    return max(values, key=lambda value: value[0])
