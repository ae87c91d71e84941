"""bfloat16 arithmetic on float32 arrays, bit for bit as torch computes it on a CPU.

NumPy has no bfloat16. A value here is a float32 that bfloat16 can represent; an
operation runs in float32 and its result is rounded to the nearest bfloat16, ties to
even, which is what torch does for one operation on bfloat16 tensors.
"""

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


def divide(x: np.ndarray, divisor: float | np.ndarray) -> np.ndarray:
    """Return `x / divisor` rounded to bfloat16; a Python float is rounded to float32 only, as torch does."""
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        return round_to_bf16(np.asarray(x, dtype=np.float32) / np.asarray(divisor, dtype=np.float32))


def multiply(x: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Return `x * factor` rounded to bfloat16; a Python float is rounded to float32 only, as torch does."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return round_to_bf16(np.asarray(x, dtype=np.float32) * np.asarray(factor, dtype=np.float32))


def subtract(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return `x - y` rounded to bfloat16."""
    with np.errstate(over="ignore", invalid="ignore"):
        return round_to_bf16(np.asarray(x, dtype=np.float32) - np.asarray(y, dtype=np.float32))


def log2(x: np.ndarray) -> np.ndarray:
    """Return the base-2 logarithm rounded to bfloat16; of 0 it is -inf.

    Seven fraction bits are few: the logarithm of a value just above a power of two
    can round down to that power's exponent.

    >>> log2(np.array([1.0, 1.0078125, 132.0], dtype=np.float32)).tolist()
    [0.0, 0.01123046875, 7.03125]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return round_to_bf16(np.log2(np.asarray(x, dtype=np.float64)))
