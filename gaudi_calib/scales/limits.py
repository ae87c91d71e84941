"""Ranges that make bad scales: those of 0, and those that no free scale brings into the FP8 range."""

from collections.abc import Iterable, Iterator

import numpy as np

from gaudi_calib.config.methods import MethodTable, TensorScaling
from gaudi_calib.errors import Finding, name_first
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.layer_types import find_layer_type, is_expert_matmul
from gaudi_calib.ranges.node import Node, RankSet, find_op
from gaudi_calib.ranges.sources import list_experts, list_read
from gaudi_calib.ranges.table import RangeTable, label_part, tabulate_ranges


def find_limits(ranks: Iterable[RankSet[Node]], method: MethodTable, device: Device) -> list[Finding]:
    """Return a finding for ranges of 0 and one for ranges that saturate, each with the nodes that have such.

    Experts that saw no token are left to those who count them; the made-up inputs of expert weights are 0 always.

    Args:
        ranks: of any ranks and worlds, without the nodes that are blocked.
        device: whose free scales apply.
    """
    zero: dict[str, None] = {}
    saturated: dict[str, None] = {}
    for rank_set in ranks:
        table = tabulate_ranges(rank_set.nodes)
        for name, part, number in _list_extremes(table, device):
            rule = _find_rule(table, name, part, method, is_zero=number == 0)
            if rule is None:
                continue
            if number == 0:
                zero[f"{name} {part}"] = None
            elif rule.rounding_method == "HW_ALIGNED":
                saturated[f"{name} {part}"] = None
    findings = []
    if zero:
        findings.append(
            Finding(
                name_first(zero),
                f"ranges of 0: {len(zero)}",
                "the module saw nothing but zeros, or its weight is all zeros; a hardware-aligned scale then destroys "
                "what comes when serving, other methods have none",
                "measure with prompts that reach it, or add it to the blocklist",
                "range-zero",
            )
        )
    if saturated:
        findings.append(
            Finding(
                name_first(saturated),
                f"ranges beyond {device.largest_range:g}, the most that {device.name} scales at no cost: "
                f"{len(saturated)}",
                f"larger values are clipped: the scale stays at {max(device.free_scales):g}, its largest",
                "use maxabs_pow2, whose scales have no limit, or add the module to the blocklist",
                "range-beyond",
            )
        )
    return findings


def _list_extremes(table: RangeTable, device: Device) -> Iterator[tuple[str, str, float]]:
    """Yield node, part and value of every range that is 0 or too large for any free scale."""
    is_too_large = (table.numbers > device.largest_range) & np.isfinite(table.numbers)
    for position in np.flatnonzero((table.numbers == 0) | is_too_large).tolist():
        yield *table.describe_number(position), float(table.numbers[position])


def _find_rule(table: RangeTable, name: str, part: str, method: MethodTable, *, is_zero: bool) -> TensorScaling | None:
    """Return how the scale follows from a range, None where none does, or where 0 is no news."""
    shape = table.inventory.shapes[table.inventory.index[name]]
    op = find_op(name, shape)
    rules = method.for_node(name, find_layer_type(name, op))
    if part == "weight":
        return None if rules.weight.is_fixed else rules.weight
    is_idle = is_zero and part in map(label_part, list_experts(op, shape))
    is_made_up = is_expert_matmul(name) and part == "inputs[0]"
    if part not in list_read(name, shape) or rules.activation.is_fixed or is_idle or is_made_up:
        return None
    return rules.activation
