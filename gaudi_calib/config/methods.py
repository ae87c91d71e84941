"""The 13 published scale methods: how the scale of a tensor follows from its range or its values.

A published method is a name that QUANT_CONFIG's `scale_method` accepts; it pairs one
rule for weights with one for activations. The dict form (method_form.py) mixes
them per node, layer or module class; either way a `MethodTable` tells each node's.

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

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from gaudi_calib.errors import ConfigError
from gaudi_calib.fp8 import Device

Granularity = Literal["PTS", "PCS"]
ScaleValueType = Literal["MAXABS", "FIXED_VALUE", "OPT"]
Rounding = Literal["IDENTITY", "POW2", "HW_ALIGNED", "HW_ALIGNED_FIXED", "SCALE_UNIT"]

# Of a run that asks for no other.
DEFAULT_METHOD = "maxabs_hw"
SECTIONS = ("nodes", "layers", "layer_types")
# Of every activation that is scaled while serving, whatever its method says.
# Source: INC `ScaleMethodFactory.get_scale_method`, fp8_quant/_core/scale_methods/scale_method_factory.py.
DYNAMIC_BACKOFF = 0.5


@dataclass(frozen=True)
class TensorScaling:
    """How one kind of tensor gets its scale.

    Attributes:
        granularity: `PTS` (one scale per tensor) or `PCS` (one per channel).
        scale_value_type: what the scale comes from: `MAXABS` (the range), `FIXED_VALUE`
            (nothing) or `OPT` (the values: the candidate with the least squared error).
        rounding_method: how the scale is rounded.
        backoff: share of the FP8 range that the largest value may use; the rest is head
            room. `FIXED_VALUE`, and `OPT` per tensor, do not use it.
        weight_scales: candidates of `OPT`, tried in this order (per channel: factors of
            the max-abs scale); empty for the free scales of the device.
    """

    granularity: Granularity = "PTS"
    scale_value_type: ScaleValueType = "MAXABS"
    rounding_method: Rounding = "IDENTITY"
    backoff: float = 1.0
    weight_scales: tuple[float, ...] = ()

    @property
    def kind(self) -> tuple[Granularity, ScaleValueType, Rounding]:
        """What tells published methods apart; backoff and candidates may vary."""
        return self.granularity, self.scale_value_type, self.rounding_method

    @property
    def is_fixed(self) -> bool:
        """True where the scale depends on the device alone."""
        return self.scale_value_type == "FIXED_VALUE"

    @property
    def is_per_channel(self) -> bool:
        """True where each channel has a scale of its own."""
        return self.granularity == "PCS"

    @property
    def uses_backoff(self) -> bool:
        """True where the scale follows from a maximum."""
        return self.scale_value_type == "MAXABS" or (self.scale_value_type == "OPT" and self.is_per_channel)

    def with_backoff(self, backoff: float | None) -> "TensorScaling":
        """Return the scaling with another backoff; itself where `backoff` is None or would not be used."""
        return self if backoff is None or not self.uses_backoff else replace(self, backoff=backoff)

    def find_candidates(self, device: Device) -> tuple[float, ...]:
        """Return the candidates of an `OPT` method on `device`, in the order they are tried."""
        return self.weight_scales or device.free_scales

    def to_fields(self) -> dict[str, Any]:
        """Return the fields that QUANT_CONFIG's dict form spells out, candidates aside."""
        return {
            "granularity": self.granularity,
            "scale_value_type": self.scale_value_type,
            "rounding_method": self.rounding_method,
            "backoff": self.backoff,
        }


@dataclass(frozen=True)
class ScaleMethod:
    """How weights and activations get their scales.

    Attributes:
        name: the published method this pair is (backoffs and candidates aside), upper case.
        weight: for weights.
        activation: for inputs and outputs.
    """

    name: str
    weight: TensorScaling
    activation: TensorScaling

    @property
    def is_fixed(self) -> bool:
        """True where all scales are constants."""
        return self.weight.is_fixed and self.activation.is_fixed

    @property
    def is_per_channel(self) -> bool:
        """True where any scale covers one channel; INC then refuses RUNTIME_SCALE_PATCHING=1."""
        return self.weight.is_per_channel or self.activation.is_per_channel

    @property
    def is_dynamic_only(self) -> bool:
        """True where INC computes activation scales at run time only (`dynamic_quantization`)."""
        return self.activation.is_per_channel

    @property
    def allows_dynamic(self) -> bool:
        """True where INC accepts the method with `dynamic_quantization`."""
        return self.activation.rounding_method != "HW_ALIGNED" and not self.is_fixed

    @property
    def needs_measurement(self) -> bool:
        """False where serving needs neither ranges nor scale files."""
        return not (self.is_fixed or self.is_dynamic_only)

    @property
    def needs_weights(self) -> bool:
        """True where the scales of weights come from the weights themselves."""
        return self.weight.is_per_channel or self.weight.scale_value_type == "OPT"


