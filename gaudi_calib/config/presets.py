"""QUANT_CONFIG: the JSON file that tells INC what to measure or quantize.

    {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw",
     "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": ["lm_head"]},
     "dump_stats_path": "/data/out/llama/g3/inc_output"}

INC takes unknown keys and several impossible combinations without a word; here they
are errors. Names in the lists are regular expressions (`re.search`), types are class
names. The attributes are in config_model.py, the rules in config_rules.py, the scale
methods in config_methods.py and their dict form in config_method_form.py.
"""

import json
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gaudi_calib.config.check import Inspection, inspect_quant_config, parse_quant_config, parse_scale_method
from gaudi_calib.config.methods import SCALE_METHODS, get_scale_method
from gaudi_calib.config.model import (
    QuantConfig,
    convert_backoffs,
    describe_scaling,
    describe_schema,
    find_idle_patterns,
    get_scales_device,
    match_patterns,
    to_content,
    with_dump_stats_path,
)
from gaudi_calib.errors import ConfigError, Finding, UsageError
from gaudi_calib.files import write_json
from gaudi_calib.fp8 import get_device
from gaudi_calib.layout import RunLayout
from gaudi_calib.models.families import FAMILIES, Family
from gaudi_calib.models.source import open_model

__all__ = [
    "DYNAMIC_BLOCKED_TYPES",
    "Finding",
    "Inspection",
    "QuantConfig",
    "choose_family",
    "convert_backoffs",
    "describe_presets",
    "describe_scaling",
    "describe_schema",
    "find_idle_patterns",
    "get_scales_device",
    "inspect_quant_config",
    "load_json",
    "match_patterns",
    "measure_config",
    "parse_quant_config",
    "parse_scale_method",
    "plan_configs",
    "quant_config",
    "read_quant_config",
    "to_content",
    "validate_file",
    "with_dump_stats_path",
    "write_quant_config",
]

# Module types that INC cannot quantize dynamically.
DYNAMIC_BLOCKED_TYPES = ("Matmul", "B2BMatmul", "KVCache", "VLLMKVCache")


def read_quant_config(path: Path) -> QuantConfig:
    """Return the config in the file `path`.

    Raises:
        ConfigError: the file cannot be read, is not JSON (names line and column), or is
            not a usable QUANT_CONFIG.
    """
    return parse_quant_config(load_json(path), where=path)


def validate_file(path: Path, device: str | None = None) -> Inspection:
    """Return every finding about the file `path`, a broken file included.

    Args:
        device: `g2` or `g3`, to check that it can serve with this config, too.
    """
    try:
        inspection = inspect_quant_config(load_json(path))
        if inspection.config is not None and device is not None:
            get_scales_device(inspection.config, get_device(device))
    except ConfigError as error:
        return Inspection(None, (Finding("", error.what, error.why, error.fix),))
    return inspection


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
            f"{path.name} is not valid JSON (line {error.lineno}, column {error.colno})",
            where=path,
            why=error.msg,
            fix="correct that line; JSON has no comments and no comma before a closing bracket",
        ) from error
    except ConfigError as error:
        raise ConfigError(error.what, where=path, why=error.why, fix=error.fix) from None
    except ValueError as error:
        raise ConfigError(
            f"{path.name} is not UTF-8 text", where=path, why=str(error), fix="save the file as UTF-8 text"
        ) from error


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
    if method.is_dynamic_only:
        content |= {"scale_format": "CONST", "dynamic_quantization": True}
    elif family.scale_format:
        content["scale_format"] = "CONST" if method.is_per_channel else family.scale_format
    content |= {
        "allowlist": {"types": [], "names": []},
        "blocklist": {
            "types": list(DYNAMIC_BLOCKED_TYPES if method.is_dynamic_only else ()),
            "names": list(family.blocklist),
        },
        "dump_stats_path": os.path.abspath(dump_stats_path),
    }
    return parse_quant_config({**content, **overrides}, where=f"quantize config of {family.name}")


def plan_configs(
    family: Family, layout: RunLayout, devices: Iterable[str], scale_method: str = "maxabs_hw"
) -> dict[Path, QuantConfig]:
    """Return the config files of a run by path; a method that needs no ranges has no MEASURE config.

    Raises:
        ConfigError: unknown scale method.
    """
    configs = {}
    for name in devices:
        paths = layout.device(name)
        serving = quant_config(family, paths.dump_stats_path, scale_method)
        if serving.uses_stats_files:
            configs[paths.measure_config] = measure_config(family, paths.dump_stats_path)
        configs[paths.quant_config] = serving
    return configs


def choose_family(model: Path | None, name: str | None) -> Family:
    """Return the family called `name`, or that of the model directory `model`.

    Raises:
        UsageError: not exactly one of them is given, or there is no such family.
        ModelError: no config.json, or a family nobody described yet.
    """
    if (model is None) == (name is None):
        raise UsageError("give either a model directory or a family", fix="use -m DIR or --family NAME")
    if model is not None:
        return open_model(model).require_family()
    for family in FAMILIES:
        if family.name == name:
            return family
    known = [family.name for family in FAMILIES]
    near = get_close_matches(str(name), known, n=1)
    raise UsageError(
        f"unknown family {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        fix="choose one of " + ", ".join(known),
    )


def describe_presets() -> dict[str, list[dict[str, Any]]]:
    """Return the families and the scale methods as JSON values."""
    families = [
        {
            "name": family.name,
            "model_types": list(family.model_types),
            "blocklist": list(family.blocklist),
            "scale_format": family.scale_format,
            "env": dict(family.env),
            "measure_args": dict(family.measure_args),
            "quantize_args": dict(family.quantize_args),
            "expert_parallel": family.expert_parallel,
        }
        for family in FAMILIES
    ]
    methods = [
        {
            "name": method.name.lower(),
            "weight": method.weight.to_fields(),
            "activation": method.activation.to_fields(),
            "per_channel": method.is_per_channel,
            "needs_ranges": method.needs_measurement,
            "dynamic": method.is_dynamic_only,
        }
        for method in SCALE_METHODS.values()
    ]
    return {"families": families, "scale_methods": methods}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"key {twice!r} is given twice", why="INC would take the last one", fix="remove one")
    return content
