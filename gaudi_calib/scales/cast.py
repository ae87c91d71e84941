"""The FP8 E4M3 cast of both devices, in NumPy.

Both round to nearest even and saturate. They differ only in the largest value: 240 on Gaudi 2,
448 on Gaudi 3 (fp8.py). The reference for the cast on tensors (engines/fp8_cast.py).
"""

import numpy as np

from gaudi_calib.fp8 import EXPONENT_BIAS, FRACTION_BITS, Device

_SMALLEST_EXPONENT = 1 - EXPONENT_BIAS  # smaller values are subnormal: evenly spaced


def cast_to_fp8(x: np.ndarray, device: Device) -> np.ndarray:
    """Round to the nearest FP8 value of `device`.

    Args:
        x: float32, any shape.
        device: the device that will serve.

    Returns:
        float32 of the same shape, every value on the device's FP8 grid. Values beyond
        the largest FP8 value (inf too) become it; NaN stays NaN; signs of zero are kept.

    >>> from gaudi_calib.fp8 import GAUDI2, GAUDI3
    >>> cast_to_fp8(np.array([0.3, 17.0, 1e6, 0.0009], dtype=np.float32), GAUDI2).tolist()
    [0.3125, 16.0, 240.0, 0.0]
    >>> cast_to_fp8(np.array([1e6]), GAUDI3).tolist()
    [448.0]
    """
    limit = np.float32(device.fullscale)
    clipped = np.clip(np.asarray(x, dtype=np.float32), -limit, limit)
    _, exponent = np.frexp(clipped)  # clipped = m * 2**exponent with 0.5 <= |m| < 1
    step = np.ldexp(np.float32(1.0), np.maximum(exponent - 1, _SMALLEST_EXPONENT) - FRACTION_BITS)
    return np.rint(clipped / step) * step
