"""The 13 published scale methods, and `scale_method` written as a dict.

INC knows a method by three fields for the weight and three for the activation; a
dict may spell them out for everything (`default`) or for some nodes, layers or
layer types, but each entry must be one of the published combinations.

Source: INC fp8_quant/_core/scale_methods/scale_method_config.py, scale_method_parser.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler

from gaudi_calib.errors import ConfigError


class OneOf:
    """Annotation of a text field: one of `names`, in any case unless `exact_case`."""

    def __init__(self, *names: str, exact_case: bool = False):
        self.names = names
        self.exact_case = exact_case

    def normalize(self, value: object) -> str:
        """Return `value` as it is spelt in `names`.

        Raises:
            ValueError: it is not among them; names the nearest.
        """
        text = value if isinstance(value, str) else ""
        text = text if self.exact_case else text.upper()
        if text not in self.names:
            near = get_close_matches(text, self.names, n=1)
            raise ValueError(f"use one of {', '.join(self.names)}" + (f" ({near[0]} is the nearest)" if near else ""))
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return BeforeValidator(self.normalize).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        spellings = self.names if self.exact_case else (*self.names, *(name.lower() for name in self.names))
        return {"type": "string", "enum": list(spellings)}


@dataclass(frozen=True)
class TensorScaling:
    """How one kind of tensor gets its scale.

    Attributes:
        granularity: `PTS` (one scale per tensor) or `PCS` (one per channel).
        scale_value_type: `MAXABS`, `FIXED_VALUE` or `OPT` (least squared error).
        rounding_method: `IDENTITY`, `POW2`, `HW_ALIGNED`, `HW_ALIGNED_FIXED` or `SCALE_UNIT`.
        backoff: share of the FP8 range that the largest value may use.
    """

    granularity: str = "PTS"
    scale_value_type: str = "MAXABS"
    rounding_method: str = "IDENTITY"
    backoff: float = 1.0

    @property
    def kind(self) -> tuple[str, str, str]:
        """The three fields by which INC knows a method."""
        return self.granularity, self.scale_value_type, self.rounding_method


@dataclass(frozen=True)
class ScaleMethod:
    """One published scale method.

    Attributes:
        name: INC's name, upper case.
        weight, activation: how the two get their scales.
        dynamic_only: activation scales are computed while serving.
    """

    name: str
    weight: TensorScaling
    activation: TensorScaling
    dynamic_only: bool = False

    @property
    def per_channel(self) -> bool:
        """Whether weights or activations have one scale per channel."""
        return "PCS" in (self.weight.granularity, self.activation.granularity)

    @property
    def fixed(self) -> bool:
        """Whether the scale is a constant, so that nothing needs to be measured."""
        return self.weight.scale_value_type == self.activation.scale_value_type == "FIXED_VALUE"


def _activation(rounding: str) -> TensorScaling:
    return TensorScaling(rounding_method=rounding, backoff=0.25)


def _weight(rounding: str, value: str = "MAXABS", granularity: str = "PTS") -> TensorScaling:
    return TensorScaling(granularity, value, rounding, 0.5)


_UNIT = TensorScaling(scale_value_type="FIXED_VALUE", rounding_method="SCALE_UNIT")
_SINGLE = TensorScaling(scale_value_type="FIXED_VALUE", rounding_method="HW_ALIGNED_FIXED")
_PER_TOKEN = TensorScaling("PCS", "MAXABS", "POW2")

SCALE_METHODS: dict[str, ScaleMethod] = {
    method.name: method
    for method in (
        ScaleMethod("UNIT_SCALE", _UNIT, _UNIT),
        ScaleMethod("HW_ALIGNED_SINGLE_SCALE", _SINGLE, _SINGLE),
        ScaleMethod("MAXABS_HW", _weight("HW_ALIGNED"), _activation("HW_ALIGNED")),
        ScaleMethod("MAXABS_POW2", _weight("POW2"), _activation("POW2")),
        ScaleMethod("MAXABS_ARBITRARY", _weight("IDENTITY"), _activation("IDENTITY")),
        ScaleMethod("MAXABS_HW_OPT_WEIGHT", _weight("HW_ALIGNED", "OPT"), _activation("HW_ALIGNED")),
        ScaleMethod("MAXABS_POW2_OPT_WEIGHT", _weight("POW2", "OPT"), _activation("POW2")),
        ScaleMethod(
            "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2", _weight("POW2", granularity="PCS"), _activation("HW_ALIGNED")
        ),
        ScaleMethod("ACT_MAXABS_HW_WEIGHTS_PCS_OPT_POW2", _weight("POW2", "OPT", "PCS"), _activation("HW_ALIGNED")),
        ScaleMethod("ACT_MAXABS_POW2_WEIGHTS_PCS_MAXABS_POW2", _weight("POW2", granularity="PCS"), _activation("POW2")),
        ScaleMethod("ACT_MAXABS_POW2_WEIGHTS_PCS_OPT_POW2", _weight("POW2", "OPT", "PCS"), _activation("POW2")),
        ScaleMethod("ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW", _weight("HW_ALIGNED"), _PER_TOKEN, True),
        ScaleMethod("MAXABS_PCS_POW2", _weight("POW2", granularity="PCS"), _PER_TOKEN, True),
    )
}
_BY_KIND = {(method.weight.kind, method.activation.kind): method for method in SCALE_METHODS.values()}


def get_scale_method(name: str) -> ScaleMethod:
    """Return the published method called `name`, in any case.

    Raises:
        ConfigError: no such method; names the nearest.

    >>> get_scale_method("unit_scale").fixed
    True
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
    """Return the published method with these fields (backoff aside), or None."""
    return _BY_KIND.get((weight.kind, activation.kind))


