"""QUANT_CONFIG: the JSON file that tells INC what to measure or quantize.

    {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw",
     "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": ["lm_head"]},
     "dump_stats_path": "/data/out/llama/g3/inc_output"}

INC takes unknown keys and several impossible combinations without a word; here they
are errors. Names in the lists are regular expressions (`re.search`), types are class
names. The attributes are in config_model.py, the rules in config_rules.py, the scale
methods in config_methods.py.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gaudi_calib.config_methods import (
    MethodEntry,
    MethodTable,
    ScaleCandidates,
    StrictModel,
    TensorEntry,
    get_scale_method,
)
from gaudi_calib.config_model import (
    NodeFilter,
    QuantConfig,
    ScaleParams,
    find_idle_patterns,
    get_scales_device,
    match_patterns,
    to_content,
    with_dump_stats_path,
)
from gaudi_calib.config_rules import Finding, RuleError
from gaudi_calib.errors import ConfigError
from gaudi_calib.families import Family
from gaudi_calib.files import write_json

__all__ = [
    "Finding",
    "Inspection",
    "QuantConfig",
    "find_idle_patterns",
    "get_scales_device",
    "inspect_quant_config",
    "load_json",
    "match_patterns",
    "measure_config",
    "parse_quant_config",
    "quant_config",
    "read_quant_config",
    "to_content",
    "with_dump_stats_path",
    "write_quant_config",
]

# Module types that INC cannot quantize dynamically.
DYNAMIC_BLOCKED_TYPES = ("Matmul", "B2BMatmul", "KVCache", "VLLMKVCache")
_OLD_NAMES = {"whitelist": "allowlist", "blacklist": "blocklist"}
_SET_BY_INC = ("device_type", "local_rank", "global_rank", "world_size", "mod_dict")
_TRUTHY_STRINGS = ("seperate_measure_files", "row_parallel_linear_allreduce_quantization")
_MODELS: dict[str, type[StrictModel]] = {
    "allowlist": NodeFilter,
    "blocklist": NodeFilter,
    "scale_params": ScaleParams,
    "scale_method": MethodTable,
    "weight": TensorEntry,
    "activation": TensorEntry,
    "params": ScaleCandidates,
}


@dataclass(frozen=True)
class Inspection:
    """Everything to say about the content of a QUANT_CONFIG.

    Attributes:
        config: the config, or None where there are errors.
        errors: why it cannot be used.
        warnings: what INC or vllm-gaudi silently changes or ignores.
    """

    config: QuantConfig | None
    errors: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()


def inspect_quant_config(content: object) -> Inspection:
    """Check the JSON value `content` and return every finding."""
    if not isinstance(content, Mapping):
        return Inspection(None, (Finding("", "a QUANT_CONFIG is a JSON object", fix='start with {"mode": ...'),))
    twice = [old for old, new in _OLD_NAMES.items() if old in content and new in content]
    if twice:
        errors = tuple(
            Finding(old, f"{old} and {_OLD_NAMES[old]} are both given", fix=f"remove {old}") for old in twice
        )
        return Inspection(None, errors)
    notes = _note_spelling(content)
    try:
        config = QuantConfig.model_validate({_OLD_NAMES.get(key, key): value for key, value in content.items()})
    except ValidationError as error:
        return Inspection(None, tuple(_list_findings(error)), notes)
    return Inspection(config, (), (*notes, *config.warnings))


def parse_quant_config(content: object, *, where: object = "QUANT_CONFIG") -> QuantConfig:
    """Return the config that the JSON value `content` describes.

    Args:
        where: file or option, for the error.

    Raises:
        ConfigError: an unknown key, a bad value or an impossible combination.

    >>> parse_quant_config({"mode": "measure", "dump_stats_path": "out/inc_output"}).mode
    'MEASURE'
    """
    inspection = inspect_quant_config(content)
    if inspection.config is None:
        raise _to_error(inspection.errors, where=where)
    return inspection.config


def read_quant_config(path: Path) -> QuantConfig:
    """Return the config in the file `path`.

    Raises:
        ConfigError: the file cannot be read, is not JSON (names line and column), or is
            not a usable QUANT_CONFIG.
    """
    return parse_quant_config(load_json(path), where=path)


def load_json(path: Path) -> Any:
    """Return the JSON value in `path`; a key given twice is an error.

    Raises:
        ConfigError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path.name}", where=path, why=error.strerror, fix="give the path of a QUANT_CONFIG file"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path.name} is not valid JSON",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            why=error.msg,
            fix="correct that line; JSON has no comments and no comma before a closing bracket",
        ) from error
    except ConfigError as error:
        raise ConfigError(error.what, where=path, why=error.why, fix=error.fix) from None
    except ValueError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text", where=path, why=str(error)) from error


