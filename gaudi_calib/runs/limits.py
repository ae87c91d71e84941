"""What a run says about ranges that make bad scales."""

from collections.abc import Iterable

from gaudi_calib.errors import Finding
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.runs.recipe import Recipe
from gaudi_calib.runs.run import Run
from gaudi_calib.scales.limits import find_limits


def warn_of_limits(run: Run) -> None:
    """Warn of ranges that are 0, and of those that saturate; each once, whatever the number of ranks and devices."""
    told: dict[str, None] = {}
    for target in run.targets:
        ranks = [rank_set for ranks in target.ranges.values() for rank_set in ranks]
        told |= dict.fromkeys(describe_limits(target.recipe.select(ranks), target.recipe))
    for text in told:
        run.warn(text)


def describe_limits(ranks: Iterable[RankSet[Node]], recipe: Recipe) -> list[str]:
    """Return what is to be said of ranges that make bad scales; see `find_limits`."""
    return list(map(describe_finding, find_limits(ranks, recipe.table, recipe.scales_device)))


def describe_finding(found: Finding) -> str:
    """Return a finding that says why and what to do as one line."""
    fix = str(found.fix)
    return f"{found.what} ({found.where}): {found.why}. {fix[0].upper()}{fix[1:]}"
