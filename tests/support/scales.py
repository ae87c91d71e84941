"""Scales in a form that two sides can be compared in."""

from typing import Any

import numpy as np

from gaudi_calib.ranges.node import PerChannelWeight, ScaleNode


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


def _to_list(value: float | np.ndarray) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
