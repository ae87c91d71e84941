"""Ranges and scales of INC's JSON, and ours in a form that can be compared with it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gaudi_calib.ranges.node import Node, PerChannelWeight, RankSet, ScaleNode


def to_rank(nodes: Mapping[str, dict]) -> RankSet[Node]:
    """Return the `Nodes` of a file of ranges as the only rank of a world."""
    return RankSet(
        0,
        1,
        {
            name: Node(
                tuple(map(_to_vector, node["inputs"])),
                tuple(map(_to_vector, node["outputs"])) if "outputs" in node else None,
                _to_vector(node["params"]["weight"]) if node.get("params") else None,
            )
            for name, node in nodes.items()
        },
    )


def to_json(node: ScaleNode) -> dict[str, Any]:
    """Return scales as INC writes them to JSON, and as `tests.oracles.inc_scales` gives them."""
    weight = node.weight
    if isinstance(weight, PerChannelWeight):
        params: dict[str, Any] = {"weight": {0: weight.out_channels.tolist(), 1: weight.in_channels.tolist()}}
    else:
        params = {} if weight is None else {"weight": _to_list(weight)}
    return {
        "inputs": [_to_list(scale) for scale in node.inputs],
        "outputs": [_to_list(scale) for scale in node.outputs],
        "params": params,
    }


def _to_vector(matrix: list) -> np.ndarray:
    return np.array(matrix, dtype=np.float32).reshape(-1)


def _to_list(value: float | np.ndarray) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
