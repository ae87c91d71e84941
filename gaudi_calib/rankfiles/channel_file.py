"""`channel_ranges.safetensors`: a whole model's per-channel measurement, one file.

Tensor names are `<node>|<inputs.i, outputs.i, weight or softmax_sums>`, float32,
shape (channels,). The metadata entry `channel_ranges` is JSON: format version,
modules, number of samples, and per node its op, axes and partial products. A fused
expert op adds `<node>|experts.<field>` (ranges rounded to bfloat16, which commutes with
the maximum over a rank's share) and `<node>|experts.outputs.<topology>`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.files import parse_json, write_bytes
from gaudi_calib.models.headers import read_header
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.channels import ChannelNode, ChannelRange, ChannelRanges, ExpertChannels
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.topology import Axis, Segment

_VERSION = 2
_KEY = "channel_ranges"
_EXPERT_RANGES = ("intermediate", "gate_up", "down")
_EXPERT_COUNTS = ("tokens", "filled")


def write_channel_ranges(path: Path, channels: ChannelRanges) -> None:
    """Write `channels` atomically.

    Raises:
        FileError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    nodes: dict[str, Any] = {}
    for name, node in channels.nodes.items():
        axes = {}
        for part, range_ in _parts(node).items():
            tensors[f"{name}|{part}"] = np.ascontiguousarray(range_.values, dtype=np.float32)
            axes[part] = [[segment.channels, segment.units, segment.replicates] for segment in range_.axis.segments]
        nodes[name] = {"op": node.op.value, "axes": axes, "partial_products": _to_lists(node.partial_products)}
        if node.experts is not None:
            facts = {"count": node.experts.count, "routing": node.experts.routing, "bias": node.experts.bias}
            nodes[name]["experts"] = facts
            tensors |= {f"{name}|experts.{part}": values for part, values in _expert_tensors(node.experts).items()}
    header = {
        "version": _VERSION,
        "num_samples": channels.num_samples,
        "modules": list(channels.modules),
        "nodes": nodes,
    }
    write_bytes(path, save(tensors, metadata={_KEY: json.dumps(header)}))


def read_channel_ranges(path: Path) -> ChannelRanges:
    """Read what `write_channel_ranges` wrote.

    Raises:
        FileError: the file is missing, damaged, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(
            f"no {path.name}",
            where=path,
            why="only the torch engine writes it",
            fix="measure with the torch engine first",
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = parse_json((file.metadata() or {})[_KEY])
            if header["version"] != _VERSION:
                raise FileError(
                    f"{path.name} has format version {header['version']}, this release reads {_VERSION}",
                    where=path,
                    fix="measure again",
                )
            nodes = {name: _read_node(file, name, facts) for name, facts in header["nodes"].items()}
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path.name} is damaged", where=path, why=str(error), fix="measure again") from error
    return ChannelRanges(nodes, tuple(header["modules"]), header["num_samples"])


def read_expert_count(path: Path) -> int | None:
    """Return the experts per layer, from the header alone; None where there is no layer of them, or they differ.

    Raises:
        FileError: the file is damaged.
    """
    try:
        nodes = parse_json(read_header(path).metadata[_KEY])["nodes"]
        counts = {facts["experts"]["count"] for facts in nodes.values() if "experts" in facts}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.why if isinstance(error, FileError) else str(error)
        raise FileError(f"{path.name} is damaged", where=path, why=why, fix="measure again") from error
    return counts.pop() if len(counts) == 1 else None


def _to_lists(products: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    return {world: list(values) for world, values in products.items()}


def _parts(node: ChannelNode) -> dict[str, ChannelRange]:
    parts = {f"inputs.{i}": range_ for i, range_ in enumerate(node.inputs)}
    parts |= {f"outputs.{i}": range_ for i, range_ in enumerate(node.outputs or ())}
    if node.weight is not None:
        parts["weight"] = node.weight
    if node.softmax_sums is not None:
        parts["softmax_sums"] = node.softmax_sums
    return parts


def _expert_tensors(experts: ExpertChannels) -> dict[str, np.ndarray]:
    tensors = {part: _to_bits(getattr(experts, part)) for part in _EXPERT_RANGES}
    tensors |= {part: getattr(experts, part) for part in _EXPERT_COUNTS}
    return tensors | {f"outputs.{key}": np.asarray(values, dtype=np.float32) for key, values in experts.outputs.items()}


def _read_experts(file: Any, name: str, facts: dict[str, Any]) -> ExpertChannels:
    prefix = f"{name}|experts."
    ranges = {part: _from_bits(file.get_tensor(prefix + part)) for part in _EXPERT_RANGES}
    counts = {part: file.get_tensor(prefix + part) for part in _EXPERT_COUNTS}
    outputs = {
        key.removeprefix(f"{prefix}outputs."): file.get_tensor(key)
        for key in file.keys()
        if key.startswith(f"{prefix}outputs.")
    }
    routing, bias = facts["routing"], facts["bias"]
    return ExpertChannels(**ranges, **counts, routing=routing, bias=bias, outputs=outputs, progress=None)


def _to_bits(values: np.ndarray) -> np.ndarray:
    """Upper 16 bits of the values rounded to bfloat16, which NumPy lacks."""
    return (round_to_bf16(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _read_node(file: Any, name: str, facts: dict[str, Any]) -> ChannelNode:
    parts = {
        part: ChannelRange(file.get_tensor(f"{name}|{part}"), Axis(tuple(Segment(*segment) for segment in segments)))
        for part, segments in facts["axes"].items()
    }
    inputs = tuple(parts[part] for part in facts["axes"] if part.startswith("inputs."))
    outputs = tuple(parts[part] for part in facts["axes"] if part.startswith("outputs."))
    products = {int(world): tuple(value) for world, value in facts["partial_products"].items()}
    return ChannelNode(
        Op(facts["op"]),
        inputs,
        outputs or None,
        parts.get("weight"),
        products,
        parts.get("softmax_sums"),
        _read_experts(file, name, facts["experts"]) if "experts" in facts else None,
    )
