"""How a scale becomes one that the device applies cheaply."""

import numpy as np

from gaudi_calib.config.methods import Rounding
from gaudi_calib.fp8 import Device
from gaudi_calib.scales.precision import BF16, Precision


def round_to_pow2(scales: np.ndarray, precision: Precision = BF16) -> np.ndarray:
    """Round scales up to a power of two; 0 stays 0.

    The logarithm is rounded first, so that a scale just above a power of two becomes
    that power, below it by at most half a bit of the logarithm. That is INC's result.

    Args:
        scales: float32, not negative, any shape.
        precision: what INC computes them in.

    >>> round_to_pow2(np.array([0.3, 64.25, 65.0], dtype=np.float32)).tolist()
    [0.5, 64.0, 128.0]

    Source: INC `ScaleToPow2`, fp8_quant/_core/scale_methods/round_scales_function.py.
    """
    exponents = np.ceil(precision.log2(scales))
    with np.errstate(over="ignore"):
        return precision.round(np.exp2(exponents.astype(np.float64)))


def align_to_hardware(scales: np.ndarray, device: Device, precision: Precision = BF16) -> np.ndarray:
    """Round scales up to the nearest value `device` applies at no cost.

    Args:
        scales: float32, not negative, any shape; 0 becomes the smallest free scale.
        device: the device that will serve, not the one running this code.
        precision: what INC computes them in; float16 cannot hold the smallest free scales of Gaudi 3, 0 stands
            for those.

    Returns:
        float32 of the same shape. Scales above the largest free one become it; what
        they divide saturates.

    Source: INC `ScaleToHwAligned`, fp8_quant/_core/scale_methods/round_scales_function.py.

    >>> from gaudi_calib.fp8 import GAUDI2, GAUDI3
    >>> align_to_hardware(np.array([0.01, 0.9, 3.0], dtype=np.float32), GAUDI2).tolist()
    [0.0625, 1.0, 16.0]
    >>> align_to_hardware(np.array([0.01, 0.9, 3.0], dtype=np.float32), GAUDI3).tolist()
    [0.015625, 1.0, 4.0]
    """
    with np.errstate(divide="ignore"):
        exponents = np.log2(round_to_pow2(scales, precision))
    step = device.exponent_step
    exponents = np.ceil(exponents / step) * step
    lowest, highest = min(device.free_exponents), max(device.free_exponents)
    return precision.round(np.exp2(np.clip(exponents, lowest, highest)))


def round_scales(scales: np.ndarray, rounding: Rounding, device: Device, precision: Precision = BF16) -> np.ndarray:
    """Round float32 `scales` of any shape as `rounding` says; see the functions above."""
    if rounding == "POW2":
        return round_to_pow2(scales, precision)
    if rounding == "HW_ALIGNED":
        return align_to_hardware(scales, device, precision)
    if rounding == "HW_ALIGNED_FIXED":
        return np.full(np.shape(scales), device.free_scales[0], dtype=np.float32)
    if rounding == "SCALE_UNIT":
        return np.ones(np.shape(scales), dtype=np.float32)
    return np.asarray(scales, dtype=np.float32)