_UNIT = TensorScaling(scale_value_type="FIXED_VALUE", rounding_method="SCALE_UNIT")
_SINGLE = TensorScaling(scale_value_type="FIXED_VALUE", rounding_method="HW_ALIGNED_FIXED")
_ACT_HW = TensorScaling(rounding_method="HW_ALIGNED", backoff=0.25)
_ACT_POW2 = TensorScaling(rounding_method="POW2", backoff=0.25)
_ACT_PCS = TensorScaling("PCS", rounding_method="POW2")
_WEIGHT_HW = TensorScaling(rounding_method="HW_ALIGNED", backoff=0.5)
_WEIGHT_POW2 = TensorScaling(rounding_method="POW2", backoff=0.5)
_WEIGHT_PCS = TensorScaling("PCS", rounding_method="POW2", backoff=0.5)
_WEIGHT_OPT_HW = TensorScaling("PTS", "OPT", "HW_ALIGNED", 0.5)
_WEIGHT_OPT_POW2 = TensorScaling("PTS", "OPT", "POW2", 0.5, tuple(2.0**k for k in range(-10, 10)))
_WEIGHT_PCS_OPT = TensorScaling("PCS", "OPT", "POW2", 0.5, tuple(2.0**k for k in range(-3, 5)))

SCALE_METHODS: dict[str, ScaleMethod] = {
    method.name: method
    for method in (
        ScaleMethod("UNIT_SCALE", _UNIT, _UNIT),
        ScaleMethod("HW_ALIGNED_SINGLE_SCALE", _SINGLE, _SINGLE),
        ScaleMethod("MAXABS_HW", _WEIGHT_HW, _ACT_HW),
        ScaleMethod("MAXABS_POW2", _WEIGHT_POW2, _ACT_POW2),
        ScaleMethod("MAXABS_ARBITRARY", TensorScaling(backoff=0.5), TensorScaling(backoff=0.25)),
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
_BY_KIND = {(method.weight.kind, method.activation.kind): method for method in SCALE_METHODS.values()}


def get_scale_method(name: str) -> ScaleMethod:
    """Return the published method called `name`, in any case.

    Raises:
        ConfigError: no such method; names the nearest.

    >>> get_scale_method("maxabs_hw").activation.backoff
    0.25
    """
    method = SCALE_METHODS.get(name.upper())
    if method is None:
        near = get_close_matches(name.upper(), SCALE_METHODS, n=1)
        raise ConfigError(
            f"unknown scale method {name!r}" + (f"; did you mean {near[0].lower()}?" if near else ""),
            fix="choose one of " + ", ".join(sorted(SCALE_METHODS)).lower(),
        )
    return method


def match_scale_method(weight: TensorScaling, activation: TensorScaling) -> ScaleMethod | None:
    """Return the published method with these fields (backoff and candidates aside), or None.

    INC accepts no other combination.
    """
    return _BY_KIND.get((weight.kind, activation.kind))


@dataclass(frozen=True)
class MethodTable:
    """The scale method of every node.

    Attributes:
        default: of the nodes that no override names.
        nodes, layers, layer_types: overrides by full node name, by layer number (the
            digits after `layers.` in a node's name) and by class name of the module.
    """

    default: ScaleMethod
    nodes: Mapping[str, ScaleMethod] = field(default_factory=dict)
    layers: Mapping[str, ScaleMethod] = field(default_factory=dict)
    layer_types: Mapping[str, ScaleMethod] = field(default_factory=dict)

    @property
    def file_tag(self) -> str:
        """The method's name in scale file names: that of the default."""
        return self.default.name

    @property
    def needs_weights(self) -> bool:
        """Whether any scale comes from a weight itself."""
        return any(method.needs_weights for method in self.methods)

    def for_dynamic(self) -> "MethodTable":
        """Return the table that holds where activations are scaled while serving (`dynamic_quantization`)."""

        def change(method: ScaleMethod) -> ScaleMethod:
            return replace(method, activation=method.activation.with_backoff(DYNAMIC_BACKOFF))

        overrides = {
            section: {key: change(method) for key, method in getattr(self, section).items()} for section in SECTIONS
        }
        return MethodTable(change(self.default), **overrides)

    def entries(self) -> Iterator[tuple[str, ScaleMethod]]:
        """Yield (where, method) of the default and every override, the default first."""
        yield "default", self.default
        for section in SECTIONS:
            for key, method in getattr(self, section).items():
                yield f"{section}.{key}", method

    @property
    def methods(self) -> tuple[ScaleMethod, ...]:
        """The default and every override."""
        return tuple(method for _, method in self.entries())

    def for_node(self, name: str, layer_type: str | None = None) -> ScaleMethod:
        """Return the method of node `name`, a module of class `layer_type`.

        A node's own entry wins over its layer's, that over its class's, that over the default.
        """
        if name in self.nodes:
            return self.nodes[name]
        layer = _find_layer(name)
        if layer in self.layers:
            return self.layers[layer]
        return self.layer_types.get(layer_type or "", self.default)

    def find_unused(self, names: Iterable[str], layer_types: Iterable[str] = ()) -> list[str]:
        """Return the overrides that match none of the nodes `names` and module classes `layer_types`.

        >>> MethodTable(SCALE_METHODS["MAXABS_HW"], {"lm_hed": SCALE_METHODS["UNIT_SCALE"]}).find_unused(["lm_head"])
        ['nodes.lm_hed']
        """
        nodes = set(names)
        known = {"nodes": nodes, "layers": set(map(_find_layer, nodes)), "layer_types": set(layer_types)}
        return [
            f"{section}.{key}" for section in SECTIONS for key in getattr(self, section) if key not in known[section]
        ]


def _find_layer(name: str) -> str:
    """Return the layer number in a node's name, or nothing."""
    match = re.search(r"layers\.(\d+)", name) or re.search(r"layers/(\d+)", name)
    return match[1] if match else ""
