"""Several datasets as one: how each is named and weighted, and in which order their prompts come.

    a.jsonl  b.jsonl        every row of both; a sample takes of each in proportion to its rows
    a.jsonl=3  b.jsonl=1    three prompts of the first to one of the second, as many as both can give

What exists as a path is one, whatever it contains.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gaudi_calib.errors import UsageError
from gaudi_calib.files import expand_path

_WEIGHTED = re.compile(r"(.+)=([+-]?[\w.]+)")
_WEIGHT = re.compile(r"\d{1,9}(\.\d{1,9})?")

Item = TypeVar("Item")


@dataclass(frozen=True)
class WeightedDataset:
    """A dataset, and its weight among others; None where its size decides."""

    name: str
    weight: float | None = None

    def __str__(self) -> str:
        return self.name if self.weight is None else f"{self.name}={self.weight:g}"


def parse_datasets(given: str | Sequence[str]) -> list[WeightedDataset]:
    """Return the datasets that -d names, NAME or NAME=WEIGHT each; a single one needs no weight and has none.

    Raises:
        UsageError: none is given, a weight is not a number above 0, or only some have one.

    >>> [str(dataset) for dataset in parse_datasets(["a.jsonl=3", "ORG/NAME:en=0.5"])]
    ['a.jsonl=3', 'ORG/NAME:en=0.5']
    """
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise UsageError("no dataset is given", fix="name one with -d, for example -d builtin")
    parsed = [_parse(text) for text in texts]
    if len(parsed) == 1:
        return [WeightedDataset(parsed[0].name)]
    bare = next((dataset.name for dataset in parsed if dataset.weight is None), None)
    if bare is not None and any(dataset.weight for dataset in parsed):
        fix = f"weight it as well (-d {bare}=1), or give no weight: sizes decide then"
        raise UsageError(f"dataset {bare} has no weight, and others have", fix=fix)
    return parsed


def _parse(text: str) -> WeightedDataset:
    parts = _WEIGHTED.fullmatch(text)
    if parts is None or expand_path(text).exists():
        return WeightedDataset(text)
    name, weight = parts.groups()
    if not (_WEIGHT.fullmatch(weight) and float(weight)):
        raise UsageError(
            f"the weight of dataset {name} is {weight!r}, expected a number above 0",
            where=f"-d {text}",
            why="there is no such path, so what follows = is a weight",
            fix=f"give a weight such as -d {name}=2, or correct the path",
        )
    return WeightedDataset(name, float(weight))


def count_in_proportion(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Return how many items sets of these sizes give in proportion to their weights: one of them gives all.

    >>> count_in_proportion([100, 2], [3, 1])
    8
    """
    rounds = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return sum(int(rounds * weight) for weight in weights)


def take_turns(
    streams: Sequence[Iterator[Item]], weights: Sequence[float], *, keeps_proportion: bool
) -> Iterator[Item]:
    """Yield from each stream in proportion to its weight, which holds for any number of items to within one.

    Args:
        keeps_proportion: stop where a stream ends before its turn; otherwise the others go on.

    >>> "".join(take_turns([iter("AAAA"), iter("bb")], [2, 1], keeps_proportion=True))
    'AbAAbA'
    """
    taken = [0] * len(streams)
    left = list(range(len(streams)))
    while left:
        due = min(left, key=lambda number: (taken[number] + 0.5) / weights[number])
        for item in streams[due]:
            taken[due] += 1
            yield item
            break
        else:
            if keeps_proportion:
                return
            left.remove(due)
