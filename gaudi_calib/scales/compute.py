"""Scales from ranges: what INC writes to a scale file, for either device, on any machine.

Nodes with the same operation, shape and rules are one *class* (a model has a dozen): its
ranges are the rows of a matrix, and its scales follow column by column. Only per-channel
and `OPT` weights are visited one by one.

    op                   inputs                          output                 weight
    linear               x                               input * weight         range, or the weight itself
    row_parallel_linear  x                               outputs[0]             the same
    matmul               a, b                            a * b
    b2b_matmul           a, outputs[0]                   product of the two; without outputs: as matmul
    kv_cache             x                               that of the input
    softmax                                              outputs[0]
    fused_sdpa           q, k, v, outputs[1]             outputs[0]
    dynamic_moe          x, outputs[1:] (the experts)    outputs[0]

Source: INC fp8_quant/_core/scale_methods/ops_quantizer.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gaudi_calib.config.methods import MethodTable, ScaleMethod, TensorScaling, get_scale_method
from gaudi_calib.errors import ConfigError, IdleExpertError, RangeError
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.layer_types import find_layer_type, is_expert_matmul
from gaudi_calib.ranges.node import Node, Op, PerChannelWeight, RankSet, ScaleNode, find_op
from gaudi_calib.ranges.sources import find_sources, list_experts
from gaudi_calib.ranges.table import (
    Inventory,
    Part,
    RangeShape,
    RangeTable,
    ScaleShape,
    ScaleTable,
    label_part,
    locate_parts,
    tabulate_ranges,
)
from gaudi_calib.scales.optimal import choose_tensor_scale
from gaudi_calib.scales.precision import FP32, PRECISIONS, Precision
from gaudi_calib.scales.rounding import round_scales
from gaudi_calib.scales.tensor import scale_channels, scale_ranges

WeightReader = Callable[[str], "np.ndarray | None"]


def compute_scales(
    ranges: RankSet[Node],
    method: MethodTable | str,
    device: Device,
    *,
    weights: WeightReader,
    layer_types: Mapping[str, str] | None = None,
    hp_dtype: str = "BF16",
    allows_idle: bool = False,
    as_on_cpu: bool = False,
) -> RankSet[ScaleNode]:
    """Return the scales of one rank, bit for bit those INC computes on a Gaudi.

    Args:
        ranges: one rank's ranges; rounded to `hp_dtype` first, as INC does.
        method: a published name, or the table of a dict form. Dynamic-only methods are computed as
            if static (a per-channel activation gets one scale from its range).
        device: the device that will serve.
        weights: returns the rank's weight of a node, float32 of shape (out, in), or None.
            Called only for per-channel and `OPT` rules, and where a weight has no range.
        layer_types: module class by node name, for nodes `find_layer_type` gets wrong.
        hp_dtype: what INC computes in: `BF16`, `FP16` or `FP32`, as in QUANT_CONFIG.
        allows_idle: give experts that saw no token a scale of 0, as INC does; what a token becomes
            that is sent to one when serving, nobody knows.
        as_on_cpu: give the scales that INC computes on a CPU instead, which divides ranges where a Gaudi
            multiplies them by a rounded reciprocal. For comparison with INC where there is no Gaudi.

    Returns:
        Nodes in the order of `ranges`. Scales are floats; output scales of a linear
        layer with a per-channel weight are float32 arrays of shape (out,), with a per-tensor
        `OPT` weight of shape (1,).

    Raises:
        RangeError: a range that is needed is missing, NaN, infinite, negative, or leads to a
            scale of 0 (a division by zero when serving), or a weight is missing or malformed.
        IdleExpertError: it is the range of an expert, and `allows_idle` is not given.
        ConfigError: the table has `layer_types` and a node's class is not known, or an `OPT` rule and another
            `hp_dtype` than BF16.
    """
    table = MethodTable(get_scale_method(method)) if isinstance(method, str) else method
    require_precision(table, hp_dtype)
    formats = _Formats(device, replace(PRECISIONS[hp_dtype], divides=as_on_cpu))
    measured = tabulate_ranges(ranges.nodes)
    names, count = measured.inventory.names, len(measured.inventory.names)
    shapes = [ScaleShape(0, 0, False)] * count
    solved = []
    others: dict[str, ScaleNode] = {}
    for alike in _find_classes(measured.inventory, table, layer_types or {}):
        scales = _solve_class(alike, measured, formats, allows_idle=allows_idle)
        if scales.weight_rule is not None:
            for row, inputs, output in zip(alike.rows.tolist(), scales.inputs, scales.output, strict=True):
                rule = scales.weight_rule
                others[names[row]] = _scale_node(names[row], inputs.tolist(), output, rule, weights, formats)
            continue
        shape = ScaleShape(scales.inputs.shape[1], 1, scales.weight is not None)
        for row in alike.rows.tolist():
            shapes[row] = shape
        columns = [scales.inputs, scales.output[:, None], *([] if scales.weight is None else [scales.weight[:, None]])]
        solved.append((alike.rows, np.concatenate(columns, axis=1)))
    inventory = Inventory(names, shapes)
    numbers = np.empty(inventory.size, dtype=np.float32)
    for rows, matrix in solved:
        numbers[inventory.starts[rows][:, None] + np.arange(matrix.shape[1])] = matrix
    nodes = ScaleTable(inventory, numbers, others)
    return RankSet(ranges.rank, ranges.world, nodes, ranges.modules, dump=ranges.dump)


class _Formats(NamedTuple):
    """The number formats of the scaled values and of the scales.

    Attributes:
        device: whose FP8 applies.
        precision: what scales are computed in.
    """

    device: Device
    precision: Precision


def require_precision(table: MethodTable, hp_dtype: str) -> None:
    """Raise ConfigError unless the scales of `table` can be computed in `hp_dtype`."""
    if hp_dtype != "BF16" and any(method.weight.scale_value_type == "OPT" for method in table.methods):
        raise ConfigError(
            f"{table.file_tag.lower()} is computed for bfloat16 only, and hp_dtype is {hp_dtype}",
            where="scale_method",
            why="it tries scales on every weight in the arithmetic of that type",
            fix="serve in bfloat16, or choose a method without OPT, such as maxabs_hw",
        )


class _Class(NamedTuple):
    """Nodes that are scaled alike.

    Attributes:
        rows: int64, shape (nodes,): their positions in the inventory.
        names: all names of the inventory, for errors.
    """

    op: Op
    shape: RangeShape
    rules: ScaleMethod
    rows: np.ndarray
    names: Sequence[str]


class _ClassScales(NamedTuple):
    """Scales of a class, float32.

    Attributes:
        inputs: shape (nodes, inputs).
        output: shape (nodes,); NaN where it follows from a weight that is read one by one.
        weight: shape (nodes,), or None.
        weight_rule: how to scale the weight itself, or None where its range was enough.
    """

    inputs: np.ndarray
    output: np.ndarray
    weight: np.ndarray | None = None
    weight_rule: TensorScaling | None = None


def _find_classes(inventory: Inventory, table: MethodTable, layer_types: Mapping[str, str]) -> list[_Class]:
    is_uniform = not (table.nodes or table.layers or table.layer_types)
    ops: dict[tuple[str, int], Op] = {}
    classes: dict[tuple[Op, int, ScaleMethod | None], list[int]] = {}
    for row, (name, kind) in enumerate(zip(inventory.names, inventory.kinds.tolist(), strict=True)):
        suffix = name[name.rfind(".") + 1 :]
        op = ops.get((suffix, kind))
        if op is None:
            op = ops[suffix, kind] = find_op(suffix, inventory.distinct_shapes[kind])
        rules = None if is_uniform else _find_rules(name, op, table, layer_types)
        classes.setdefault((op, kind, rules), []).append(row)
    return [
        _Class(op, inventory.distinct_shapes[kind], rules or table.default, np.array(rows), inventory.names)
        for (op, kind, rules), rows in classes.items()
    ]


def _find_rules(name: str, op: Op, table: MethodTable, layer_types: Mapping[str, str]) -> ScaleMethod:
    layer_type = layer_types.get(name) or find_layer_type(name, op)
    if layer_type is None and table.layer_types:
        raise ConfigError(
            f"the module class of node {name!r} is not known",
            where="scale_method.layer_types",
            fix="name the node under 'nodes', or pass its class in layer_types",
        )
    return table.for_node(name, layer_type)


def _solve_class(alike: _Class, measured: RangeTable, formats: _Formats, *, allows_idle: bool) -> _ClassScales:
    activation, (inputs, output) = alike.rules.activation, find_sources(alike.op, alike.shape)
    is_linear = alike.op in (Op.LINEAR, Op.ROW_PARALLEL_LINEAR)
    if is_linear and activation.is_fixed:
        output = ("outputs", 0)
    parts = inputs if output is None else [*inputs, output]
    scales = _scale_parts(alike, parts, activation, measured, formats, allows_idle=allows_idle)
    entries = scales[:, : len(inputs)]
    if alike.op is Op.KV_CACHE:
        return _ClassScales(entries, entries[:, 0])
    if not is_linear:
        product = formats.precision.multiply(entries[:, 0], entries[:, 1]) if output is None else scales[:, -1]
        return _ClassScales(entries, product)
    rule, own = alike.rules.weight, scales[:, -1] if output is not None else None
    has_range = alike.shape.weight is not None and rule.scale_value_type == "MAXABS" and not rule.is_per_channel
    if not (rule.is_fixed or has_range):
        return _ClassScales(entries, np.full(len(scales), np.nan) if own is None else own, weight_rule=rule)
    weight = _scale_parts(alike, [("weight", 0)], rule, measured, formats)[:, 0]
    return _ClassScales(entries, formats.precision.multiply(weight, entries[:, 0]) if own is None else own, weight)


def _scale_parts(
    alike: _Class,
    parts: Sequence[Part],
    rule: TensorScaling,
    measured: RangeTable,
    formats: _Formats,
    *,
    allows_idle: bool = False,
) -> np.ndarray:
    """Return the scales of some ranges of a class: float32, shape (nodes, parts)."""
    if rule.is_fixed:
        return scale_ranges(np.zeros((len(alike.rows), len(parts))), rule, *formats)
    measured_ranges = _take_ranges(alike, parts, measured)
    ranges = formats.precision.round(measured_ranges)
    bad = ~(np.isfinite(ranges) & (ranges >= 0))
    if bad.any():
        node, part = np.argwhere(bad)[0].tolist()
        found = float(measured_ranges[node, part])
        name, label = alike.names[alike.rows[node]], label_part(parts[part])
        raise _bad_range(name, label, found, int(bad.sum()), formats.precision)
    scales = scale_ranges(ranges, rule, *formats)
    experts = set(list_experts(alike.op, alike.shape))
    idle = (scales == 0) & (ranges == 0) & np.array([part in experts for part in parts])
    if idle.any() and not allows_idle:
        node = int(idle.any(axis=1).argmax())
        raise _idle_experts(alike.names[alike.rows[node]], int(idle.sum()), int(idle.any(axis=1).sum()))
    for node, part in np.argwhere(((scales == 0) | ~np.isfinite(scales)) & ~idle).tolist():
        name, label = alike.names[alike.rows[node]], label_part(parts[part])
        if not (ranges[node, part] == 0 and is_expert_matmul(name) and label == "inputs[0]"):
            raise _bad_scale(name, label, float(measured_ranges[node, part]), float(scales[node, part]), rule)
    return scales


def _take_ranges(alike: _Class, parts: Sequence[Part], measured: RangeTable) -> np.ndarray:
    """Return the largest channel of each range: float32, shape (nodes, parts)."""
    places = locate_parts(alike.shape)
    missing = next((part for part in parts if places.get(part, (0, 0))[1] == 0), None)
    if missing is not None:
        raise RangeError(
            f"node {alike.names[alike.rows[0]]!r} has no range {label_part(missing)}",
            where=alike.names[alike.rows[0]],
            why=f"the scales of a {alike.op.value} need it",
            fix="measure the model again",
        )
    starts = measured.inventory.starts[alike.rows][:, None]
    chosen = [places[part] for part in parts]
    if all(channels == 1 for _, channels in chosen):
        return measured.numbers[starts + np.array([offset for offset, _ in chosen], dtype=np.int64)]
    columns = [measured.numbers[starts + offset + np.arange(channels)].max(axis=1) for offset, channels in chosen]
    return np.stack(columns, axis=1)


def _scale_node(
    name: str, inputs: list[float], output: float, rule: TensorScaling, weights: WeightReader, formats: _Formats
) -> ScaleNode:
    """Return the scales of a linear layer whose weight has to be looked at; `output` is NaN where it follows."""
    scales, stored = _scale_weight(name, rule, weights, formats)
    if not np.isnan(output):
        return ScaleNode(tuple(inputs), (float(output),), stored)
    product = np.multiply(scales, np.float32(inputs[0]))
    if rule.scale_value_type != "OPT" or rule.is_per_channel:
        product = formats.precision.round(product)
    return ScaleNode(tuple(inputs), (float(product) if product.ndim == 0 else product,), stored)


def _scale_weight(
    name: str, rule: TensorScaling, weights: WeightReader, formats: _Formats
) -> tuple[np.ndarray, float | np.ndarray | PerChannelWeight]:
    """Return the weight's scales and the form they are stored in."""
    weight = _read_weight(name, weights)
    if rule.is_per_channel:
        scales = scale_channels(weight, rule, *formats)
        stored: float | np.ndarray | PerChannelWeight = PerChannelWeight(
            scales, np.ones(weight.shape[1], dtype=np.float32)
        )
    elif rule.scale_value_type == "OPT":
        chosen = choose_tensor_scale(weight, rule.find_candidates(formats.device), formats.device)
        # INC keeps these in float32.
        stored = scales = round_scales(np.array([chosen], dtype=np.float32), rule.rounding_method, formats.device, FP32)
    else:
        scales = scale_ranges(np.abs(weight).max(initial=0.0), rule, *formats)
        stored = float(scales)
    if not np.all(np.isfinite(scales) & (scales > 0)):
        largest = float(np.abs(weight).max(initial=0.0))
        raise _bad_scale(name, "weight", largest, float(np.min(scales)), rule)
    return scales, stored


