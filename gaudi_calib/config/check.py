"""Checking the content of a QUANT_CONFIG: from a JSON value to a config or to findings."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gaudi_calib.config.method_form import (
    MethodEntry,
    MethodForm,
    RuleError,
    ScaleCandidates,
    StrictModel,
    TensorEntry,
    quote,
)
from gaudi_calib.config.model import UNREAD_KEYS, NodeFilter, QuantConfig, ScaleParams
from gaudi_calib.config.rules import find_errors, find_warnings
from gaudi_calib.errors import ConfigError, Finding, Findings

_OLD_NAMES = {"whitelist": "allowlist", "blacklist": "blocklist"}
_SET_BY_INC = ("device_type", "world_size")
_TRUTHY_STRINGS = ("seperate_measure_files", "row_parallel_linear_allreduce_quantization")
_MODELS: dict[str, type[StrictModel]] = {
    "allowlist": NodeFilter,
    "blocklist": NodeFilter,
    "scale_params": ScaleParams,
    "scale_method": MethodForm,
    "weight": TensorEntry,
    "activation": TensorEntry,
    "params": ScaleCandidates,
}


@dataclass(frozen=True)
class Inspection(Findings):
    """Everything to say about the content of a QUANT_CONFIG.

    Attributes:
        config: the config, or None where there are errors.
    """

    config: QuantConfig | None = None


def inspect_quant_config(content: object) -> Inspection:
    """Check the JSON value `content` and return every finding."""
    if not isinstance(content, Mapping):
        return Inspection((Finding("", "a QUANT_CONFIG is a JSON object", fix='start with {"mode": ...'),))
    twice = [old for old, new in _OLD_NAMES.items() if old in content and new in content]
    if twice:
        errors = [Finding(old, f"{old} and {_OLD_NAMES[old]} are both given", fix=f"remove {old}") for old in twice]
        return Inspection(tuple(errors))
    given: Mapping[str, Any] = content
    read = {_OLD_NAMES.get(key, key): value for key, value in given.items() if not _is_unread(key, value)}
    notes = (*_note_spelling(content), *_note_unread(content))
    try:
        config = QuantConfig.model_validate(read)
    except ValidationError as error:
        return Inspection(tuple(_list_findings(error, read)), notes)
    if errors := find_errors(config):
        return Inspection(tuple(errors), notes)
    return Inspection((), (*notes, *find_warnings(config)), config)


def parse_quant_config(content: object, *, where: object = "QUANT_CONFIG") -> QuantConfig:
    """Return the config that the JSON value `content` describes.

    Args:
        where: file or option, for the error.

    Raises:
        ConfigError: an unknown key, a bad value or an impossible combination.

    >>> parse_quant_config({"mode": "MEASURE", "dump_stats_path": "out/inc_output"}).mode
    'MEASURE'
    """
    inspection = inspect_quant_config(content)
    if inspection.config is None:
        raise _to_error(inspection.errors, where=where)
    return inspection.config


def _to_error(errors: tuple[Finding, ...], *, where: object) -> ConfigError:
    """Return the first of `errors` as an exception that counts the others."""
    first, others = errors[0], len(errors) - 1
    lister = f": `{shlex.join(['gaudi-calib', 'config', 'validate', str(where)])}` lists all"
    what = first.what + (f" (and {others} more{lister if isinstance(where, Path) else ''})" if others else "")
    place = f"{where}, key {first.where}" if first.where else where
    return ConfigError(what, where=place, why=first.why, fix=first.fix)


def _note_spelling(content: Mapping[str, Any]) -> tuple[Finding, ...]:
    old = [
        Finding(key, f"{key} is the old name of {new}", fix=f"rename it to {new}")
        for key, new in _OLD_NAMES.items()
        if key in content
    ]
    truthy = [
        Finding(key, f'INC takes the string "{content[key]}" of {key} for true', fix=f'write "{key}": false')
        for key in _TRUTHY_STRINGS
        if isinstance(content.get(key), str) and content[key].lower() == "false"
    ]
    return (*old, *truthy)


def _is_unread(key: str, value: object) -> bool:
    """Tell whether INC takes `value` and does nothing with it; an object must be empty, and `mod_dict` an object."""
    return key in UNREAD_KEYS and (value == {} or not (key == "mod_dict" or isinstance(value, Mapping)))


def _note_unread(content: Mapping[str, Any]) -> tuple[Finding, ...]:
    return tuple(
        Finding(key, f"{key} changes nothing", UNREAD_KEYS[key], "remove it")
        for key, value in content.items()
        if _is_unread(key, value)
    )


def _list_findings(error: ValidationError, content: Mapping[str, Any]) -> list[Finding]:
    findings: list[Finding] = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        if location[:1] == ["scale_method"] and location[1:2] in (["table"], ["name"]):
            del location[1]
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, RuleError):
            findings += cause.findings
        else:
            findings.append(_describe(detail, location, content))
    return findings


def _describe(detail: Any, location: list[str], content: Mapping[str, Any]) -> Finding:
    key = ".".join(location)
    if detail["type"] == "extra_forbidden" and key in UNREAD_KEYS:
        return Finding(key, f"{key} cannot be {quote(detail['input'])}", UNREAD_KEYS[key], "remove it")
    if detail["type"] == "extra_forbidden":
        return _describe_unknown_key(location, reduce(getitem, location[:-1], content))
    if detail["type"] == "missing":
        return Finding(key, f"{key} is missing", fix="a scale_method dict needs a default with weight and activation")
    if location[-1] == "[key]":
        return Finding(".".join(location[:-2]), f"{location[-2]!r} is no layer number", fix='use "0", "1", ...')
    remedy = detail["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    remedy = "use an object" if detail["type"] in ("model_type", "dict_type") else remedy
    return Finding(key, f"{key} cannot be {quote(detail['input'])}", fix=remedy)


def _describe_unknown_key(location: list[str], siblings: Mapping[str, Any]) -> Finding:
    *parents, key = location
    if not parents and key in _SET_BY_INC:
        return Finding(key, f"{key} is set by INC itself", "a value in the file breaks it", "remove it")
    model = _MODELS.get(parents[-1], MethodEntry) if parents else QuantConfig
    known = [*model.model_fields]
    near = next(iter(get_close_matches(key.lower(), known, n=1)), None)
    inside = f" in {'.'.join(parents)}" if parents else ""
    remedy = f"rename it to {near!r}" if near else "known keys: " + ", ".join(known)
    return Finding(
        ".".join(location),
        f"unknown key {key!r}{inside}" + (f"; did you mean {near!r}?" if near else ""),
        why="INC ignores keys it does not know",
        fix=f"remove it: {near!r} is given, too" if near in siblings else remedy,
    )
