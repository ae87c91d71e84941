"""Scales from ranges: what INC writes to a scale file, for either device, on any machine.

Per-tensor scales are gathered over all nodes, computed once per distinct rule as one
array, and put back; only per-channel and `OPT` weights are visited one by one.

    op                   inputs                          output                 weight
    linear               x                               input * weight         range, or the weight itself
    row_parallel_linear  x                               outputs[0]             the same
    matmul               a, b                            a * b
    b2b_matmul           a, outputs[0]                   product of the two
    kv_cache             x                               that of the input
    softmax                                              outputs[0]
    fused_sdpa           q, k, v, outputs[1]             outputs[0]
    dynamic_moe          x, outputs[1:] (the experts)    outputs[0]

Source: INC fp8_quant/_core/scale_methods/ops_quantizer.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gaudi_calib.config_methods import MethodTable, ScaleMethod, TensorScaling, get_scale_method
from gaudi_calib.errors import ConfigError, RangeError
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges import bf16
from gaudi_calib.ranges.node import Node, Op, PerChannelWeight, RankSet, ScaleNode, find_op
from gaudi_calib.scales.layer_types import find_layer_type, is_expert_matmul
from gaudi_calib.scales.optimal import choose_tensor_scale
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
) -> RankSet[ScaleNode]:
    """Return the scales of one rank, bit for bit those INC computes.

    Args:
        ranges: one rank's ranges; rounded to bfloat16 first, as INC does.
        method: a published name, or the table of a dict form. Dynamic-only methods are computed as
            if static (a per-channel activation gets one scale from its range).
        device: the device that will serve.
        weights: returns the rank's weight of a node, float32 of shape (out, in), or None.
            Called only for per-channel and `OPT` rules, and where a weight has no range.
        layer_types: module class by node name, for nodes `find_layer_type` gets wrong.

    Returns:
        Nodes in the order of `ranges`. Scales are floats; output scales of a linear
        layer with a per-channel weight are float32 arrays of shape (out,), with a per-tensor
        `OPT` weight of shape (1,).

    Raises:
        RangeError: a range that is needed is missing, NaN, infinite, negative, or leads to a
            scale of 0 (a division by zero when serving), or a weight is missing or malformed.
        ConfigError: the table has `layer_types` and a node's class is not known.
    """
    table = MethodTable(get_scale_method(method)) if isinstance(method, str) else method
    batch = _Batch(device)
    plans = {name: _plan_node(name, node, table, layer_types or {}, batch) for name, node in ranges.nodes.items()}
    values = batch.solve()
    nodes = {name: _fill_plan(name, plan, values, weights, device) for name, plan in plans.items()}
    return RankSet(ranges.rank, ranges.world, nodes, ranges.modules)


@dataclass
class _Plan:
    """Where a node's scales come from: indices into the batch, or a rule for the weight itself."""

    inputs: tuple[int, ...]
    output: int | None = None  # None: the first input's scale times that of the weight
    weight: int | TensorScaling | None = None


@dataclass
class _Request:
    """A per-tensor scale to compute: of a range, or (`factors`) the product of two others."""

    name: str
    part: str
    range: float = 0.0
    factors: tuple[int, int] | None = None


@dataclass
class _Batch:
    """Per-tensor scales of all nodes, by rule."""

    device: Device
    requests: list[_Request] = field(default_factory=list)
    by_method: dict[TensorScaling | None, list[int]] = field(default_factory=dict)

    def add(self, request: _Request, method: TensorScaling | None) -> int:
        """Return the index of the scale that will be computed."""
        self.requests.append(request)
        self.by_method.setdefault(method, []).append(len(self.requests) - 1)
        return len(self.requests) - 1

    def solve(self) -> np.ndarray:
        """Compute all scales, float32, shape (requests,)."""
        values = np.empty(len(self.requests), dtype=np.float32)
        for method, indices in self.by_method.items():
            if method is not None:
                values[indices] = self._scale(method, indices)
        products = self.by_method.get(None, [])
        pairs = np.array([self.requests[index].factors for index in products], dtype=np.int64).reshape(-1, 2)
        values[products] = bf16.multiply(values[pairs[:, 0]], values[pairs[:, 1]])
        return values

    def _scale(self, method: TensorScaling, indices: list[int]) -> np.ndarray:
        requests = [self.requests[index] for index in indices]
        if method.is_fixed:
            return scale_ranges(np.zeros(len(requests)), method, self.device)
        ranges = bf16.round_to_bf16(np.array([request.range for request in requests]))
        bad = np.flatnonzero(~(np.isfinite(ranges) & (ranges >= 0)))
        if bad.size:
            raise _bad_range(requests[bad[0]], bad.size)
        scales = scale_ranges(ranges, method, self.device)
        for position in np.flatnonzero((scales == 0) | ~np.isfinite(scales)):
            request = requests[position]
            if not (ranges[position] == 0 and is_expert_matmul(request.name) and request.part == "inputs[0]"):
                raise _bad_scale(request, float(scales[position]), method)
        return scales


