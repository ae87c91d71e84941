r"""The dict form of `scale_method`: other methods for some nodes, layers or classes.

    {"default":     {"weight": RULE, "activation": RULE},
     "nodes":       {"<node name>":     {"weight": RULE, "activation": RULE}},
     "layers":      {"<layer index>":   {...}},      index as in layers.(\d+) of the node name
     "layer_types": {"<module class>":  {...}}}      as vLLM calls it: RowParallelLinear, Matmul, ...
    RULE = {"granularity": "pts", "scale_value_type": "maxabs", "rounding_method": "hw_aligned",
            "backoff": 0.5, "params": {"weight_scales": [...]}}

The first of nodes, layers, layer_types, default that names a node decides for it. What
a rule of `default` leaves out is PTS, MAXABS, IDENTITY and a backoff of 1.0 (not the
backoff of the published method); what another rule leaves out is that of `default`.
Every pair must be a published one, backoff and params apart.

Source: INC `parse_scale_method`, `validate_and_populate_scale_method`,
`find_node_scale_method_config`, fp8_quant/_core/scale_methods/.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from gaudi_calib.errors import ConfigError
from gaudi_calib.scales.method_rules import RulePair, check_keys, read_pair
from gaudi_calib.scales.methods import ScaleMethod, TensorMethod, find_method

_LAYER_PATTERNS = (re.compile(r"layers\.(\d+)"), re.compile(r"layers/(\d+)"))
_SECTIONS = ("nodes", "layers", "layer_types")


@dataclass(frozen=True)
class MethodTable:
    """The scale method of every node.

    Attributes:
        default: method of the nodes no override names.
        nodes, layers, layer_types: overrides by node name, layer index and module class.
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
    def methods(self) -> tuple[ScaleMethod, ...]:
        """The default and every override."""
        overrides = (method for section in _SECTIONS for method in getattr(self, section).values())
        return (self.default, *overrides)

    @property
    def is_dynamic_only(self) -> bool:
        """True where INC demands `dynamic_quantization` for some node."""
        return any(method.is_dynamic_only for method in self.methods)

    @property
    def allows_dynamic(self) -> bool:
        """True where INC accepts the table with `dynamic_quantization`."""
        return all(method.allows_dynamic for method in self.methods)

    @property
    def needs_measurement(self) -> bool:
        """False where serving needs neither ranges nor scale files."""
        fixed = all(method.weight.is_fixed and method.activation.is_fixed for method in self.methods)
        return not fixed and not self.is_dynamic_only

    @property
    def writes_scale_file(self) -> bool:
        """False where INC, and so `quantize`, leaves no scale file."""
        return self.needs_measurement

    @property
    def is_per_channel(self) -> bool:
        """True where some scale covers one channel: serve with RUNTIME_SCALE_PATCHING=0."""
        return any(method.is_per_channel for method in self.methods)

    def for_node(self, name: str, layer_type: str | None = None) -> ScaleMethod:
        """Return the method of node `name`, a module of class `layer_type`."""
        if name in self.nodes:
            return self.nodes[name]
        layer = _find_layer(name)
        if layer is not None and layer in self.layers:
            return self.layers[layer]
        if layer_type is not None and layer_type in self.layer_types:
            return self.layer_types[layer_type]
        return self.default

    def find_unused(self, names: Iterable[str], layer_types: Iterable[str] = ()) -> list[str]:
        """Return the overrides that match none of the nodes `names` and module classes `layer_types`.

        >>> parse_scale_method({"default": {}, "nodes": {"lm_hed": {}}}).find_unused(["lm_head"])
        ["nodes['lm_hed']"]
        """
        known = {"nodes": set(names), "layer_types": set(layer_types)}
        known["layers"] = {layer for layer in map(_find_layer, known["nodes"]) if layer is not None}
        return [
            f"{section}[{key!r}]"
            for section in _SECTIONS
            for key in getattr(self, section)
            if key not in known[section]
        ]


