"""Nested lists and dicts of a rank file into tables."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.ranges.node import PerChannelWeight, ScaleNode
from gaudi_calib.ranges.table import Inventory, RangeShape, RangeTable, ScaleTable, tabulate_scales

RANGES_MODE, SCALES_MODE = "DynamicRange", "Scale"
_FIXES = {
    RANGES_MODE: "restore the file or measure again",
    SCALES_MODE: "restore the file, or make it again with `gaudi-calib quantize`",
}


def decode_table(path: Path, value: Any, mode: str) -> RangeTable | ScaleTable:
    """Return the nodes of a rank's dict, from json or npz.

    Args:
        path: the file, for errors.
        mode: `DynamicRange` or `Scale`, whichever is expected.

    Raises:
        FileError: no nodes, another mode, or a node is malformed.
    """
    if not isinstance(value, dict) or not isinstance(value.get("Nodes"), dict):
        raise FileError(f"{path.name} has no Nodes", where=path, fix="restore the file or measure again")
    if value.get("Mode", mode) != mode:
        raise FileError(f"{path.name} holds {value['Mode']}, expected {mode}", where=path, fix=_FIXES[mode])
    return _decode_ranges(path, value["Nodes"]) if mode == RANGES_MODE else _decode_scales(path, value["Nodes"])


def is_same_table(left: RangeTable | ScaleTable, right: RangeTable | ScaleTable) -> bool:
    """Equality as float32 values, in which NaN equals NaN."""
    if not left.inventory.equals(right.inventory) or not np.array_equal(left.numbers, right.numbers, equal_nan=True):
        return False
    if isinstance(left, ScaleTable) and isinstance(right, ScaleTable):
        return all(_is_same(node, right.others.get(name)) for name, node in left.others.items())
    return type(left) is type(right)


def _decode_ranges(path: Path, nodes: Mapping[str, Any]) -> RangeTable:
    values: list[float] = []
    shapes: dict[tuple, RangeShape] = {}
    found = []
    for name, node in nodes.items():
        try:
            outputs, weight = node.get("outputs"), node.get("params", {}).get("weight")
            key = (
                tuple([_take_channels(one, values) for one in node.get("inputs", ())]),
                None if outputs is None else tuple([_take_channels(one, values) for one in outputs]),
                None if weight is None else _take_channels(weight, values),
            )
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            fix = _FIXES[RANGES_MODE]
            raise FileError(f"cannot read the ranges of {name}", where=path, why=str(error), fix=fix) from error
        shape = shapes.get(key)
        if shape is None:
            shape = shapes[key] = RangeShape(*key)
        found.append(shape)
    with np.errstate(over="ignore"):
        return RangeTable(Inventory(tuple(nodes), found), np.array(values, dtype=np.float32))


def _take_channels(value: Any, values: list[float]) -> int:
    """Append the numbers of one range to `values` and return how many they are."""
    if type(value) is list and len(value) == 1:
        row = value[0]
        if type(row) is list and len(row) == 1 and type(row[0]) is float:
            values.append(row[0])
            return 1
    with np.errstate(over="ignore"):
        channels = np.asarray(value, dtype=np.float32).ravel().tolist()
    values += channels
    return len(channels)


def _decode_scales(path: Path, nodes: Mapping[str, Any]) -> ScaleTable:
    decoded = {}
    for name, node in nodes.items():
        try:
            decoded[name] = _decode_scale_node(node)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            fix = _FIXES[SCALES_MODE]
            raise FileError(f"cannot read the scales of {name}", where=path, why=str(error), fix=fix) from error
    return tabulate_scales(decoded)


def _decode_scale_node(node: Any) -> ScaleNode:
    weight = node.get("params", {}).get("weight")
    scale: float | np.ndarray | PerChannelWeight | None = None
    if isinstance(weight, dict):
        out_channels, in_channels = (weight.get(key, weight.get(str(key))) for key in (0, 1))
        scale = PerChannelWeight(_to_vector(out_channels), _to_vector(in_channels))
    elif weight is not None:
        scale = _to_scale(weight)
    inputs = tuple([float(one) for one in node.get("inputs", ())])
    return ScaleNode(inputs, tuple([_to_scale(one) for one in node.get("outputs", ())]), scale)


def _to_scale(value: Any) -> float | np.ndarray:
    return float(value) if np.ndim(value) == 0 else _to_vector(value)


def _to_vector(value: Any) -> np.ndarray:
    return np.asarray(value, dtype=np.float32).reshape(-1)


def _is_same(left: Any, right: Any) -> bool:
    if isinstance(left, (ScaleNode, PerChannelWeight)):
        if type(left) is not type(right):
            return False
        return all(_is_same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    if isinstance(left, tuple):
        return isinstance(right, tuple) and len(left) == len(right) and all(map(_is_same, left, right))
    if left is None or right is None:
        return left is right
    return np.array_equal(np.float32(left), np.float32(right), equal_nan=True)
