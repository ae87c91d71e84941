"""FP8 as Gaudi computes it: devices, their number ranges and their free scales.

Both devices use E4M3: one sign bit, four exponent bits, three fraction bits, subnormals.
Gaudi 2 reserves the top exponent for infinity and NaN as IEEE does, so its largest value is
240; Gaudi 3 has the `fn` variant, whose only NaN is all ones, with 448. Both round to
nearest, ties to even, and saturate (scales/cast.py in NumPy, engines/fp8_cast.py on tensors).
"""

import math
from dataclasses import dataclass

from gaudi_calib.errors import UsageError

# What is not FP8 ("high precision"): `--dtype` of vLLM, and INC's name of it (`hp_dtype`).
HP_DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}

FRACTION_BITS = 3
EXPONENT_BIAS = 7
_TOP_EXPONENT = 15  # the largest that four bits hold


@dataclass(frozen=True)
class Device:
    """A Gaudi generation that will serve the model.

    Attributes:
        name: short name used in file names, `g2` or `g3`.
        inc_name: INC's name of it.
        fullscale: largest finite FP8 E4M3 value.
        free_exponents: exponents `k` of the scales 2**k the device applies at no
            cost, in the order INC lists them (the first is its single fixed scale).
        exponent_step: free exponents are multiples of this.

    Source: INC `EXP_BIAS_SETS`, `get_fullscale`, fp8_quant/_core/fp_utils.py.
    """

    name: str
    inc_name: str
    fullscale: float
    free_exponents: tuple[int, ...]
    exponent_step: int

    @property
    def free_scales(self) -> tuple[float, ...]:
        """The free scales themselves, in INC's order."""
        return tuple(2.0**k for k in self.free_exponents)

    @property
    def largest_range(self) -> float:
        """Largest magnitude that some free scale brings into the FP8 range.

        >>> GAUDI2.largest_range, GAUDI3.largest_range
        (3840.0, 57344.0)
        """
        return self.fullscale * max(self.free_scales)

    def decode(self, code: int) -> float:
        """Return the value of an FP8 code, 0 to 255; inf or NaN where it stands for no number.

        >>> GAUDI3.decode(0x7E), GAUDI2.decode(0x77), GAUDI2.decode(0xF8), GAUDI3.decode(0x01)
        (448.0, 240.0, -inf, 0.001953125)
        """
        sign = -1.0 if code & 0x80 else 1.0
        exponent, fraction = (code >> FRACTION_BITS) & _TOP_EXPONENT, code & (2**FRACTION_BITS - 1)
        steps = fraction if exponent == 0 else fraction + 2**FRACTION_BITS
        value = math.ldexp(steps, max(exponent, 1) - EXPONENT_BIAS - FRACTION_BITS)
        if value <= self.fullscale:
            return sign * value
        is_infinite = self.fullscale < 2.0 ** (_TOP_EXPONENT - EXPONENT_BIAS) and fraction == 0
        return sign * math.inf if is_infinite else math.nan


GAUDI2 = Device("g2", "GAUDI2", 240.0, (4, 0, -4, -8), 4)
GAUDI3 = Device("g3", "GAUDI3", 448.0, tuple(range(7, -56, -1)), 1)
DEVICES = {device.name: device for device in (GAUDI2, GAUDI3)}


def get_device(name: str) -> Device:
    """Return the device called `name` (`g2`, `g3`, or INC's `GAUDI2`, `GAUDI3`).

    Raises:
        UsageError: no such device.
    """
    for device in DEVICES.values():
        if name.lower() in (device.name, device.inc_name.lower()):
            return device
    raise UsageError(f"unknown device {name!r}", fix="choose g2 (Gaudi 2) or g3 (Gaudi 3)")
