"""How the maximum of one tensor came about: which samples raised it, and how large it is in most of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gaudi_calib.ranges.bf16 import round_to_bf16


@dataclass(frozen=True)
class Progress:
    """How the maximum of one tensor came about; all values are those of bf16.

    Attributes:
        moves: the samples that raised it, and what they raised it to, in order; never empty.
        median: of the maxima of the samples, those that did not reach the tensor left out.
    """

    moves: tuple[tuple[int, float], ...]
    median: float

    @property
    def largest(self) -> float:
        """The maximum over all samples."""
        return self.moves[-1][1]

    @property
    def set_by(self) -> int:
        """The first sample that has it: the maximum last moved after `set_by + 1` samples."""
        return self.moves[-1][0]

    def after(self, samples: int) -> float:
        """The maximum over the first `samples`; 0 where none of them reached the tensor.

        >>> [Progress(((0, 1.5), (7, 4.0)), 1.0).after(count) for count in (0, 1, 7, 8)]
        [0.0, 1.5, 1.5, 4.0]
        """
        return max((value for sample, value in self.moves if sample < samples), default=0.0)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Progress":
        """Return the same of what `change`, which does not decrease, makes of the values."""
        samples, values = zip(*self.moves, strict=True)
        *changed, median = change(np.array([*values, self.median], dtype=np.float32)).tolist()
        return Progress(tuple(zip(samples, changed, strict=True)), median)


def follow_maximum(maxima: np.ndarray) -> Progress | None:
    """Return how the largest of the samples' maxima came about, None where no sample has one.

    Args:
        maxima: float32, shape (samples,), in order; negative where a sample did not reach the tensor.

    >>> follow_maximum(np.array([1, 3, -1, 2, 3, 8], dtype=np.float32))
    Progress(moves=((0, 1.0), (1, 3.0), (5, 8.0)), median=3.0)
    """
    rounded = round_to_bf16(maxima)
    reached = rounded[rounded >= 0]
    if not reached.size:
        return None
    running = np.maximum.accumulate(rounded)
    moved = np.flatnonzero(np.diff(running, prepend=np.float32(-1)) > 0)
    moves = tuple(zip(moved.tolist(), running[moved].tolist(), strict=True))
    return Progress(moves, float(np.median(reached)))