def parse_scale_method(value: str | Mapping[str, Any]) -> MethodTable:
    """Read `scale_method` of a QUANT_CONFIG.

    Args:
        value: a published name in any case, or the dict form.

    Raises:
        ConfigError: unknown name, key or value, no `default`, or a pair of rules that
            no published method combines.

    >>> table = parse_scale_method({
    ...     "default": {"weight": {"rounding_method": "hw_aligned", "backoff": 0.5},
    ...                 "activation": {"rounding_method": "hw_aligned", "backoff": 0.25}},
    ...     "layers": {"0": {"activation": {"backoff": 0.125}}}})
    >>> table.file_tag, table.for_node("model.layers.0.mlp.down_proj").activation.backoff
    ('MAXABS_HW', 0.125)
    """
    if isinstance(value, str):
        return MethodTable(find_method(value))
    if not isinstance(value, Mapping):
        raise ConfigError("scale_method must be a name or a dict", where="scale_method", why=f"it is {value!r}")
    check_keys(value, ("default", *_SECTIONS), "scale_method")
    if value.get("default") is None:
        raise ConfigError(
            "scale_method has no default", where="scale_method", fix="add a 'default' with 'weight' and 'activation'"
        )
    default = read_pair(value["default"], None, "scale_method.default")
    sections: dict[str, dict[str, RulePair]] = {}
    for section in _SECTIONS:
        items = value.get(section)
        where = f"scale_method.{section}"
        check_keys(items if items is not None else {}, None, where)
        sections[section] = {
            _read_key(section, key): read_pair(item, default, f"{where}[{key!r}]")
            for key, item in (items or {}).items()
        }
    # INC completes `default` first, then the sections in this order; it matters, since rules share params.
    return MethodTable(
        default.complete(),
        **{section: {key: pair.complete() for key, pair in sections[section].items()} for section in _SECTIONS},
    )


def with_backoffs(
    method: str | Mapping[str, Any], *, input_backoff: float | None = None, weight_backoff: float | None = None
) -> dict[str, Any]:
    """Return the dict form of `method` with other backoffs for its default.

    The documented `scale_params: {input_backoff, weight_backoff}` has no effect since
    INC 3.5; the dict form has. Overrides of a dict that set their own backoff keep it.

    Raises:
        ConfigError: the method is invalid, or takes no such backoff.

    >>> with_backoffs("maxabs_hw", input_backoff=0.5)["default"]["activation"]["backoff"]
    0.5
    """
    table = parse_scale_method(method)
    form = {"default": _write_pair(table.default)} if isinstance(method, str) else deepcopy(dict(method))
    for side, backoff in (("weight", weight_backoff), ("activation", input_backoff)):
        if backoff is None:
            continue
        if not getattr(table.default, side).uses_backoff:
            raise ConfigError(
                f"{table.file_tag} has no backoff for {side}s",
                where="scale_params",
                why="its scales do not come from a maximum",
                fix="leave the backoff out or choose a maxabs method",
            )
        form["default"] = {**form["default"]}
        form["default"][side] = {**form["default"].get(side, {}), "backoff": backoff}
    parse_scale_method(form)
    return form


def _read_key(section: str, key: Any) -> str:
    text = str(key)
    if section == "layers" and (not text.isdecimal() or text != str(int(text))):
        raise ConfigError(
            f"{text!r} is not a layer index", where="scale_method.layers", fix='use the plain number, as in "12"'
        )
    return text


def _find_layer(name: str) -> str | None:
    for pattern in _LAYER_PATTERNS:
        match = pattern.search(name)
        if match:
            return match[1]
    return None


def _write_pair(method: ScaleMethod) -> dict[str, Any]:
    def write(rule: TensorMethod) -> dict[str, Any]:
        return {
            "granularity": rule.granularity.value,
            "scale_value_type": rule.value_type.value,
            "rounding_method": rule.rounding.value,
            "backoff": rule.backoff,
        }

    return {"weight": write(method.weight), "activation": write(method.activation)}
