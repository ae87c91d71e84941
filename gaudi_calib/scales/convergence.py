"""Ranges that the data has not settled: those that still grew at its end, and those that one sample sets alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gaudi_calib.config.methods import TensorScaling
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.errors import Finding, name_first
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.convergence import Convergence
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import classify
from gaudi_calib.ranges.progress import Progress
from gaudi_calib.scales.precision import PRECISIONS, Precision
from gaudi_calib.scales.tensor import scale_ranges

# A range still grows where the last quarter of the samples at least doubles its scale.
_PARTS = 4
# A larger share of growing ranges tells of too little data. SmolLM2-135M has 13 % after 4 samples, then at most 2 %.
_MOST_GROWING = 0.1
# A sample stands out where its maximum is so many times the median one: a step of Gaudi 2's scales, four of the about
# 15 powers of two that FP8 spans. The most in SmolLM2-135M is 4.
_OUTLIER_FACTOR = 16


@dataclass(frozen=True)
class _Range:
    """One range that a scale comes from.

    Attributes:
        label: node and part, as messages call them.
        rule: how the scale follows.
    """

    label: str
    progress: Progress
    rule: TensorScaling


def find_unsettled(convergence: Convergence, config: QuantConfig, device: Device) -> list[Finding]:
    """Return a finding where too many scales still grew when the data ended, and one for samples that stand out.

    Args:
        config: the QUANTIZE config: its lists say which nodes count, its methods how scales follow.
        device: whose FP8 range and free scales apply.
    """
    ranges = list(_list_ranges(convergence, config)) if config.uses_stats_files else []
    last = math.ceil(convergence.samples / _PARTS)
    before, precision = convergence.samples - last, PRECISIONS[config.hp_dtype]
    growing = _find_growing(ranges, before, device, precision)
    findings = []
    if len(growing) > _MOST_GROWING * len(ranges):
        findings.append(_describe_growing(growing, len(ranges), last, convergence.samples))
    outliers = [item for item in ranges if item.progress.largest > _OUTLIER_FACTOR * item.progress.median > 0]
    if outliers:
        findings.append(_describe_outliers(outliers, convergence))
    return findings


def _list_ranges(convergence: Convergence, config: QuantConfig) -> Iterator[_Range]:
    for name, parts in convergence.nodes.items():
        op = classify(name.rpartition(".")[2], 2 if "outputs[0]" in parts else None, has_weight=True)
        layer_type = find_layer_type(name, op)
        rule = config.method_table.for_node(name, layer_type).activation
        if not (rule.is_fixed or config.is_blocked(name, layer_type)):
            yield from (_Range(f"{name} {part}", progress, rule) for part, progress in parts.items())


def _find_growing(ranges: Sequence[_Range], before: int, device: Device, precision: Precision) -> list[_Range]:
    """Return the ranges whose scales at least double after the first `before` samples."""
    growing = []
    for rule in dict.fromkeys(item.rule for item in ranges):
        alike = [item for item in ranges if item.rule == rule]
        ends = np.array([(item.progress.after(before), item.progress.largest) for item in alike], dtype=np.float32)
        earlier, last = scale_ranges(ends, rule, device, precision).T
        growing += [alike[row] for row in np.flatnonzero((last >= 2 * earlier) & (last > 0))]
    return growing


def _describe_growing(growing: Sequence[_Range], total: int, last: int, samples: int) -> Finding:
    return Finding(
        name_first(item.label for item in growing),
        f"too little data: the last {last} of {samples} samples doubled {len(growing)} of {total} scales, or more",
        f"{last} more would double about as many again; values far beyond a range are clipped when serving",
        f"measure with more samples, for example -l {_PARTS * samples}, of a larger dataset (-d) if need be",
        "data-unsettled",
    )


def _describe_outliers(outliers: Sequence[_Range], convergence: Convergence) -> Finding:
    def describe(item: _Range) -> str:
        progress = item.progress
        sample = convergence.describe_sample(progress.set_by)
        return f"{item.label}: {progress.largest:g} in {sample}, median {progress.median:g}"

    ordered = sorted(outliers, key=lambda item: item.progress.median / item.progress.largest)
    return Finding(
        name_first(map(describe, ordered), separator="; "),
        f"samples that stand out set {len(outliers)} ranges: they have more than {_OUTLIER_FACTOR} times what the "
        "median sample has",
        f"scales that fit them leave all others less than 1/{_OUTLIER_FACTOR} of what FP8 holds",
        "look at these prompts: if serving will see nothing like them, leave them out and measure again",
        "sample-outlier",
    )
