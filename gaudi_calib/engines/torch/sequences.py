"""The sequences of the batch that runs now, and the largest magnitudes of a tensor in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from gaudi_calib.engines.observe.peak import max_magnitude, max_per_head


@dataclass
class Sequences:
    """Sequences that run together, one behind the other; whoever runs them says which.

    Attributes:
        bounds: start of every sequence, and the end of the last.
    """

    bounds: Sequence[int] = ()

    def max_magnitudes(self, x: torch.Tensor, *, by_channel: bool = False) -> torch.Tensor:
        """Return the largest magnitudes of (tokens, channels) in each, shape (sequences, channels or 1)."""
        parts = [x[start:stop] for start, stop in pairwise(self.bounds)]
        if by_channel:
            return torch.stack([max_magnitude(part, 0) for part in parts])
        return torch.stack([max_magnitude(part) for part in parts]).unsqueeze(1)

    def max_per_head(self, x: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitudes of (heads, tokens, dim) in each, shape (sequences, heads)."""
        return torch.stack([max_per_head(x[:, start:stop]) for start, stop in pairwise(self.bounds)])

    def find_owners(self) -> torch.Tensor:
        """Return the number of its sequence for every token, int64, shape (tokens,)."""
        lengths = torch.tensor([stop - start for start, stop in pairwise(self.bounds)])
        return torch.arange(len(lengths)).repeat_interleave(lengths)
