"""`scale_method` written as a dict: other methods for some nodes, layers or module classes.

    {"default":     {"weight": TENSOR, "activation": TENSOR},
     "nodes":       {"<node name>":    {"weight": TENSOR, "activation": TENSOR}},
     "layers":      {"<layer number>": {...}},
     "layer_types": {"<module class>": {...}}}      as vLLM calls it: RowParallelLinear, Matmul, ...
    TENSOR = {"granularity": "pts", "scale_value_type": "maxabs", "rounding_method": "hw_aligned",
              "backoff": 0.5, "params": {"weight_scales": [...]}}

What `default` leaves out is PTS, MAXABS, IDENTITY and a backoff of 1.0 (not the backoff
of the published method); what another entry leaves out is that of `default`. Every
entry must be a published combination, backoff and params apart.

Source: INC `parse_scale_method`, `validate_and_populate_scale_method`,
fp8_quant/_core/scale_methods/scale_method_parser.py.
"""

import json
from dataclasses import replace
from difflib import get_close_matches
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)

from gaudi_calib.config.methods import (
    SECTIONS,
    Granularity,
    MethodTable,
    Rounding,
    ScaleMethod,
    ScaleValueType,
    TensorScaling,
    get_scale_method,
    match_scale_method,
)
from gaudi_calib.errors import Finding


class RuleError(ValueError):
    """A config breaks rules; carries every finding through pydantic."""

    def __init__(self, findings: list[Finding]):
        super().__init__("; ".join(finding.what for finding in findings))
        self.findings = findings


def quote(value: object) -> str:
    """Return a value of a config as messages show it."""
    return json.dumps(value, default=str)[:80]


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


class StrictModel(BaseModel):
    """Refuses unknown keys and values of another type; cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ScaleCandidates(StrictModel):
    """The scales an `OPT` weight chooses from; without any, those of the published method."""

    weight_scales: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None


class TensorEntry(StrictModel):
    """`weight` or `activation` of an entry; an absent field is inherited."""

    granularity: Annotated[str, OneOf(*get_args(Granularity))] = "PTS"
    scale_value_type: Annotated[str, OneOf(*get_args(ScaleValueType))] = "MAXABS"
    rounding_method: Annotated[str, OneOf(*get_args(Rounding))] = "IDENTITY"
    backoff: PositiveFloat = 1.0
    params: ScaleCandidates | None = None

    def resolve(self, inherited: TensorScaling) -> TensorScaling:
        """Return the scaling with absent fields taken from `inherited`, candidates aside."""
        given = {key: getattr(self, key) for key in self.model_fields_set - {"params"}}
        return replace(inherited, **given)

    @property
    def candidates(self) -> tuple[float, ...] | None:
        """The candidates given here, or None."""
        scales = self.params.weight_scales if self.params else None
        return tuple(scales) if scales else None


class MethodEntry(StrictModel):
    """A scale method spelt out for one node, layer, module class or by default."""

    weight: TensorEntry = TensorEntry()
    activation: TensorEntry = TensorEntry()


LayerNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]*)$")]
_NullIsEmpty = BeforeValidator(lambda value: {} if value is None else value)


class MethodForm(StrictModel):
    """`scale_method` as a dict; the sections mean what they do in `MethodTable`."""

    default: MethodEntry
    nodes: Annotated[dict[str, MethodEntry], _NullIsEmpty] = Field(default_factory=dict)
    layers: Annotated[dict[LayerNumber, MethodEntry], _NullIsEmpty] = Field(default_factory=dict)
    layer_types: Annotated[dict[str, MethodEntry], _NullIsEmpty] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_entries(self) -> "MethodForm":
        self.to_table()
        return self

    def to_table(self) -> MethodTable:
        """Return the method of every entry, with all that it inherits.

        Raises:
            RuleError: entries that are no published combination.
        """
        reader = _EntryReader(self.default)
        default = reader.read("default", self.default)
        sections = {
            section: {key: reader.read(f"{section}.{key}", entry) for key, entry in getattr(self, section).items()}
            for section in SECTIONS
        }
        if reader.findings:
            raise RuleError(reader.findings)
        return MethodTable(default, **sections)


class _EntryReader:
    """Reads the entries of a dict, in INC's order: the default, then nodes, layers, layer types.

    The order matters: entries without own params share those of the default, so the
    first one that needs candidates decides them for all later ones, even of another kind.
    """

    def __init__(self, default: MethodEntry):
        self.weight = default.weight.resolve(TensorScaling())
        self.activation = default.activation.resolve(TensorScaling())
        self.shared = default.weight.candidates
        self.findings: list[Finding] = []

    def read(self, where: str, entry: MethodEntry) -> ScaleMethod:
        weight, activation = entry.weight.resolve(self.weight), entry.activation.resolve(self.activation)
        published = match_scale_method(weight, activation)
        if published is None:
            self.findings.append(_not_published(where, weight, activation))
            return ScaleMethod("", weight, activation)
        if weight.scale_value_type == "OPT":
            own = where != "default" and "params" in entry.weight.model_fields_set
            scales = entry.weight.candidates if own else self.shared
            scales = published.weight.weight_scales if scales is None else scales
            self.shared = self.shared if own else scales
            weight = replace(weight, weight_scales=scales)
        return ScaleMethod(published.name, weight, activation)


def _not_published(where: str, weight: TensorScaling, activation: TensorScaling) -> Finding:
    return Finding(
        f"scale_method.{where}",
        "these fields together are no published scale method",
        f"weight is {'/'.join(weight.kind)} and activation is {'/'.join(activation.kind)}"
        " (granularity/scale_value_type/rounding_method)",
        "`gaudi-calib config presets` lists the published combinations",
    )


def build_table(method: str | MethodForm) -> MethodTable:
    """Return the method of every node for a published name or a dict.

    >>> form = {"default": {}, "layers": {"0": {"activation": {"backoff": 0.125}}}}
    >>> table = build_table(MethodForm.model_validate(form))
    >>> table.file_tag, table.for_node("model.layers.0.mlp.down_proj").activation.backoff
    ('MAXABS_ARBITRARY', 0.125)
    """
    return method.to_table() if isinstance(method, MethodForm) else MethodTable(get_scale_method(method))


def spell_out(method: ScaleMethod) -> MethodForm:
    """Return `method` as a dict, from which INC 3.5 and later read backoffs; its candidates must be the published ones.

    >>> spell_out(get_scale_method("maxabs_hw")).default.activation.backoff
    0.25
    """
    parts = {"weight": method.weight.to_fields(), "activation": method.activation.to_fields()}
    return MethodForm.model_validate({"default": parts})