def _plan_node(name: str, node: Node, table: MethodTable, layer_types: Mapping[str, str], batch: _Batch) -> _Plan:
    op = find_op(name, node)
    rules = _find_rules(name, op, table, layer_types)

    def scale(part: str, values: tuple[np.ndarray, ...] | None, index: int) -> int:
        if rules.activation.is_fixed:
            return batch.add(_Request(name, part), rules.activation)
        if values is None or index >= len(values):
            raise RangeError(
                f"node {name!r} has no range {part}",
                where=name,
                why=f"the scales of a {op.value} need it",
                fix="measure again; `gaudi-calib check DIR` lists all gaps",
            )
        return batch.add(_Request(name, part, float(np.max(values[index]))), rules.activation)

    def of_input(index: int) -> int:
        return scale(f"inputs[{index}]", node.inputs, index)

    def of_output(index: int) -> int:
        return scale(f"outputs[{index}]", node.outputs, index)

    def product(inputs: tuple[int, int]) -> int:
        return batch.add(_Request(name, "outputs[0]", factors=inputs), None)

    if op is Op.MATMUL:
        pair = (of_input(0), of_input(1))
        return _Plan(pair, product(pair))
    if op is Op.B2B_MATMUL:
        pair = (of_input(0), of_output(0))
        return _Plan(pair, product(pair))
    if op is Op.KV_CACHE:
        cached = of_input(0)
        return _Plan((cached,), cached)
    if op is Op.SOFTMAX:
        return _Plan((), of_output(0))
    if op is Op.FUSED_SDPA:
        return _Plan((of_input(0), of_input(1), of_input(2), of_output(1)), of_output(0))
    if op is Op.DYNAMIC_MOE:
        inputs = [of_input(index) for index in range(len(node.inputs))]
        experts = [of_output(index) for index in range(1, len(node.outputs or ()))]
        return _Plan((*inputs, *experts), of_output(0))
    return _plan_linear(name, node, op, rules, batch, of_input(0), of_output)


def _plan_linear(
    name: str, node: Node, op: Op, rules: ScaleMethod, batch: _Batch, entry: int, of_output: Callable[[int], int]
) -> _Plan:
    rule = rules.weight
    weight: int | TensorScaling = rule
    if rule.is_fixed:
        weight = batch.add(_Request(name, "weight"), rule)
    elif not rule.is_per_channel and rule.scale_value_type == "MAXABS" and node.weight is not None:
        weight = batch.add(_Request(name, "weight", float(np.max(node.weight))), rule)
    if op is Op.ROW_PARALLEL_LINEAR:
        return _Plan((entry,), of_output(0), weight)
    if rules.activation.is_fixed:
        return _Plan((entry,), batch.add(_Request(name, "outputs[0]"), rules.activation), weight)
    if isinstance(weight, int):
        return _Plan((entry,), batch.add(_Request(name, "outputs[0]", factors=(weight, entry)), None), weight)
    return _Plan((entry,), None, weight)


def _find_rules(name: str, op: Op, table: MethodTable, layer_types: Mapping[str, str]) -> ScaleMethod:
    layer_type = layer_types.get(name) or find_layer_type(name, op)
    if layer_type is None and table.layer_types:
        raise ConfigError(
            f"the module class of node {name!r} is not known",
            where="scale_method.layer_types",
            fix="name the node under 'nodes', or pass its class in layer_types",
        )
    return table.for_node(name, layer_type)


def _fill_plan(name: str, plan: _Plan, values: np.ndarray, weights: WeightReader, device: Device) -> ScaleNode:
    inputs = tuple(float(values[index]) for index in plan.inputs)
    weight = plan.weight
    if weight is None or isinstance(weight, int):
        scale = None if weight is None else float(values[weight])
        assert plan.output is not None
        return ScaleNode(inputs, (float(values[plan.output]),), scale)
    scales, stored = _scale_weight(name, weight, weights, device)
    if plan.output is not None:
        return ScaleNode(inputs, (float(values[plan.output]),), stored)
    product = np.multiply(scales, np.float32(inputs[0]))
    if weight.scale_value_type != "OPT" or weight.is_per_channel:
        product = bf16.round_to_bf16(product)
    return ScaleNode(inputs, (float(product) if product.ndim == 0 else product,), stored)


def _scale_weight(
    name: str, rule: TensorScaling, weights: WeightReader, device: Device
) -> tuple[np.ndarray, float | np.ndarray | PerChannelWeight]:
    """Return the weight's scales and the form they are stored in."""
    weight = _read_weight(name, weights)
    if rule.is_per_channel:
        scales = scale_channels(weight, rule, device)
        stored: float | np.ndarray | PerChannelWeight = PerChannelWeight(
            scales, np.ones(weight.shape[1], dtype=np.float32)
        )
    elif rule.scale_value_type == "OPT":
        chosen = choose_tensor_scale(weight, rule.find_candidates(device), device)
        stored = scales = round_scales(
            np.array([chosen], dtype=np.float32), rule.rounding_method, device, in_bf16=False
        )
    else:
        scales = scale_ranges(np.abs(weight).max(initial=0.0), rule, device)
        stored = float(scales)
    if not np.all(np.isfinite(scales) & (scales > 0)):
        raise _bad_scale(_Request(name, "weight", float(np.abs(weight).max(initial=0.0))), float(np.min(scales)), rule)
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


def _bad_range(request: _Request, count: int) -> RangeError:
    more = f" (and {count - 1} more)" if count > 1 else ""
    return RangeError(
        f"range {request.part} of node {request.name!r} is {request.range}{more}",
        where=request.name,
        why="a range is a finite maximum of absolute values that bfloat16 can hold",
        fix="find the sample that overflows and measure again",
    )


def _bad_scale(request: _Request, scale: float, method: TensorScaling) -> RangeError:
    exact = method.rounding_method in ("POW2", "IDENTITY")
    return RangeError(
        f"the scale of {request.part} of node {request.name!r} is {scale:g}",
        where=request.name,
        why=f"its range is {request.range:g}"
        + ("; dividing by the scale would give inf or NaN when serving" if exact else ""),
        fix="measure with more samples so that the module sees data, block it, or use a hardware-aligned method, "
        "whose smallest scale is not 0",
    )
