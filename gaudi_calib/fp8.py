"""FP8 as Gaudi computes it: devices, their number ranges and their free scales.

Both devices use E4M3. Gaudi 2 reserves the top exponent as IEEE does, so its
largest value is 240; Gaudi 3 has the `fn` variant with 448.
"""

from dataclasses import dataclass

from gaudi_calib.errors import UsageError


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
