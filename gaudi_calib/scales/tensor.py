"""The scales of one tensor: from its range, or per channel from its values."""

import numpy as np

from gaudi_calib.config.methods import TensorScaling
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.bf16 import TINY
from gaudi_calib.scales.optimal import choose_channel_scales
from gaudi_calib.scales.precision import BF16, Precision
from gaudi_calib.scales.rounding import round_scales


def scale_ranges(ranges: np.ndarray, method: TensorScaling, device: Device, precision: Precision = BF16) -> np.ndarray:
    """Return the scale of each range under a `MAXABS` or `FIXED_VALUE` rule.

    Args:
        ranges: float32, any shape, rounded to `precision` first. A range of 0 gives the
            smallest free scale with `HW_ALIGNED`, 0 with the other roundings of `MAXABS`.

    Returns:
        float32 holding values of `precision`, same shape.

    >>> from gaudi_calib.fp8 import GAUDI2
    >>> from gaudi_calib.config.methods import get_scale_method
    >>> scale_ranges(np.array([1.0, 30.0, 0.0]), get_scale_method("maxabs_hw").activation, GAUDI2).tolist()
    [0.0625, 1.0, 0.00390625]
    """
    scales = precision.divide_by_constant(precision.round(ranges), device.fullscale * method.backoff)
    return round_scales(scales, method.rounding_method, device, precision)


def scale_channels(
    weight: np.ndarray, method: TensorScaling, device: Device, precision: Precision = BF16
) -> np.ndarray:
    """Return one scale per output channel.

    Args:
        weight: float32, shape (out, in); rounded to `precision` first. A channel of zeros gets
            the smallest normal bfloat16, 2**-126, which is 0 in float16.

    Returns:
        float32 holding values of `precision`, shape (out,).
    """
    largest = precision.round(np.abs(weight).max(axis=1, initial=0.0))
    scales = np.maximum(precision.divide_by_constant(largest, device.fullscale * method.backoff), precision.round(TINY))
    scales = round_scales(scales, method.rounding_method, device, precision)
    if method.scale_value_type == "MAXABS":
        return scales
    scales = choose_channel_scales(weight, scales, method.find_candidates(device), device)
    return round_scales(scales, method.rounding_method, device)
