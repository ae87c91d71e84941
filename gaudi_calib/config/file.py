"""A QUANT_CONFIG file, read and written.

    {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw",
     "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": ["lm_head"]},
     "dump_stats_path": "/data/out/llama/g3/inc_output"}

INC takes unknown keys and several impossible combinations without a word; here they are errors.
"""

import json
from pathlib import Path
from typing import Any

from gaudi_calib.config.check import Inspection, inspect_quant_config, parse_quant_config
from gaudi_calib.config.model import QuantConfig, get_scales_device, to_content
from gaudi_calib.config.rules import warn_of_environment
from gaudi_calib.errors import ConfigError, Finding
from gaudi_calib.files import parse_json, write_json
from gaudi_calib.fp8 import get_device


def read_quant_config(path: Path) -> QuantConfig:
    """Return the config in the file `path`.

    Raises:
        ConfigError: the file cannot be read, is not JSON (names line and column), or is
            not a usable QUANT_CONFIG.
    """
    return parse_quant_config(_load_json(path), where=path)


def validate_file(path: Path, device: str | None = None) -> Inspection:
    """Return every finding about the file `path`, a broken file included.

    Args:
        device: `g2` or `g3`, to check that it can serve with this config, too.
    """
    try:
        inspection = inspect_quant_config(_load_json(path))
        if inspection.config is not None and device is not None:
            get_scales_device(inspection.config, get_device(device))
    except ConfigError as error:
        return Inspection((Finding("", error.what, error.why, error.fix),))
    return inspection


def list_warnings(path: Path) -> list[Finding]:
    """Return what INC or vllm-gaudi silently changes or ignores in the valid file `path`; see `find_warnings`.

    What the environment needs is left out: `serve` sets it.
    """
    inspection = validate_file(path)
    known = set(warn_of_environment(inspection.config)) if inspection.config else set()
    return [finding for finding in inspection.warnings if finding not in known]


def _load_json(path: Path) -> Any:
    """Return the JSON value in `path`; a key given twice is an error.

    Raises:
        ConfigError: missing, unreadable or not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path.name}", where=path, why=error.strerror, fix="give the path of a QUANT_CONFIG file"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path.name} is not valid JSON (line {error.lineno}, column {error.colno})",
            where=path,
            why=error.msg,
            fix="save the file without a byte order mark: INC cannot read it either"
            if "BOM" in error.msg
            else "correct that line; JSON has no comments and no comma before a closing bracket",
        ) from error
    except ConfigError as error:
        raise ConfigError(error.what, where=path, why=error.why, fix=error.fix) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path.name} is not UTF-8 text", where=path, why=str(error), fix="save the file as UTF-8 text"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{path.name} is not valid JSON", where=path, why=str(error), fix="give the path of a QUANT_CONFIG file"
        ) from error


def write_quant_config(path: Path, config: QuantConfig) -> None:
    """Write `config` in the reference's layout and order of keys, atomically.

    Backoffs of `scale_params` are written into a `scale_method` dict, which INC obeys.
    """
    write_json(path, to_content(config))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"key {twice!r} is given twice", why="INC would take the last one", fix="remove one")
    return content
