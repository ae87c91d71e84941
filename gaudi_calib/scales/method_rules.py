"""Reading one entry of a dict-form scale method: a rule for weights, one for activations.

The form and its defaults are described in `method_table.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from gaudi_calib.errors import ConfigError
from gaudi_calib.scales.methods import (
    METHODS,
    Granularity,
    Rounding,
    ScaleMethod,
    TensorMethod,
    ValueType,
    match_method,
)

_SIDES = ("weight", "activation")
_CHOICES: dict[str, type[Enum]] = {
    "granularity": Granularity,
    "scale_value_type": ValueType,
    "rounding_method": Rounding,
}
_RULE_KEYS = (*_CHOICES, "backoff", "params")
_FREE = "the device's free scales"  # stands for the candidates that depend on the device


@dataclass
class Rule:
    """A rule being read; `params` may be shared with the default's, as in INC."""

    granularity: Granularity
    scale_value_type: ValueType
    rounding_method: Rounding
    backoff: float
    params: dict[str, Any]

    def freeze(self) -> TensorMethod:
        """Return the rule as a value."""
        scales = self.params.get("weight_scales") if self.scale_value_type is ValueType.OPT else None
        candidates = None if scales is None or scales == _FREE else tuple(float(scale) for scale in scales)
        return TensorMethod(self.granularity, self.scale_value_type, self.rounding_method, self.backoff, candidates)


@dataclass
class RulePair:
    """The two rules of one entry."""

    weight: Rule
    activation: Rule
    where: str

    def complete(self) -> ScaleMethod:
        """Match the published method and take the candidates the entry left out from it.

        A rule without own params shares those of the default, so the first entry that
        needs candidates decides them for all later ones. That is INC's behaviour.
        """
        published = match_method(self.weight.freeze(), self.activation.freeze())
        if published is None:
            raise ConfigError(
                "no published scale method combines these rules",
                where=self.where,
                why=f"weight {_describe(self.weight)}, activation {_describe(self.activation)}",
                fix="combine the rules of one of " + ", ".join(name.lower() for name in METHODS),
            )
        if published.weight.value_type is ValueType.OPT and self.weight.params.get("weight_scales") is None:
            scales = published.weight.weight_scales
            self.weight.params["weight_scales"] = _FREE if scales is None else scales
        return ScaleMethod(published.name, self.weight.freeze(), self.activation.freeze())


def read_pair(item: Any, default: RulePair | None, where: str) -> RulePair:
    check_keys(item, _SIDES, where)
    rules = {
        side: _read_rule(item.get(side, {}), getattr(default, side) if default else None, f"{where}.{side}")
        for side in _SIDES
    }
    return RulePair(**rules, where=where)


def _read_rule(item: Any, default: Rule | None, where: str) -> Rule:
    check_keys(item, _RULE_KEYS, where)
    base = default or Rule(Granularity.PTS, ValueType.MAXABS, Rounding.IDENTITY, 1.0, {})
    fields: dict[str, Any] = {
        key: _read_choice(choices, item[key], f"{where}.{key}") if key in item else getattr(base, key)
        for key, choices in _CHOICES.items()
    }
    backoff = _read_positive(item["backoff"], f"{where}.backoff") if "backoff" in item else base.backoff
    params = _read_params(item["params"], f"{where}.params") if "params" in item else base.params
    return Rule(**fields, backoff=backoff, params=params)


def _read_choice(choices: type[Enum], value: Any, where: str) -> Enum:
    if isinstance(value, str) and value.upper() in choices.__members__:
        return choices[value.upper()]
    near = get_close_matches(str(value).lower(), [choice.value for choice in choices], n=1, cutoff=0.4)
    raise ConfigError(
        f"{value!r} is not allowed here",
        where=where,
        why=f"the nearest is {near[0]!r}" if near else None,
        fix="choose one of " + ", ".join(choice.value for choice in choices),
    )


def _read_params(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    check_keys(value, ("weight_scales",), where)
    scales = value.get("weight_scales")
    if scales is None:
        return {}
    if not isinstance(scales, (list, tuple)) or not scales:
        raise ConfigError("weight_scales must be a list of scales", where=where, why=f"it is {scales!r}")
    return {"weight_scales": tuple(_read_positive(scale, f"{where}.weight_scales") for scale in scales)}


def _read_positive(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return float(value)
    raise ConfigError(f"{value!r} is not a positive number", where=where)


def check_keys(item: Any, allowed: tuple[str, ...] | None, where: str) -> None:
    if not isinstance(item, Mapping):
        raise ConfigError("a dict is expected here", where=where, why=f"found {item!r}")
    for key in item:
        if allowed is not None and key not in allowed:
            near = get_close_matches(str(key), allowed, n=1, cutoff=0.4)
            raise ConfigError(
                f"unknown key {key!r}",
                where=where,
                why=f"the nearest known one is {near[0]!r}" if near else None,
                fix="known keys: " + ", ".join(allowed),
            )


def _describe(rule: Rule) -> str:
    return " ".join(choice.value for choice in (rule.granularity, rule.scale_value_type, rule.rounding_method))
