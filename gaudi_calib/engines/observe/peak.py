"""The largest magnitude of a tensor, for both engines: how it is taken, and how it is kept."""

import numpy as np
import torch

from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.progress import Progress, follow_maximum


def max_magnitude(x: torch.Tensor, dims: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the largest magnitudes over `dims`, or that of the whole tensor, in its dtype; NaN stays.

    No copy of all magnitudes is made in float32, and only one of the bits in bfloat16.

    >>> max_magnitude(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 0).tolist()
    [2.0, 3.0]
    """
    if dims is None:
        lowest, highest = torch.aminmax(x)
        return torch.maximum(highest, -lowest)
    if x.dtype is torch.bfloat16:
        # Without its sign bit, a bfloat16 is ordered as the integer of the same bits (NaN above all).
        return (x.view(torch.int16) & 0x7FFF).amax(dims).view(torch.bfloat16)
    return torch.maximum(x.amax(dims), -x.amin(dims))  # `aminmax` over a dimension takes several times longer


def max_per_head(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude per head of (heads, tokens, dim), whichever way it lies in memory."""
    if x.stride(0) > x.stride(1):
        return max_magnitude(x, (1, 2))
    by_channel = max_magnitude(x.transpose(0, 1).flatten(1), 0)
    return by_channel.unflatten(0, (x.shape[0], -1)).amax(1)


class Peak:
    """Largest magnitudes of the tensors seen, kept on their device, so that nothing waits for it.

    Attributes:
        values: float32, as many as each tensor gives; None before the first.
        samples: float32, the largest of each sample in their order, a batch of them at a time, where they are
            taken one by one.
    """

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None
        self.samples: list[torch.Tensor] = []

    @property
    def is_seen(self) -> bool:
        return self.values is not None

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no infinity was seen."""
        return self.values is None or bool(torch.isfinite(self.values).all())

    def observe(self, x: torch.Tensor, dims: int | tuple[int, ...] | None = None) -> None:
        """Take in the magnitudes of a tensor, over all of it or over `dims`; an empty one has none."""
        if x.numel():
            self.take(max_magnitude(x.detach(), dims))

    def take(self, values: torch.Tensor) -> None:
        """Take in magnitudes, always of the same shape; NaN stays."""
        values = values.float()
        self.values = values if self.values is None else torch.maximum(self.values, values)

    def take_samples(self, values: torch.Tensor) -> None:
        """Take in magnitudes of the samples that follow those before, shape (samples, magnitudes of each)."""
        self.take(values.amax(0))
        self.samples.append(values.amax(1).float())

    def reset(self) -> None:
        """Forget everything."""
        self.values = None
        self.samples.clear()

    def to_array(self) -> np.ndarray:
        """Return the magnitudes as float32, shape (channels,) or (1,); 0 where nothing was seen."""
        return np.zeros(1, dtype=np.float32) if self.values is None else np.atleast_1d(self.values.cpu().numpy())

    def to_progress(self) -> Progress | None:
        """Return how the largest came about, None where samples were not taken one by one."""
        return follow_maximum(torch.cat(self.samples).cpu().numpy()) if self.samples else None

    def to_range(self) -> np.ndarray:
        """Return the magnitudes as a rank's file has them, rounded to bf16 values."""
        return round_to_bf16(self.to_array())
