"""The nested dicts, lists and arrays of a rank file: tables into them, and out of them.

    {"NumSamples": 10, "GlobalRank": null, "LocalRank": 0, "Mode": "DynamicRange", "Nodes": {
        "<module>": {"inputs": [[[x]], ...], "outputs": [[[x]], ...], "params": {"weight": [[x]]}}}}

Keys that do not apply to ranges are absent. In scales `Mode` is `Scale`, every node has all
three keys, a scale is a bare number, and a per-channel weight is {0: per output channel, 1: per
input channel}. Numbers are float32 arrays in the pickle, lists in the json.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.ranges.node import Node, PerChannelWeight, ScaleNode
from gaudi_calib.ranges.table import Inventory, RangeShape, RangeTable, ScaleShape, ScaleTable, tabulate_scales

RANGES_MODE, SCALES_MODE = "DynamicRange", "Scale"
_FIXES = {
    RANGES_MODE: "restore the file or measure again",
    SCALES_MODE: "restore the file, or compute the scales anew",
}


# A number that stands where a rank's own will: none of its bytes occurs in UTF-8.
HOLE = np.frombuffer(b"\xf9\xfa\xfb\xfc", dtype="<f4")[0]


class Head(NamedTuple):
    """What stands before the nodes in a rank file.

    Attributes:
        mode: `DynamicRange` or `Scale`.
        local_rank: the rank, or -1.
        num_samples: forward calls, None where not recorded.
    """

    mode: str
    local_rank: int
    num_samples: int | None = None


class _FlatNode(NamedTuple):
    """A node of ranges in the json of a rank, as soon as it has been parsed."""

    shape: RangeShape
    values: tuple[float, ...]


_make_shape = lru_cache(maxsize=1024)(RangeShape)  # few are different


def encode_rank(head: Head, nodes: Any) -> dict[str, Any]:
    """Return the dict of a rank file; `nodes` is what its key `Nodes` holds."""
    samples = {} if head.num_samples is None else {"NumSamples": head.num_samples}
    return {**samples, "GlobalRank": None, "LocalRank": head.local_rank, "Mode": head.mode, "Nodes": nodes}


def decode_head(value: Mapping[str, Any]) -> Head | None:
    """Return the head of a rank file's dict, or None where it is not laid out as `encode_rank` does it."""
    mode, rank, samples = value.get("Mode"), value.get("LocalRank"), value.get("NumSamples")
    if isinstance(mode, str) and type(rank) is int and (samples is None or type(samples) is int):
        return Head(mode, rank, samples)
    return None


def encode_node(node: Node | ScaleNode) -> dict[str, Any]:
    """Return a node with its numbers as float32 arrays: a range of shape (channels, 1), a scale of shape ()."""
    return _encode_ranges(node) if isinstance(node, Node) else _encode_scales(node)


def encode_samples(shapes: Sequence[RangeShape] | Sequence[ScaleShape]) -> list[dict[str, Any]]:
    """Return a node of each of `shapes` (all of ranges, or all of scales), every number `HOLE`."""
    inventory: Inventory = Inventory([str(number) for number in range(len(shapes))], shapes)
    numbers, is_range = np.full(inventory.size, HOLE), all(isinstance(shape, RangeShape) for shape in shapes)
    table = RangeTable(inventory, numbers) if is_range else ScaleTable(inventory, numbers, {})
    return [encode_node(table[name]) for name in inventory.names]


def to_lists(value: Any) -> Any:
    """Return `value` with lists in the place of arrays and tuples, as json has it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: to_lists(item) for key, item in value.items()}
    return [to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode_table(path: Path, value: Any, mode: str) -> RangeTable | ScaleTable:
    """Return the nodes of a rank's dict, from json or npz.

    Args:
        path: the file, for errors.
        mode: `DynamicRange` or `Scale`, whichever is expected.

    Raises:
        FileError: no nodes, another mode, or a node is malformed.
    """
    nodes = require_nodes(path, value)
    if value.get("Mode", mode) != mode:
        raise FileError(f"{path.name} holds {value['Mode']}, expected {mode}", where=path, fix=_FIXES[mode])
    return _decode_ranges(path, nodes) if mode == RANGES_MODE else _decode_scales(path, nodes)


def require_nodes(path: Path, value: Any) -> dict[str, Any]:
    """Return the nodes in a rank's dict.

    Raises:
        FileError: there are none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("Nodes"), dict):
        raise FileError(f"{path.name} has no Nodes", where=path, fix="restore the file, or make it again")
    return value["Nodes"]


