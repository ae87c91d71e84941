"""Ranks and layers whose ranges are unlike those of the others.

Compared is the median, over all ranges of a rank or of a layer, of the ratio to what is usual for a range of that kind.
Between ranks that measured the same data it is 1.00 in every published set; between layers it is 0.16 to 2.1.
"""

import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from gaudi_calib.check.subject import Subject
from gaudi_calib.errors import Finding, count, name_first
from gaudi_calib.ranges.experts import LISTS
from gaudi_calib.ranges.node import Op, find_op
from gaudi_calib.ranges.sources import label_part, list_read
from gaudi_calib.ranges.table import Inventory, tabulate_ranges

_LAYER = re.compile(r"\.(\d+)\.")
# How many times more, or less, than usual stands out.
_RANK_LIMIT, _LAYER_LIMIT = 1.5, 8.0
_FEWEST_RANKS, _FEWEST_LAYERS = 3, 4


def find_outliers(subject: Subject) -> Iterator[Finding]:
    """Yield the ranks and the layers that stand out."""
    for world, ranks in subject.ranges.items():
        tables = [tabulate_ranges(rank.nodes) for rank in ranks]
        alike = [table for table in tables if table.inventory.equals(tables[0].inventory)]
        if not tables or len(alike) < len(tables):
            continue
        places, kinds, layers = _list_activations(tables[0].inventory)
        found = np.array([table.numbers[places] for table in tables], dtype=np.float64)
        usable = (np.isfinite(found) & (found > 0)).all(axis=0)
        found, kinds, layers = found[:, usable], kinds[usable], layers[usable]
        if found.shape[1] == 0:
            continue
        odd = _find_odd_ranks(found) if len(ranks) >= _FEWEST_RANKS else {}
        yield from _describe("rank", {f"rank {ranks[row].rank} of {world}": ratio for row, ratio in odd.items()})
        odd = _find_odd_layers(found.max(axis=0), kinds, layers)
        yield from _describe(
            "layer", {f"layer {layer} on {count(world, 'rank')}": ratio for layer, ratio in odd.items()}
        )


def _list_activations(inventory: Inventory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the ranges of activations are, of what kind, and in which layer, all int64 of shape (ranges,).

    Maxima of experts are left out: ranks have different ones.
    """
    rows: list[tuple[int, int, int]] = []
    numbers: dict[tuple[str, str], int] = {}
    for name, shape, start in zip(inventory.names, inventory.shapes, inventory.starts.tolist(), strict=True):
        layer = _LAYER.search(name)
        if layer is None or any(f".{part}." in name for part in LISTS):
            continue
        read, kind = list_read(name, shape), name[layer.end() :]
        is_fused = find_op(name, shape) is Op.DYNAMIC_MOE
        parts = [("inputs", index) for index in range(len(shape.inputs))]
        parts += [("outputs", index) for index in range(min(len(shape.outputs or ()), 1 if is_fused else 2))]
        for offset, part in zip(np.cumsum([0, *shape.channels[:-1]]).tolist(), parts, strict=False):
            if (label := label_part(part)) in read:
                number = numbers.setdefault((kind, label), len(numbers))
                rows.append((start + offset, number, int(layer[1])))
    places, kinds, layers = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return places, kinds, layers


def _find_odd_ranks(found: np.ndarray) -> dict[int, float]:
    ratios = np.median(found / np.median(found, axis=0), axis=1).tolist()
    return {row: ratio for row, ratio in enumerate(ratios) if not 1 / _RANK_LIMIT <= ratio <= _RANK_LIMIT}


def _find_odd_layers(largest: np.ndarray, kinds: np.ndarray, layers: np.ndarray) -> dict[int, float]:
    ratios: dict[int, list[float]] = defaultdict(list)
    for kind in np.unique(kinds):
        own = kinds == kind
        if own.sum() >= _FEWEST_LAYERS:
            usual = np.median(largest[own])
            for layer, value in zip(layers[own].tolist(), largest[own].tolist(), strict=True):
                ratios[layer].append(value / usual)
    medians = {layer: float(np.median(values)) for layer, values in ratios.items()}
    return {layer: ratio for layer, ratio in medians.items() if not 1 / _LAYER_LIMIT <= ratio <= _LAYER_LIMIT}


def _describe(what: str, odd: dict[str, float]) -> Iterator[Finding]:
    if odd:
        yield Finding(
            name_first(f"{name} ({ratio:.3g} times)" for name, ratio in odd.items()),
            f"{what}s whose ranges are unlike those of the others: {len(odd)}",
            f"the median of the ranges of a {what}, against those of the other {what}s, is usually near 1",
            f"see whether the {what} is from another run, or was merged with one; measure again",
            f"{what}-outlier",
        )