def _read_weight(name: str, weights: WeightReader) -> np.ndarray:
    weight = weights(name)
    if weight is None:
        raise RangeError(
            f"node {name!r} has no weight to take scales from",
            where=name,
            why="the scale method needs the weight itself",
            fix="give the model the ranges were measured on, or choose a method such as maxabs_hw",
        )
    if weight.ndim != 2:
        raise RangeError(
            f"the weight of {name!r} has {weight.ndim} dimensions, not 2",
            where=name,
            fix="name it in the blocklist of the QUANT_CONFIG, or choose a method such as maxabs_hw",
        )
    if not np.isfinite(weight).all():
        raise RangeError(f"the weight of {name!r} holds NaN or inf", where=name, fix="repair the checkpoint")
    return weight


def _bad_range(name: str, part: str, value: float, count: int, precision: Precision) -> RangeError:
    more = f" (and {count - 1} more)" if count > 1 else ""
    return RangeError(
        f"range {part} of node {name!r} is {value}{more}",
        where=name,
        why=f"a range is a finite maximum of absolute values that {precision.dtype} can hold",
        fix="find the sample that overflows and measure again",
    )


def _idle_experts(name: str, experts: int, layers: int) -> IdleExpertError:
    return IdleExpertError(
        f"experts that saw no token would get a scale of 0: {experts} in {layers} layer{'s' * (layers > 1)}",
        where=name,
        why="their ranges are 0, and dividing by the scale gives inf or NaN as soon as a token is sent to one",
        fix="measure with more data, so that tokens reach every expert; or use a hardware-aligned method, whose "
        "smallest scale is not 0: there such an expert adds next to nothing",
    )


def _bad_scale(name: str, part: str, value: float, scale: float, method: TensorScaling) -> RangeError:
    exact = method.rounding_method in ("POW2", "IDENTITY")
    return RangeError(
        f"the scale of {part} of node {name!r} is {scale:g}",
        where=name,
        why=f"its range is {value:g}" + ("; dividing by the scale would give inf or NaN when serving" if exact else ""),
        fix="measure with more samples so that the module sees data, block it, or use a hardware-aligned method, "
        "whose smallest scale is not 0",
    )
