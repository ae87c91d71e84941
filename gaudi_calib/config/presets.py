"""The configs of a family: as the reference's calibrate_model.sh writes them, or with what the field found."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from gaudi_calib.config.check import parse_quant_config
from gaudi_calib.config.methods import DEFAULT_METHOD, SCALE_METHODS, get_scale_method
from gaudi_calib.config.model import QuantConfig, to_content
from gaudi_calib.errors import Finding, UsageError
from gaudi_calib.layout import RunLayout
from gaudi_calib.models.families import FAMILIES, Family
from gaudi_calib.models.field import COMMON_ROW, FIELD_ROWS, find_row, serve_as_field
from gaudi_calib.models.source import open_model

# What the reference's templates of dynamic methods leave in BF16, all of attention; INC could quantize it, too.
DYNAMIC_BLOCKED_TYPES = ("Matmul", "B2BMatmul", "KVCache", "VLLMKVCache")


class Preset(NamedTuple):
    """How a model is measured and served where nobody asks for something else.

    Attributes:
        name: `reference` or `field`.
        family: with these settings.
        env: environment of the engine phases and of serving beside the family's.
        replaces: the configs in place are another preset's.
    """

    name: str
    family: Family
    env: Mapping[str, str]
    replaces: bool = False


def apply_preset(name: str, family: Family, model_config: Mapping[str, Any]) -> Preset:
    """Return the preset called `name` for the model of a family with this config.json."""
    if name == "reference":
        return Preset(name, family, {})
    row = find_row(model_config)
    return Preset(name, serve_as_field(family, row), (row or COMMON_ROW).env)


def find_failure(model_config: Mapping[str, Any], config: QuantConfig) -> Finding | None:
    """Return what is known to go wrong with a model whose KV cache `config` quantizes; None where nothing is.

    Args:
        model_config: config.json.
        config: the QUANTIZE config that serves it.
    """
    row = find_row(model_config)
    if row is None or row.failure is None or not config.quantizes_caches():
        return None
    return Finding(
        "blocklist",
        f"{row.models}: {row.failure}",
        f"reported of such models with these settings: {', '.join(row.sources)}",
        "--preset field takes those that engineers found for them",
        "attention-fails",
    )


def measure_config(family: Family, dump_stats_path: str | os.PathLike[str], **overrides: Any) -> QuantConfig:
    """Return the MEASURE config of `family`.

    Args:
        dump_stats_path: where ranges go, as directory/prefix; made absolute.
        overrides: other keys of QUANT_CONFIG.

    Raises:
        ConfigError: the overrides are not possible.
    """
    blocked = family.blocklist if family.measure_blocklist is None else family.measure_blocklist
    content = {
        "method": "HOOKS",
        "mode": "MEASURE",
        "observer": "maxabs",
        "allowlist": {"types": [], "names": []},
        "blocklist": {"types": [], "names": list(blocked)},
        "quantize_weight": False,
        "dump_stats_path": os.path.abspath(dump_stats_path),
        "calibration_sample_interval": 1,
    }
    return parse_quant_config({**content, **overrides}, where=f"measure config of {family.name}")


def quant_config(
    family: Family, dump_stats_path: str | os.PathLike[str], scale_method: str | None = None, **overrides: Any
) -> QuantConfig:
    """Return the QUANTIZE config of `family`, the one that serves.

    Per-channel and dynamic methods get `scale_format` CONST where INC would force it;
    dynamic methods also block attention, as the reference does.

    Args:
        dump_stats_path: where ranges and scales are, as directory/prefix; made absolute.
        scale_method: a published method, in any case; None: the family's, else the default.
        overrides: other keys of QUANT_CONFIG.

    Raises:
        ConfigError: unknown method, or impossible overrides.
    """
    method = get_scale_method(scale_method or family.scale_method or DEFAULT_METHOD)
    content: dict[str, Any] = {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": method.name}
    if method.is_dynamic_only:
        content |= {"scale_format": "CONST", "dynamic_quantization": True}
    elif family.scale_format:
        content["scale_format"] = "CONST" if method.is_per_channel else family.scale_format
    dynamic = DYNAMIC_BLOCKED_TYPES if method.is_dynamic_only else ()
    content |= {
        "allowlist": {"types": [], "names": []},
        "blocklist": {
            "types": list(dict.fromkeys((*dynamic, *family.blocked_types))),
            "names": list(family.blocklist),
        },
        "dump_stats_path": os.path.abspath(dump_stats_path),
    }
    return parse_quant_config({**content, **overrides}, where=f"quantize config of {family.name}")


def change_method(config: QuantConfig, family: Family, scale_method: str) -> QuantConfig:
    """Return a QUANTIZE config with another scale method; all else stays that does not follow from the old one.

    Raises:
        ConfigError: unknown method, or one that the other keys do not allow.
    """
    path, old = config.dump_stats_path, config.method_table.file_tag
    before, after = (to_content(quant_config(family, path, name)) for name in (old, scale_method))
    content = to_content(config)
    for key in ("scale_format", "dynamic_quantization"):
        if content.get(key) == before.get(key):
            content[key] = after.get(key)
    lists = content.get("blocklist", {"types": [], "names": []})
    if lists["types"] == before["blocklist"]["types"]:
        content["blocklist"] = {**lists, "types": after["blocklist"]["types"]}
    kept = {key: value for key, value in content.items() if value is not None}
    return parse_quant_config({**kept, "scale_method": after["scale_method"]}, where=f"--scale-method {scale_method}")


def plan_configs(
    family: Family, layout: RunLayout, devices: Iterable[str], scale_method: str | None = None
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


def choose_preset(name: str, model: Path | None, family: str | None) -> Preset:
    """Return the preset called `name` of a model directory or, as far as it goes by families, of a family.

    Raises:
        UsageError: `field` without a model, or as `choose_family`. ModelError: as `choose_family`.
    """
    found = choose_family(model, family)
    if name == "field" and model is None:
        raise UsageError(
            "--preset field goes by models, not by families",
            why="what the field sets follows from facts of config.json",
            fix="give a model directory (-m) instead; `config presets` lists what there is",
        )
    return apply_preset(name, found, open_model(model).text_config if model else {})


def describe_presets() -> dict[str, list[dict[str, Any]]]:
    """Return the families, the rows of the field and the scale methods as JSON values."""
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
    rows = [asdict(row) for row in (*FIELD_ROWS, COMMON_ROW)]
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
    return {"families": families, "field": rows, "scale_methods": methods}
