"""Which configs a run uses, and how they are written: a QUANT_CONFIG in place belongs to the user.

The one that is asked for wins, then the one in place, then that of the preset. `--preset` asks for its
configs where the run was made with another preset. `--scale-method` changes the method and what follows
from it, and leaves all else. What is replaced moves to `replaced/`.

A `--config-quant` that lies in the run directory is not copied over `maxabs_quant_<device>.json`: it is a
QUANT_CONFIG of its own beside it, of the device whose directory it names.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.config.file import read_quant_config, write_quant_config
from gaudi_calib.config.model import QuantConfig, describe_dtype, to_content, with_dump_stats_path
from gaudi_calib.config.presets import (
    Preset,
    apply_preset,
    change_method,
    find_failure,
    measure_config,
    quant_config,
)
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, UsageError
from gaudi_calib.files import write_bytes
from gaudi_calib.fp8 import DEVICES, HP_DTYPES
from gaudi_calib.layout import DeviceLayout
from gaudi_calib.manifest import PresetFacts
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.staging import REPLACED_NAME

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan

_log = logging.getLogger(__name__)

# Of INC's observers, why they give no ranges.
_WHY_NOT = {
    "shape": "it notes the shapes of tensors, no ranges",
    "maxabs_per_channel": "INC needs the shapes that a run with mode SHAPE left in the same place, and computes scales "
    "from one range per tensor; the torch engine keeps ranges per channel with observer maxabs, too",
    "save": "INC since 3.5 stops at the first module (NameError in `save_module`), and without a Gaudi vLLM saves none",
}


def find_side_config(options: RunOptions) -> Path | None:
    """Return the QUANTIZE config that is asked for where it lies in the run directory, else None."""
    path = options.quant_config and options.quant_config.resolve()
    return path if path and path.parent == options.layout.root.resolve() else None


def choose_devices(options: RunOptions, *, fresh: bool) -> tuple[str, ...]:
    """Return the devices that are meant: of a config in the run its own; of a finished run those it has.

    Raises:
        UsageError: the config is of a device that is not asked for.
    """
    path = find_side_config(options)
    device = CalibrationDir.named_by(read_quant_config(path), path).device if path else None
    if device is not None and device.name not in options.devices:
        raise UsageError(
            f"{path} is for {device.name}, and {', '.join(options.devices)} is asked for",
            fix=f"leave --device out, or give --device {device.name}",
        )
    if device is not None:
        return (device.name,)
    if fresh or options.devices != tuple(DEVICES):
        return options.devices
    there = (name for name in DEVICES if CalibrationDir(options.layout.device(name).directory).files)
    return tuple(there) or options.devices


def choose_dtype(options: RunOptions, *, fresh: bool) -> str:
    """Return what the model is served in: as asked for, else as the run was measured or its config says.

    Raises:
        UsageError: another is asked for than was measured.
    """
    places = [CalibrationDir(options.layout.device(name).directory) for name in options.devices]
    if fresh:
        in_place = (place.quant_config for place in places if not options.quant_config)
        return options.dtype or next((config.dtype for config in in_place if config), "bfloat16")
    known = (place for place in places if place.origin and place.origin.dtype)
    place, asked = next(known, None), options.dtype
    measured = place.origin.dtype if place and place.origin else None
    if place and measured and asked and measured != asked:
        raise UsageError(
            f"--dtype {asked}, and the ranges were measured for {measured}",
            where=options.layout.root,
            why="weights were rounded to it before they were measured",
            fix="leave --dtype out; or calibrate for it: "
            f"{place.advise(options.model).calibrate(options.world, '--dtype', asked)}",
        )
    return measured or asked or "bfloat16"


def _find_preset(layout: DeviceLayout, *, fresh: bool) -> str:
    """Return the name of the preset that the run in place was made with; where nothing tells, `reference`."""
    with suppress(FileError):  # what cannot be read is replaced, or refused elsewhere
        place = CalibrationDir(layout.directory)
        made = place.manifest if fresh else place.origin
        return made.preset.name if made else PresetFacts().name
    return PresetFacts().name


def choose_preset(options: RunOptions, layout: DeviceLayout, plan: "ModelPlan", *, fresh: bool) -> Preset:
    """Return the preset of a device: the one asked for, else that of the run in place."""
    made_with = _find_preset(layout, fresh=fresh)
    preset = apply_preset(options.preset or made_with, plan.family, plan.checkpoint.source.text_config)
    return preset._replace(replaces=preset.name != made_with)


def _settle_dtype(config: QuantConfig, dtype: str, path: Path, given: Path | None) -> QuantConfig:
    """Return the config in `path` for a model that is served in `dtype`; one that is `given` says so itself.

    Raises:
        ConfigError: it is for another.
    """
    if config.dtype == dtype:
        return config
    if given is None:
        told = f"hp_dtype of {path} becomes {HP_DTYPES[dtype]}"
        _log.warning("%s, as the model is served in %s; it was %s", told, dtype, config.hp_dtype)
        return config.model_copy(update={"hp_dtype": HP_DTYPES[dtype]})
    raise ConfigError(
        f"hp_dtype is {config.hp_dtype}, and the model is served in {dtype}",
        where=given,
        why="INC converts to and from hp_dtype; it is to be the type of the model (--dtype)",
        fix=f"make it hp_dtype {HP_DTYPES[dtype]} in the file, or measure with --dtype {config.dtype}",
    )


def choose_measure_config(
    options: RunOptions, layout: DeviceLayout, preset: Preset, dtype: str, *, fresh: bool
) -> QuantConfig:
    """Return the MEASURE config of a device.

    Args:
        dtype: what the model is served in.
        fresh: the run measures; otherwise the config that was measured with counts where there is no file.

    Raises:
        ConfigError: the file is invalid, or no config to measure with.
    """
    path = options.measure_config or layout.measure_config
    config: QuantConfig | None = None
    if path.is_file() and (options.measure_config or not (fresh and preset.replaces)):
        config = read_quant_config(path)
    elif not fresh:
        config = CalibrationDir(layout.directory).measure_config
    if config is None:
        return measure_config(preset.family, layout.dump_stats_path, **describe_dtype(dtype))
    if config.mode != "MEASURE":
        raise ConfigError(
            "not usable as a MEASURE config here", where=path, why=f"mode is {config.mode}", fix="set mode to MEASURE"
        )
    return with_dump_stats_path(_settle_dtype(config, dtype, path, options.measure_config), layout.dump_stats_path)


def require_observable(config: QuantConfig, options: RunOptions, path: Path, *, scales: bool) -> None:
    """Raise ConfigError where the engine that measures does not observe what `config`, of the file `path`, asks for.

    Args:
        scales: are to be computed, which needs ranges.
    """
    off_gaudi = options.engine == "vllm" and options.platform != "hpu"
    if config.observer == "save" and options.engine == "torch":
        if scales:
            raise ConfigError(
                "observer save leaves tensors, and no ranges to compute scales from",
                where=path,
                fix="use observer maxabs; or save tensors, which `measure` alone does",
            )
    elif config.observer != "maxabs":
        raise ConfigError(
            f"observer {config.observer} is not possible here",
            where=path,
            why=_WHY_NOT[config.observer],
            fix="use observer maxabs" + (", or --engine torch" if config.observer == "save" else ""),
        )
    elif config.measures_outputs and off_gaudi:
        raise ConfigError(
            f"measure_exclude {config.measure_exclude} is not possible here",
            where=path,
            why="without a Gaudi, vLLM measures only the outputs that scales are computed from",
            fix="leave measure_exclude out, or give --engine torch",
        )


def choose_quant_config(options: RunOptions, layout: DeviceLayout, preset: Preset, dtype: str) -> QuantConfig:
    """Return the QUANTIZE config of a device.

    Raises:
        ConfigError: the file is invalid or does not serve, or does not go with the method asked for.
    """
    path, method = options.quant_config or layout.quant_config, options.scale_method
    if not path.is_file() or (preset.replaces and not options.quant_config):
        return quant_config(preset.family, layout.dump_stats_path, method, **describe_dtype(dtype))
    config = with_dump_stats_path(require_quantizing(read_quant_config(path), path), layout.dump_stats_path)
    config = _settle_dtype(config, dtype, path, options.quant_config)
    return change_method(config, preset.family, method) if method else config


def describe_failure(preset: Preset, plan: "ModelPlan", config: QuantConfig) -> str | None:
    """Return what is known to go wrong with the QUANTIZE config of the reference's preset, None where nothing is."""
    found = find_failure(plan.checkpoint.source.text_config, config) if preset.name == "reference" else None
    return f"{found.what} ({found.why}); {found.fix}" if found else None


