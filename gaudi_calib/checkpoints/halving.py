"""FP8 values for Gaudi 2: half of each, and twice their scale.

E4M3 as torch and other devices know it (float8_e4m3fn) reaches 448. Gaudi 2 has the
same bits up to 240 and keeps the highest exponent for infinity and NaN. Half of 448 is
224, so half values fit, and twice the scale gives the weight back.

Halving is exact but for odd multiples of the smallest value, 2**-9, below 2**-5: 16
of the 254 finite values. They are rounded to even, so that twice the half differs from
the value by 2**-9: 1/229,376 of 448, whatever the value. Relative to the value it is
the whole of 2**-9 (its half is 0), 1/3 of 3 * 2**-9, and at most 1/5 of the others.
"""

import torch

LARGEST_OF_GAUDI2 = 240.0
LARGEST_HALF = 224.0
# What halving and doubling loses, at most.
ROUNDING_STEP = 2.0**-9

_CODES = torch.arange(256, dtype=torch.uint8)
_VALUES = _CODES.view(torch.float8_e4m3fn).to(torch.float64)
_HALVES = (_VALUES * 0.5).to(torch.float8_e4m3fn)
_IS_ROUNDED = (_HALVES.to(torch.float64) * 2 != _VALUES) & ~_VALUES.isnan()
_TABLE = bytes(_HALVES.view(torch.uint8).tolist())


def halve(codes: bytearray) -> bytearray:
    """Return the E4M3 bytes of half of each value, rounded to nearest even; NaN stays NaN.

    >>> list(halve(bytearray([0x7E, 0x38, 0x03, 0x01])))
    [118, 48, 2, 0]
    """
    return codes.translate(_TABLE)


def count_codes(codes: bytearray) -> torch.Tensor:
    """Return how often each of the 256 bytes occurs, int64 (256,)."""
    return torch.bincount(torch.frombuffer(codes, dtype=torch.uint8), minlength=256)


def count_rounded(counts: torch.Tensor) -> int:
    """Return how many values lose their last bit when halved, from `count_codes`."""
    return int(counts[_IS_ROUNDED].sum())


def count_nan(counts: torch.Tensor) -> int:
    """Return how many values are NaN, from `count_codes`."""
    return int(counts[_VALUES.isnan()].sum())


def find_largest(counts: torch.Tensor) -> float:
    """Return the largest absolute value, NaN aside; 0 of nothing. From `count_codes`."""
    return float((_VALUES.abs().nan_to_num(0.0) * (counts > 0)).max())


def is_half(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether every E4M3 byte of `new` is half of that of `old`, but for one rounding, and fits Gaudi 2.

    Every pair of bytes that occurs is looked at; nothing is shared with `halve`.

    Args:
        old, new: uint8, one axis, of equal length.
    """
    pairs = torch.bincount(old.to(torch.int32) * 256 + new, minlength=65536).nonzero()[:, 0]
    before = (pairs // 256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    after = (pairs % 256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    return bool((((2 * after - before).abs() <= ROUNDING_STEP) & (after.abs() <= LARGEST_HALF)).all())


def double_scale(scale: torch.Tensor) -> torch.Tensor | None:
    """Return twice `scale` in its own dtype, or None where that type cannot hold it.

    Args:
        scale: float32, bf16 or float16, or an E8M0 exponent (its own dtype, or uint8).
    """
    if scale.element_size() == 1:
        exponents = scale.view(torch.uint8)
        return (exponents + 1).view(scale.dtype) if bool((exponents < 254).all()) else None
    doubled = scale * 2
    return doubled if bool(doubled.isfinite().all()) else None
