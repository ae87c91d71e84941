"""What scales are that do not follow from their ranges as they should: which other way of computing them gives them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gaudi_calib.config.methods import SCALE_METHODS, MethodTable, ScaleMethod
from gaudi_calib.errors import CalibrationError
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.table import RangeTable, tabulate_scales
from gaudi_calib.runs.recipe import Recipe
from gaudi_calib.scales.compare import Change, compare_tables, flatten_scales
from gaudi_calib.scales.compute import compute_scales

_BACKOFFS = (0.25, 0.5, 1.0)


def explain_scales(
    recipe: Recipe, ranges: Sequence[RankSet[Node]], stored: Sequence[RangeTable], changes: Sequence[Change]
) -> str | None:
    """Return what the scales `stored` are; None where nothing known gives them.

    Args:
        recipe: how they should be computed.
        ranges: of every rank, those of the nodes that have scales.
        changes: how `stored` differs from what `recipe` gives.
    """
    merged = "as they should be computed" if _looks_merged(changes) else None
    for what, table, device in _list_others(recipe):
        for as_on_cpu in (False, True):
            if table is recipe.table and device == recipe.scales_device and not as_on_cpu:
                continue
            name = f"those of {what}{' as INC computes it on a CPU, where a Gaudi rounds otherwise' * as_on_cpu}"
            found = _compare(ranges, stored, table, device, recipe.config.hp_dtype, as_on_cpu=as_on_cpu)
            if not found and found is not None:
                return f"they are {name}"
            merged = merged or (name if _looks_merged(found) else None)
    return merged and (
        f"they look like maxima of the scales of several ranks, {merged}: only scales of outputs, which are products, "
        "differ, and all are smaller; ranges should be merged, and scales computed anew"
    )


def _looks_merged(changes: Sequence[Change] | None) -> bool:
    """Whether scales differ as the largest product of two scales differs from the product of the largest."""
    return bool(changes) and all(change.part == "outputs[0]" and change.most <= 1 for change in changes or ())


def _list_others(recipe: Recipe) -> Iterator[tuple[str, MethodTable, Device]]:
    """Yield the ways of computing scales without weights, the likeliest first, and what each is called."""
    own = recipe.scales_device
    for device in sorted(DEVICES.values(), key=lambda device: device != own):
        yield f"{recipe.tag.lower()} on {device.name}", recipe.table, device
    for method in SCALE_METHODS.values():
        for device in DEVICES.values():
            yield f"{method.name.lower()} on {device.name}", MethodTable(method), device
    default = recipe.table.default
    for weight in _BACKOFFS:
        for activation in _BACKOFFS:
            changed = ScaleMethod(
                default.name, default.weight.with_backoff(weight), default.activation.with_backoff(activation)
            )
            what = f"{recipe.tag.lower()} on {own.name} with backoffs {activation} (activations) and {weight} (weights)"
            yield what, replace(recipe.table, default=changed), own


def _compare(
    ranges: Sequence[RankSet[Node]],
    stored: Sequence[RangeTable],
    table: MethodTable,
    device: Device,
    hp_dtype: str,
    *,
    as_on_cpu: bool,
) -> list[Change] | None:
    """Return how the scales `stored` differ from others of the ranges; None where there are no such others.

    The first rank that differs in what no merge explains tells enough.
    """
    changes: list[Change] = []
    for rank, own in zip(ranges, stored, strict=True) if not table.needs_weights else ():
        try:
            found = compute_scales(
                *(rank, table, device),
                weights=lambda _: None,
                hp_dtype=hp_dtype,
                allows_idle=True,
                as_on_cpu=as_on_cpu,
            )
        except CalibrationError:
            return None
        flat = flatten_scales(tabulate_scales(found.nodes))
        changes += [change for change in compare_tables([flat], [own], read_only=False) if change.differing]
        if changes and not _looks_merged(changes):
            break
    return None if table.needs_weights else changes