class StrictModel(BaseModel):
    """Refuses unknown keys and values of another type; cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ScaleCandidates(StrictModel):
    """The scales an `OPT` weight chooses from."""

    weight_scales: Annotated[list[PositiveFloat], Field(min_length=1)]


class TensorEntry(StrictModel):
    """`weight` or `activation` of a dict entry; an absent field is inherited."""

    granularity: Annotated[str, OneOf("PTS", "PCS")] = "PTS"
    scale_value_type: Annotated[str, OneOf("MAXABS", "FIXED_VALUE", "OPT")] = "MAXABS"
    rounding_method: Annotated[str, OneOf("IDENTITY", "POW2", "HW_ALIGNED", "HW_ALIGNED_FIXED", "SCALE_UNIT")] = (
        "IDENTITY"
    )
    backoff: PositiveFloat = 1.0
    params: ScaleCandidates | None = None

    def resolve(self, inherited: TensorScaling) -> TensorScaling:
        """Return the scaling with absent fields taken from `inherited`."""
        given = {key: getattr(self, key) for key in self.model_fields_set - {"params"}}
        return TensorScaling(**{**inherited.__dict__, **given})


class MethodEntry(StrictModel):
    """A scale method spelt out for one node, layer, layer type or by default."""

    weight: TensorEntry = TensorEntry()
    activation: TensorEntry = TensorEntry()

    def resolve(self, inherited: "MethodEntry | None" = None) -> tuple[TensorScaling, TensorScaling]:
        """Return the scaling of weight and activation."""
        base = inherited.resolve() if inherited else (TensorScaling(), TensorScaling())
        return self.weight.resolve(base[0]), self.activation.resolve(base[1])


LayerNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")]


class MethodTable(StrictModel):
    """`scale_method` as a dict.

    Attributes:
        default: for every node that no other entry names.
        nodes: by full node name.
        layers: by layer number (the digits after `layers.` in a node's name).
        layer_types: by class name of the patched module.
    """

    default: MethodEntry
    nodes: dict[str, MethodEntry] = Field(default_factory=dict)
    layers: dict[LayerNumber, MethodEntry] = Field(default_factory=dict)
    layer_types: dict[str, MethodEntry] = Field(default_factory=dict)

    def entries(self) -> Iterator[tuple[str, TensorScaling, TensorScaling]]:
        """Yield (where, weight, activation) of every entry, the default first."""
        yield "default", *self.default.resolve()
        for section in ("nodes", "layers", "layer_types"):
            for key, entry in getattr(self, section).items():
                yield f"{section}.{key}", *entry.resolve(self.default)

    def resolve(self, node: str, layer_type: str = "") -> tuple[TensorScaling, TensorScaling]:
        """Return the scaling of `node`'s weight and activation.

        A node's own entry wins over its layer's, that over its type's, that over the default.

        >>> MethodTable.model_validate({"default": {"weight": {"backoff": 0.5}}}).resolve("lm_head")[0].backoff
        0.5
        """
        layer = re.search(r"layers[./](\d+)", node)
        entry = (
            self.nodes.get(node)
            or (self.layers.get(layer[1]) if layer else None)
            or self.layer_types.get(layer_type)
            or self.default
        )
        return entry.resolve(self.default)


def spell_out(method: ScaleMethod, *, weight_backoff: float | None, input_backoff: float | None) -> MethodTable:
    """Return `method` as a dict with other backoffs, the form INC 3.5 and later read."""

    def entry(scaling: TensorScaling, backoff: float | None) -> dict[str, Any]:
        return {**scaling.__dict__, "backoff": scaling.backoff if backoff is None else backoff}

    weight, activation = entry(method.weight, weight_backoff), entry(method.activation, input_backoff)
    return MethodTable.model_validate({"default": {"weight": weight, "activation": activation}})