def write_quant_config(path: Path, config: QuantConfig) -> None:
    """Write `config` in the reference's layout and order of keys, atomically.

    Backoffs of `scale_params` are written into a `scale_method` dict, which INC obeys.
    """
    write_json(path, to_content(config))


def measure_config(family: Family, dump_stats_path: str | os.PathLike[str], **overrides: Any) -> QuantConfig:
    """Return the MEASURE config of `family`.

    Args:
        dump_stats_path: where ranges go, as directory/prefix; made absolute.
        overrides: other keys of QUANT_CONFIG.

    Raises:
        ConfigError: the overrides are not possible.
    """
    content = {
        "method": "HOOKS",
        "mode": "MEASURE",
        "observer": "maxabs",
        "allowlist": {"types": [], "names": []},
        "blocklist": {"types": [], "names": list(family.blocklist)},
        "quantize_weight": False,
        "dump_stats_path": os.path.abspath(dump_stats_path),
        "calibration_sample_interval": 1,
    }
    return parse_quant_config({**content, **overrides}, where=f"measure config of {family.name}")


def quant_config(
    family: Family, dump_stats_path: str | os.PathLike[str], scale_method: str = "maxabs_hw", **overrides: Any
) -> QuantConfig:
    """Return the QUANTIZE config of `family`, the one that serves.

    Per-channel and dynamic methods get `scale_format` CONST where INC would force it;
    dynamic methods also block the module types that INC cannot quantize dynamically.

    Args:
        dump_stats_path: where ranges and scales are, as directory/prefix; made absolute.
        scale_method: a published method, in any case.
        overrides: other keys of QUANT_CONFIG.

    Raises:
        ConfigError: unknown method, or impossible overrides.
    """
    method = get_scale_method(scale_method)
    content: dict[str, Any] = {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": method.name}
    if method.dynamic_only:
        content |= {"scale_format": "CONST", "dynamic_quantization": True}
    elif family.scale_format:
        content["scale_format"] = "CONST" if method.per_channel else family.scale_format
    content |= {
        "allowlist": {"types": [], "names": []},
        "blocklist": {
            "types": list(DYNAMIC_BLOCKED_TYPES if method.dynamic_only else ()),
            "names": list(family.blocklist),
        },
        "dump_stats_path": os.path.abspath(dump_stats_path),
    }
    return parse_quant_config({**content, **overrides}, where=f"quantize config of {family.name}")


def _to_error(errors: tuple[Finding, ...], *, where: object) -> ConfigError:
    """Return the first of `errors` as an exception that counts the others."""
    first, others = errors[0], len(errors) - 1
    what = first.what + (f" (and {others} more: `gaudi-calib config validate` lists all)" if others else "")
    place = f"{os.fspath(where) if isinstance(where, Path) else where}" + (f", key {first.key}" if first.key else "")
    return ConfigError(what, where=place, why=first.why, fix=first.fix)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"key {twice!r} is given twice", why="INC would take the last one", fix="remove one")
    return content


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


def _list_findings(error: ValidationError) -> list[Finding]:
    findings: list[Finding] = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        if location[:1] == ["scale_method"] and location[1:2] in (["table"], ["name"]):
            del location[1]
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, RuleError):
            findings += cause.findings
        else:
            findings.append(_describe(detail, location))
    return findings


def _describe(detail: Any, location: list[str]) -> Finding:
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return _describe_unknown_key(location)
    if detail["type"] == "missing":
        return Finding(key, f"{key} is missing", fix="a scale_method dict needs a default with weight and activation")
    if location[-1] == "[key]":
        return Finding(".".join(location[:-2]), f"{location[-2]!r} is no layer number", fix='use "0", "1", ...')
    problem = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return Finding(key, f"{key} {problem}", why=f"it is {json.dumps(detail['input'], default=str)[:80]}")


def _describe_unknown_key(location: list[str]) -> Finding:
    *parents, key = location
    if not parents and key in _SET_BY_INC:
        return Finding(key, f"{key} is set by INC itself", "a value in the file breaks it", "remove it")
    model = _MODELS.get(parents[-1], MethodEntry) if parents else QuantConfig
    known = [*model.model_fields]
    near = get_close_matches(key.lower(), known, n=1)
    inside = f" in {'.'.join(parents)}" if parents else ""
    return Finding(
        ".".join(location),
        f"unknown key {key!r}{inside}" + (f"; did you mean {near[0]!r}?" if near else ""),
        why="INC ignores keys it does not know",
        fix=f"rename it to {near[0]!r}" if near else "known keys: " + ", ".join(known),
    )
