"""The largest magnitude that a tensor has had, on whatever device it lives."""

import numpy as np
import torch

from gaudi_calib.ranges.bf16 import round_to_bf16


class Peak:
    """Largest magnitude of the tensors seen, kept where they are, so that nothing waits for a GPU."""

    def __init__(self) -> None:
        self._value: torch.Tensor | None = None

    @property
    def is_seen(self) -> bool:
        return self._value is not None

    def observe(self, x: torch.Tensor) -> None:
        """Take in a tensor of any shape; NaN stays."""
        if x.numel() == 0:
            return
        lowest, highest = torch.aminmax(x.detach())
        value = torch.maximum(highest, -lowest).float()
        self._value = value if self._value is None else torch.maximum(self._value, value)

    def reset(self) -> None:
        """Forget everything."""
        self._value = None

    def to_range(self) -> np.ndarray:
        """Return it as a range: float32 of shape (1,), a bf16 value; 0 where nothing was seen."""
        value = 0.0 if self._value is None else float(self._value)
        return round_to_bf16(np.array([value], dtype=np.float32))
