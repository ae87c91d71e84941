"""Two calibrations, number by number."""

import math

import numpy as np
import pytest

from gaudi_calib.fp8 import GAUDI3
from gaudi_calib.ranges.node import Node, PerChannelWeight, RankSet, ScaleNode
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges, tabulate_scales
from gaudi_calib.scales.compare import Change, compare_tables, find_clipped, flatten_scales, list_unpaired
from gaudi_calib.scales.compute import compute_scales

ATTENTION = "model.layers.0.self_attn.attn.impl."


def table(**nodes: tuple[list[float], list[float] | None, float | None]) -> RangeTable:
    """Ranges by node name, `__` for a dot: inputs, outputs, weight."""

    def arrays(values: list[float]) -> tuple[np.ndarray, ...]:
        return tuple(np.array([value], dtype=np.float32) for value in values)

    return tabulate_ranges(
        {
            name.replace("__", "."): Node(
                arrays(inputs),
                None if outputs is None else arrays(outputs),
                None if weight is None else arrays([weight])[0],
            )
            for name, (inputs, outputs, weight) in nodes.items()
        }
    )


def find(changes: list[Change], kind: str, part: str) -> Change:
    return next(change for change in changes if (change.kind, change.part) == (kind, part))


def test_ratios_of_a_kind_are_gathered_over_layers_and_ranks():
    """Two layers on two ranks make four numbers; the median of 1, 2, 2 and 4 is 2."""
    left = [table(layers__0__qkv_proj=([1.0], None, 1.0), layers__1__qkv_proj=([2.0], None, 1.0))] * 2
    right = [
        table(layers__0__qkv_proj=([1.0], None, 1.0), layers__1__qkv_proj=([4.0], None, 1.0)),
        table(layers__0__qkv_proj=([2.0], None, 1.0), layers__1__qkv_proj=([8.0], None, 1.0)),
    ]
    change = find(compare_tables(left, right, read_only=True), "qkv_proj", "inputs[0]")
    assert (change.numbers, change.differing, change.least, change.median, change.most) == (4, 3, 1.0, 2.0, 4.0)


def test_zeros_are_counted_and_have_no_ratio():
    """A module that saw data on one side only is counted; what is 0 on both sides does not differ."""
    left = [table(a__qkv_proj=([0.0], None, 0.0), b__qkv_proj=([3.0], None, 0.0))]
    right = [table(a__qkv_proj=([5.0], None, 0.0), b__qkv_proj=([0.0], None, 0.0))]
    inputs, weight = compare_tables(left, right, read_only=True)
    assert (inputs.differing, inputs.lost, inputs.found, math.isnan(inputs.median)) == (2, 1, 1, True)
    assert weight.differing == 0


def test_ranges_that_no_scale_comes_from_are_left_out():
    """The second output of a row-parallel layer may hold anything."""
    left, right = [table(o_proj=([1.0], [2.0, 3.0], 1.0))], [table(o_proj=([1.0], [2.0, math.nan], 1.0))]
    assert [change.part for change in compare_tables(left, right, read_only=True)] == [
        "inputs[0]", "outputs[0]", "weight",
    ]  # fmt: skip


def test_experts_are_one_part_and_nodes_go_by_their_ageless_names():
    """`routed_experts.moe_op` of new vLLM is `moe_op` of old."""
    left = [table(mlp__experts__moe_op=([1.0], [1.0, 2.0, 4.0], None))]
    right = [table(mlp__experts__routed_experts__moe_op=([1.0], [1.0, 2.0, 2.0], None))]
    assert list_unpaired(left[0].inventory, right[0].inventory) == ((), ())
    experts = find(compare_tables(left, right, read_only=True), "moe_op", "outputs[1:]")
    assert (experts.numbers, experts.differing, experts.least) == (2, 1, 0.5)


def test_scales_of_experts_are_one_part():
    """As their ranges are: 256 experts are one line."""
    scales = [
        flatten_scales(tabulate_scales({"mlp.experts.moe_op": ScaleNode((1.0, 1.0, last), (1.0,))}))
        for last in (1.0, 2.0)
    ]
    changes = compare_tables(scales[:1], scales[1:], read_only=False)
    assert [change.part for change in changes] == ["inputs[0]", "inputs[1:]", "outputs[0]"]
    assert find(changes, "moe_op", "inputs[1:]").numbers == 2


def test_an_output_that_one_side_measured_is_passed_over():
    """`measure_exclude: NONE` against the default: inputs and weights are compared."""
    left, right = [table(qkv_proj=([1.0], [7.0], 1.0))], [table(qkv_proj=([1.0], None, 1.0))]
    assert all(change.differing == 0 for change in compare_tables(left, right, read_only=True))
    assert len(compare_tables(left, right, read_only=True)) == 2


def test_scales_per_channel_are_compared_channel_by_channel():
    """One of three channels differs."""

    def scales(last: float) -> RangeTable:
        weight = PerChannelWeight(np.array([1, 2, last], dtype=np.float32), np.ones(5, dtype=np.float32))
        outputs = (np.array([1, 1, 1], dtype=np.float32),)
        return flatten_scales(tabulate_scales({"qkv_proj": ScaleNode((1.0,), outputs, weight)}))

    changes = compare_tables([scales(4.0)], [scales(2.0)], read_only=False)
    weight = find(changes, "qkv_proj", "weight")
    assert (weight.numbers, weight.differing, weight.least) == (3, 1, 0.5)


@pytest.mark.parametrize("factor", [1.0, 3.9, 4.5])
def test_what_scales_clip_is_what_exceeds_fullscale(factor: float):
    """MAXABS_ARBITRARY leaves room for about four times the range it was computed from."""
    nodes = {
        f"{ATTENTION}matmul_qk": Node((np.array([2.0], np.float32), np.array([1.0], np.float32))),
        f"{ATTENTION}softmax": Node((np.array([math.inf], np.float32),), (np.array([1.0], np.float32),)),
    }
    scales = compute_scales(RankSet(0, 1, nodes), "MAXABS_ARBITRARY", GAUDI3, weights=lambda _: None)
    seen = {**nodes, f"{ATTENTION}matmul_qk": Node((np.array([2.0 * factor], np.float32), np.array([1.0], np.float32)))}
    clipped = find_clipped([tabulate_ranges(seen)], [flatten_scales(tabulate_scales(scales.nodes))], GAUDI3)
    assert [(clip.part, clip.range) for clip in clipped] == ([("inputs[0]", 9.0)] if factor > 4 else [])
