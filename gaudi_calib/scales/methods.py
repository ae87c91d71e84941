"""Scale methods: how the scale of a tensor follows from its range or its values.

A *published* method is a name that QUANT_CONFIG's `scale_method` accepts; it pairs one
rule for weights with one for activations. The dict form (`method_table.py`) mixes them
per node, layer or module class.

    method                                         weight          activation
    UNIT_SCALE                                     1               1
    HW_ALIGNED_SINGLE_SCALE                        one free scale  the same
    MAXABS_HW                                      free            free
    MAXABS_POW2                                    2**k            2**k
    MAXABS_ARBITRARY                               exact           exact
    MAXABS_HW_OPT_WEIGHT                           best free       free
    MAXABS_POW2_OPT_WEIGHT                         best 2**k       2**k
    ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2          2**k / channel  free
    ACT_MAXABS_HW_WEIGHTS_PCS_OPT_POW2             best / channel  free
    ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2        2**k / channel  2**k
    ACT_MAXABS_POW2_WEIGHTS_PCS_OPT_POW2           best / channel  2**k
    ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW  free            2**k / channel, dynamic only
    MAXABS_PCS_POW2                                2**k / channel  2**k / channel, dynamic only

Source: INC `scale_method_config_mapping`, fp8_quant/_core/scale_methods/scale_method_config.py.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from gaudi_calib.errors import ConfigError
from gaudi_calib.fp8 import Device


class Granularity(Enum):
    """What one scale covers."""

    PTS = "pts"  # the whole tensor
    PCS = "pcs"  # one output channel


class ValueType(Enum):
    """What the scale is computed from."""

    MAXABS = "maxabs"  # the range
    FIXED_VALUE = "fixed_value"  # nothing
    OPT = "opt"  # the values: the candidate with the least squared error


class Rounding(Enum):
    """How the scale is rounded."""

    IDENTITY = "identity"
    POW2 = "pow2"
    HW_ALIGNED = "hw_aligned"
    HW_ALIGNED_FIXED = "hw_aligned_fixed"
    SCALE_UNIT = "scale_unit"


@dataclass(frozen=True)
class TensorMethod:
    """How one tensor's scale is found.

    Attributes:
        granularity, value_type, rounding: see the enums.
        backoff: fraction of the FP8 range that the measured maximum may fill; the rest
            is head room. `FIXED_VALUE`, and `OPT` per tensor, do not use it.
        weight_scales: candidates of `OPT`, tried in this order (per channel: factors of
            the max-abs scale); None means the free scales of the device.
    """

    granularity: Granularity = Granularity.PTS
    value_type: ValueType = ValueType.MAXABS
    rounding: Rounding = Rounding.IDENTITY
    backoff: float = 1.0
    weight_scales: tuple[float, ...] | None = None

    @property
    def kind(self) -> tuple[Granularity, ValueType, Rounding]:
        """What tells published methods apart; backoff and candidates may vary."""
        return (self.granularity, self.value_type, self.rounding)

    @property
    def is_fixed(self) -> bool:
        """True where the scale depends on the device alone."""
        return self.value_type is ValueType.FIXED_VALUE

    @property
    def is_per_channel(self) -> bool:
        return self.granularity is Granularity.PCS

    @property
    def uses_backoff(self) -> bool:
        return self.value_type is ValueType.MAXABS or (self.value_type is ValueType.OPT and self.is_per_channel)

    def find_candidates(self, device: Device) -> tuple[float, ...]:
        """Return the candidates of an `OPT` method on `device`, in the order they are tried."""
        return device.free_scales if self.weight_scales is None else self.weight_scales


@dataclass(frozen=True)
class ScaleMethod:
    """A rule for weights and one for activations.

    Attributes:
        name: the published method this pair is, upper case.
        weight: rule for weights.
        activation: rule for inputs and outputs.
    """

    name: str
    weight: TensorMethod
    activation: TensorMethod

    @property
    def is_dynamic_only(self) -> bool:
        """True where INC computes activation scales at run time only (`dynamic_quantization`)."""
        return self.activation.is_per_channel

    @property
    def allows_dynamic(self) -> bool:
        """True where INC accepts the method with `dynamic_quantization`."""
        fixed = self.weight.is_fixed and self.activation.is_fixed
        return self.activation.rounding is not Rounding.HW_ALIGNED and not fixed

    @property
    def needs_measurement(self) -> bool:
        """False where serving needs neither ranges nor scale files."""
        return not self.is_dynamic_only and not (self.weight.is_fixed and self.activation.is_fixed)

    @property
    def writes_scale_file(self) -> bool:
        """False where INC, and so `quantize`, leaves no scale file."""
        return self.needs_measurement

    @property
    def is_per_channel(self) -> bool:
        """True where any scale covers one channel; INC then refuses RUNTIME_SCALE_PATCHING=1."""
        return self.weight.is_per_channel or self.activation.is_per_channel


_UNIT = TensorMethod(value_type=ValueType.FIXED_VALUE, rounding=Rounding.SCALE_UNIT)
_SINGLE = TensorMethod(value_type=ValueType.FIXED_VALUE, rounding=Rounding.HW_ALIGNED_FIXED)
_ACT_HW = TensorMethod(rounding=Rounding.HW_ALIGNED, backoff=0.25)
_ACT_POW2 = TensorMethod(rounding=Rounding.POW2, backoff=0.25)
_ACT_PCS = TensorMethod(Granularity.PCS, rounding=Rounding.POW2)
_WEIGHT_HW = TensorMethod(rounding=Rounding.HW_ALIGNED, backoff=0.5)
_WEIGHT_POW2 = TensorMethod(rounding=Rounding.POW2, backoff=0.5)
_WEIGHT_PCS = TensorMethod(Granularity.PCS, rounding=Rounding.POW2, backoff=0.5)
_WEIGHT_OPT_HW = TensorMethod(value_type=ValueType.OPT, rounding=Rounding.HW_ALIGNED, backoff=0.5)
_WEIGHT_OPT_POW2 = TensorMethod(
    value_type=ValueType.OPT,
    rounding=Rounding.POW2,
    backoff=0.5,
    weight_scales=tuple(2.0**k for k in range(-10, 10)),
)
_WEIGHT_PCS_OPT = TensorMethod(
    Granularity.PCS, ValueType.OPT, Rounding.POW2, backoff=0.5, weight_scales=tuple(2.0**k for k in range(-3, 5))
)

METHODS: dict[str, ScaleMethod] = {
    method.name: method
    for method in (
        ScaleMethod("UNIT_SCALE", _UNIT, _UNIT),
        ScaleMethod("HW_ALIGNED_SINGLE_SCALE", _SINGLE, _SINGLE),
        ScaleMethod("MAXABS_HW", _WEIGHT_HW, _ACT_HW),
        ScaleMethod("MAXABS_POW2", _WEIGHT_POW2, _ACT_POW2),
        ScaleMethod("MAXABS_ARBITRARY", TensorMethod(backoff=0.5), TensorMethod(backoff=0.25)),
        ScaleMethod("MAXABS_HW_OPT_WEIGHT", _WEIGHT_OPT_HW, _ACT_HW),
        ScaleMethod("MAXABS_POW2_OPT_WEIGHT", _WEIGHT_OPT_POW2, _ACT_POW2),
        ScaleMethod("ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2", _WEIGHT_PCS, _ACT_HW),
        ScaleMethod("ACT_MAXABS_HW_WEIGHTS_PCS_OPT_POW2", _WEIGHT_PCS_OPT, _ACT_HW),
        ScaleMethod("ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2", _WEIGHT_PCS, _ACT_POW2),
        ScaleMethod("ACT_MAXABS_POW2_WEIGHTS_PCS_OPT_POW2", _WEIGHT_PCS_OPT, _ACT_POW2),
        ScaleMethod("ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW", _WEIGHT_HW, _ACT_PCS),
        ScaleMethod("MAXABS_PCS_POW2", _WEIGHT_PCS, _ACT_PCS),
    )
}


def find_method(name: str) -> ScaleMethod:
    """Return the published method `name`, in any case.

    Raises:
        ConfigError: there is no such method; names the nearest.

    >>> find_method("maxabs_hw").activation.backoff
    0.25
    """
    method = METHODS.get(name.upper())
    if method is not None:
        return method
    near = get_close_matches(name.upper(), METHODS, n=1, cutoff=0.4)
    raise ConfigError(
        f"unknown scale method {name!r}",
        where="scale_method",
        why=f"the nearest published method is {near[0].lower()!r}" if near else None,
        fix="choose one of " + ", ".join(known.lower() for known in METHODS),
    )


def match_method(weight: TensorMethod, activation: TensorMethod) -> ScaleMethod | None:
    """Return the published method that combines rules of these kinds, or None.

    INC accepts no other combination; backoff and candidates may differ.
    """
    for method in METHODS.values():
        if (method.weight.kind, method.activation.kind) == (weight.kind, activation.kind):
            return method
    return None
