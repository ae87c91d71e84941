"""bfloat16 values in float32 arrays: NumPy has no bfloat16."""

import numpy as np
from numpy.typing import ArrayLike

TINY = 2.0**-126  # smallest normal bfloat16


def round_to_bf16(x: ArrayLike) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even.

    Args:
        x: float32 (anything else is converted to it first), any shape.

    Returns:
        float32 of the same shape. Values beyond the largest bfloat16 become inf; NaN stays NaN.

    >>> round_to_bf16(np.array([1.0, 1.001, 1.005], dtype=np.float32)).tolist()
    [1.0, 1.0, 1.0078125]
    """
    values = np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded &= np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))
