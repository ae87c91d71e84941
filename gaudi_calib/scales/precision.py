"""The arithmetic that INC computes scales in (`hp_dtype` of QUANT_CONFIG), on float32 arrays.

A value here is a float32 that the number format can represent; an operation runs in float32 and its result
is rounded to the nearest such value, ties to even, which is what torch does on a CPU for one operation. A card
does the same but for one operation: `divide_by_constant`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gaudi_calib.fp8 import HP_DTYPES
from gaudi_calib.ranges.bf16 import round_to_bf16


@dataclass(frozen=True)
class Precision:
    """A number format, and how the processor that INC runs on divides by a constant in it.

    Attributes:
        dtype: name of the format, as torch and vLLM have it.
        round: to its nearest value; takes anything float32 can hold, returns float32 of the same shape. Values
            beyond the largest become inf; NaN stays NaN.
        divides: whether a constant is divided by, as a CPU does, and not its reciprocal multiplied with, as a
            Gaudi does.
    """

    dtype: str
    round: Callable[[ArrayLike], np.ndarray]
    divides: bool = False

    def divide_by_constant(self, x: np.ndarray, divisor: float) -> np.ndarray:
        """Return `x / divisor` for a divisor that is no tensor; a Gaudi rounds its reciprocal first.

        >>> from dataclasses import replace
        >>> x = np.array(1.015625, dtype=np.float32)
        >>> [float(one.divide_by_constant(x, 112.0)) for one in (BF16, replace(BF16, divides=True))]
        [0.009033203125, 0.00909423828125]
        """
        return self.divide(x, divisor) if self.divides else self.multiply(x, self.divide(1, divisor))

    def divide(self, x: ArrayLike, divisor: float | np.ndarray) -> np.ndarray:
        """Return `x / divisor`; a Python float is rounded to float32 only, as torch does."""
        with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
            return self.round(np.asarray(x, dtype=np.float32) / np.asarray(divisor, dtype=np.float32))

    def multiply(self, x: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
        """Return `x * factor`; a Python float is rounded to float32 only, as torch does."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return self.round(np.asarray(x, dtype=np.float32) * np.asarray(factor, dtype=np.float32))

    def subtract(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return `x - y`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.round(np.asarray(x, dtype=np.float32) - np.asarray(y, dtype=np.float32))

    def log2(self, x: np.ndarray) -> np.ndarray:
        """Return the base-2 logarithm; of 0 it is -inf.

        bfloat16 has few fraction bits: the logarithm of a value just above a power of two can round down to that
        power's exponent.

        >>> BF16.log2(np.array([1.0, 1.0078125, 132.0], dtype=np.float32)).tolist()
        [0.0, 0.01123046875, 7.03125]
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.round(np.log2(np.asarray(x, dtype=np.float64)))


def _round_to_fp16(x: ArrayLike) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, dtype=np.float32).astype(np.float16).astype(np.float32)


BF16 = Precision("bfloat16", round_to_bf16)
FP16 = Precision("float16", _round_to_fp16)
FP32 = Precision("float32", lambda x: np.asarray(x, dtype=np.float32))
# By INC's name.
PRECISIONS = {HP_DTYPES[precision.dtype]: precision for precision in (BF16, FP16, FP32)}
