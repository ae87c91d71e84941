"""`OPT` methods: the candidate scale with the least squared error on the weight.

Weights are bfloat16, so there are only 32,768 magnitudes: the error of each under one
scale is computed once and looked up, and a per-tensor error is one dot product with
the weight's histogram. Sums run in float64 and are then rounded as INC's are; INC adds
in float32, whose order depends on the processor, so that an error within some 1e-7 of
the middle between two bfloat16 values may be rounded the other way there.

Source: INC `mmse_scale`, `mmse_scale_multi`, fp8_quant/_core/fp_utils.py.
"""

import math
from functools import lru_cache

import numpy as np

from gaudi_calib.fp8 import Device
from gaudi_calib.scales.cast import cast_to_fp8
from gaudi_calib.scales.precision import BF16

_MAGNITUDES = 1 << 15
_CHUNK = 1 << 20  # weight elements looked up at a time


def quantization_error(x: np.ndarray, scale: float | np.ndarray, device: Device) -> np.ndarray:
    """Return `x - fp8(x / scale) * scale`, each step rounded to bfloat16.

    Args:
        x: float32 holding bfloat16 values, any shape.
        scale: a divisor, or an array that broadcasts against `x`.

    Returns:
        float32 holding bfloat16 values, of the shape of `x`.
    """
    quantized = cast_to_fp8(BF16.divide(x, scale), device)
    return BF16.subtract(x, BF16.multiply(quantized, scale))


def choose_tensor_scale(weight: np.ndarray, candidates: tuple[float, ...], device: Device) -> np.float32:
    """Return the candidate with the least error norm on the whole weight; of equals the last.

    Args:
        weight: float32, any shape; rounded to bfloat16 first.
        candidates: scales in the order they are tried.

    >>> from gaudi_calib.fp8 import GAUDI3
    >>> float(choose_tensor_scale(np.array([[448.0, 0.5]]), (2.0, 1.0, 0.5), GAUDI3))
    1.0
    """
    counts = _count_magnitudes(weight)
    present = np.flatnonzero(counts)
    best, best_norm = np.float32(-1.0), math.inf
    for scale in candidates:
        total = counts[present] @ _squared_errors(float(scale), device)[present].astype(np.float64)
        with np.errstate(over="ignore"):
            norm = float(BF16.round(np.sqrt(np.float32(total))))
        if norm <= best_norm:
            best, best_norm = np.float32(scale), norm
    return best


def choose_channel_scales(
    weight: np.ndarray, reference: np.ndarray, factors: tuple[float, ...], device: Device
) -> np.ndarray:
    """Return, per output channel, `reference` times the factor with the least squared error; of equals the first.

    Args:
        weight: float32, shape (output channels, input channels); rounded to bfloat16 first.
        reference: float32 bfloat16 values, shape (output channels,): the max-abs scales.
        factors: tried in this order.

    Returns:
        float32 bfloat16 values, shape (output channels,).
    """
    best = np.full(len(reference), -1.0, dtype=np.float32)
    best_error = np.full(len(reference), np.inf, dtype=np.float32)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        chunk = slice(start, start + rows)
        magnitudes = _find_magnitudes(weight[chunk])
        for factor in map(np.float32, factors):
            error = _channel_errors(magnitudes, BF16.multiply(reference[chunk], BF16.round(factor)), device)
            better = error < best_error[chunk]
            best[chunk][better] = BF16.round(factor)
            best_error[chunk][better] = error[better]
    return BF16.multiply(best, reference)


def _channel_errors(magnitudes: np.ndarray, scales: np.ndarray, device: Device) -> np.ndarray:
    """Return the summed squared error of each row, (rows,), for one scale per row."""
    totals = np.empty(len(scales), dtype=np.float64)
    for scale in np.unique(scales):
        rows = scales == scale
        totals[rows] = _rounded_squares(float(scale), device)[magnitudes[rows]].sum(axis=1, dtype=np.float64)
    with np.errstate(over="ignore"):
        return BF16.round(totals.astype(np.float32))


def _find_magnitudes(weight: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bit patterns of |weight|, uint16 of the same shape."""
    bits = BF16.round(weight).view(np.uint32) >> np.uint32(16)
    return (bits & np.uint32(_MAGNITUDES - 1)).astype(np.uint16)


def _count_magnitudes(weight: np.ndarray) -> np.ndarray:
    """Return how often each magnitude occurs, float64, shape (32768,)."""
    flat = weight.reshape(-1)
    counts = np.zeros(_MAGNITUDES, dtype=np.int64)
    for start in range(0, flat.size, _CHUNK):
        counts += np.bincount(_find_magnitudes(flat[start : start + _CHUNK]), minlength=_MAGNITUDES)
    return counts.astype(np.float64)


@lru_cache(maxsize=128)
def _squared_errors(scale: float, device: Device) -> np.ndarray:
    """Return the squared error of every magnitude under `scale`, float32, shape (32768,)."""
    values = (np.arange(_MAGNITUDES, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.square(quantization_error(values, scale, device))


@lru_cache(maxsize=128)
def _rounded_squares(scale: float, device: Device) -> np.ndarray:
    """Return `_squared_errors` rounded to bfloat16, as the per-channel methods add them."""
    return BF16.round(_squared_errors(scale, device))