def flatten_node(value: dict[str, Any]) -> Any:
    """Return a node of ranges flat, and anything else as it is.

    As `object_hook` of the json parser it keeps a rank's many small lists from piling up.
    """
    try:
        return _flatten(value) if isinstance(value.get("inputs"), list) else value
    except (TypeError, ValueError, AttributeError, OverflowError):
        return value  # `decode_table` will say which node it is


def is_same_table(left: RangeTable | ScaleTable, right: RangeTable | ScaleTable) -> bool:
    """Equality as float32 values, in which NaN equals NaN."""
    if not left.inventory.equals(right.inventory) or not np.array_equal(left.numbers, right.numbers, equal_nan=True):
        return False
    ours, theirs = ({name: encode_node(node) for name, node in table.others.items()} for table in (left, right))
    return json.dumps(to_lists(ours)) == json.dumps(to_lists(theirs))


def _encode_ranges(node: Node) -> dict[str, Any]:
    value: dict[str, Any] = {"inputs": [_to_matrix(values) for values in node.inputs]}
    if node.outputs is not None:
        value["outputs"] = [_to_matrix(values) for values in node.outputs]
    if node.weight is not None:
        value["params"] = {"weight": _to_matrix(node.weight)}
    return value


def _to_matrix(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1)


def _encode_scales(node: ScaleNode) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if isinstance(node.weight, PerChannelWeight):
        params["weight"] = {0: np.float32(node.weight.out_channels), 1: np.float32(node.weight.in_channels)}
    elif node.weight is not None:
        params["weight"] = np.asarray(node.weight, dtype=np.float32)
    return {
        "inputs": [np.asarray(scale, dtype=np.float32) for scale in node.inputs],
        "outputs": tuple(np.asarray(scale, dtype=np.float32) for scale in node.outputs),
        "params": params,
    }


def _decode_ranges(path: Path, nodes: Mapping[str, Any]) -> RangeTable:
    values: list[float] = []
    shapes = []
    for name, node in nodes.items():
        try:
            shape, numbers = node if isinstance(node, _FlatNode) else _flatten(node)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            fix = _FIXES[RANGES_MODE]
            raise FileError(f"cannot read the ranges of {name}", where=path, why=str(error), fix=fix) from error
        shapes.append(shape)
        values += numbers
    with np.errstate(over="ignore"):
        return RangeTable(Inventory(tuple(nodes), shapes), np.array(values, dtype=np.float32))


def _flatten(node: Any) -> _FlatNode:
    values: list[float] = []
    outputs, weight = node.get("outputs"), node.get("params", {}).get("weight")
    shape = _make_shape(
        tuple([_take_channels(range_, values) for range_ in node.get("inputs", ())]),
        None if outputs is None else tuple([_take_channels(range_, values) for range_ in outputs]),
        None if weight is None else _take_channels(weight, values),
    )
    return _FlatNode(shape, tuple(values))


def _take_channels(value: Any, values: list[float]) -> int:
    """Append the numbers of one range to `values` and return how many they are."""
    if type(value) is list and len(value) == 1:
        row = value[0]
        if type(row) is list and len(row) == 1 and type(row[0]) is float:
            values.append(row[0])
            return 1
    numbers = np.asarray(value)
    if numbers.dtype.kind == "U":
        raise TypeError(f"text where a number belongs: {numbers.flat[0]!r}")
    with np.errstate(over="ignore"):
        channels = numbers.astype(np.float32).ravel().tolist()
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
    inputs = tuple([float(value) for value in node.get("inputs", ())])
    return ScaleNode(inputs, tuple([_to_scale(value) for value in node.get("outputs", ())]), scale)


def _to_scale(value: Any) -> float | np.ndarray:
    return float(value) if np.ndim(value) == 0 else _to_vector(value)


def _to_vector(value: Any) -> np.ndarray:
    return np.asarray(value, dtype=np.float32).reshape(-1)
