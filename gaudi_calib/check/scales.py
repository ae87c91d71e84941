"""Scales that do not follow from the ranges beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from gaudi_calib.check.explain import explain_scales
from gaudi_calib.check.files import advise_recomputing
from gaudi_calib.check.subject import Subject
from gaudi_calib.errors import CalibrationError, Finding, count, name_first
from gaudi_calib.ranges.layer_types import is_expert_matmul
from gaudi_calib.ranges.node import RankSet, ScaleNode
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges, tabulate_scales
from gaudi_calib.rankfiles.store import read_scales
from gaudi_calib.runs.recipe import Recipe, find_recipe
from gaudi_calib.scales.compare import compare_tables, flatten_scales


def find_bad_scales(subject: Subject) -> Iterator[Finding]:
    """Yield scales that are damaged, 0, of other nodes, or do not follow from the ranges."""
    for world in subject.worlds:
        for tag in subject.place.list_methods(world):
            yield from _check_method(subject, world, tag)


def _check_method(subject: Subject, world: int, tag: str) -> Iterator[Finding]:
    scales: dict[int, RankSet[ScaleNode]] = {}
    for path in dict.fromkeys(path.with_suffix(".json") for path in subject.place.list_scales(world, tag)):
        try:
            found = read_scales(path)
        except CalibrationError as error:
            yield Finding.of(error, "file-damaged")
        else:
            scales[found.rank] = found
    stored = {rank: flatten_scales(tabulate_scales(found.nodes)) for rank, found in scales.items()}
    yield from _find_unusable(world, tag, stored)
    ranges = {rank.rank: rank for rank in subject.ranges[world] if rank.rank in stored}
    lost = {name for rank, own in ranges.items() for name in stored[rank].inventory.names if name not in own.nodes}
    if lost:
        yield Finding(
            name_first(sorted(lost)),
            f"nodes that have {tag} scales and no ranges: {len(lost)}",
            "the scale files are not of these ranges",
            advise_recomputing(subject, world, tag),
            "scales-foreign",
        )
        return
    recipe = _choose_recipe(subject, tag)
    if recipe is not None and ranges:
        scaled = []
        for rank, own in ranges.items():
            named = set(stored[rank].inventory.names)
            table = tabulate_ranges(own.nodes)
            scaled.append(replace(own, nodes=table.select([name in named for name in table.inventory.names])))
        yield from _compare(subject, recipe, scaled, [stored[rank] for rank in ranges])


def _choose_recipe(subject: Subject, tag: str) -> Recipe | None:
    """Return how the scales are computed; None where that takes the weights, or nothing tells."""
    if subject.place.quant_path and subject.config is None:  # an invalid config is told of elsewhere
        return None
    recipe = find_recipe(subject.place, tag, subject.device.name if subject.device else None)
    if isinstance(recipe, str):
        return None
    if subject.config is not None and subject.tag == tag:
        recipe = recipe._replace(config=subject.config)
    return None if recipe.table.needs_weights else recipe


def _find_unusable(world: int, tag: str, stored: Mapping[int, RangeTable]) -> Iterator[Finding]:
    """Yield the scales that nothing can be divided by; the made-up inputs of expert weights have none."""
    found: dict[str, None] = {}
    for rank, table in stored.items():
        is_made_up = np.array([is_expert_matmul(name) for name in table.inventory.names], dtype=bool)
        is_bad = ((table.numbers == 0) | ~np.isfinite(table.numbers)) & ~np.repeat(is_made_up, table.inventory.sizes)
        for place in np.flatnonzero(is_bad).tolist():
            name, part = table.describe_number(place)
            found[f"{name} {part} on rank {rank}"] = None
    if found:
        yield Finding(
            name_first(found),
            f"{tag} scales of {count(world, 'rank')} that are 0, NaN or infinite: {len(found)}",
            "a division by such a scale gives inf or NaN as soon as the module runs",
            "measure with data that reaches these modules; or use maxabs_hw, whose smallest scale is not 0",
            "scales-zero",
        )


def _compare(
    subject: Subject, recipe: Recipe, ranges: Sequence[RankSet], stored: Sequence[RangeTable]
) -> Iterator[Finding]:
    try:
        expected = list(recipe.compute(ranges, allows_idle=True))
    except CalibrationError:  # of ranges that are told of elsewhere
        return
    flat = [flatten_scales(tabulate_scales(rank.nodes)) for rank in expected]
    if all(_is_same(one, other) for one, other in zip(flat, stored, strict=True)):
        return
    changes = [change for change in compare_tables(flat, stored, read_only=False) if change.differing]
    differing, total = sum(change.differing for change in changes), sum(table.inventory.size for table in stored)
    world = ranges[0].world
    if not differing:
        return
    explained = explain_scales(recipe, ranges, stored, changes)
    parts = [
        f"{change.kind} {change.part}: {change.differing} of {change.numbers}, {change.least:.3g} to {change.most:.3g} "
        "times what follows"
        for change in changes
    ]
    yield Finding(
        name_first(parts),
        f"{recipe.tag} scales of {count(world, 'rank')} that do not follow from the ranges: {differing} of {total}",
        explained or "no published method, device or arithmetic gives them: they are of other ranges, or were edited",
        advise_recomputing(subject, world, recipe.tag),
        "scales-otherwise" if explained else "scales-differ",
    )


def _is_same(left: RangeTable, right: RangeTable) -> bool:
    return left.inventory.names == right.inventory.names and np.array_equal(left.numbers, right.numbers)