def require_quantizing(config: QuantConfig, path: Path | None) -> QuantConfig:
    """Return `config`, of the file `path`, whose scales can be computed.

    Raises:
        ConfigError: it measures, or quantizes to another FP8.
    """
    if config.mode != "QUANTIZE" or config.fp8_config != "E4M3":
        raise ConfigError(
            "not usable as a QUANTIZE config here",
            where=path,
            why=f"mode is {config.mode}, fp8_config {config.fp8_config}",
            fix="set mode to QUANTIZE, and fp8_config to E4M3, for which scales are computed",
        )
    return config


def require_blocked(config: QuantConfig, plan: "ModelPlan", path: Path) -> None:
    """Raise ConfigError where `config`, of the file `path`, leaves a module to be measured that no engine measures."""
    free = [name for name in plan.unmeasured if not config.is_blocked(name)]
    if free and config.uses_stats_files:
        raise ConfigError(
            f"{free[0]} cannot be measured (nor {len(free) - 1} more)",
            where=f"blocklist of {path}",
            why="no engine measures such layers, and serving fails where one that is not blocked has no ranges",
            fix="add " + ", ".join(repr(name) for name in plan.family.blocklist) + " to the blocklist's names",
        )


def stage_config(staging: Path, path: Path, config: QuantConfig) -> None:
    """Write `config` to the staging directory for `path`, and beside it, in `replaced/`, what is at `path` now.

    A file that says the same already is left as it is.
    """
    if path.is_file():
        with suppress(ConfigError):  # one that cannot be read is replaced, too
            if to_content(read_quant_config(path)) == to_content(config):
                return
        write_bytes(staging / REPLACED_NAME / path.name, path.read_bytes())
    write_quant_config(staging / path.name, config)
