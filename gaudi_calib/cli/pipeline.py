"""From the arguments of a command to the value its Python call takes, and how results are printed."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gaudi_calib.fp8 import DEVICES

if TYPE_CHECKING:
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions
    from gaudi_calib.runs.conversion import Conversion
    from gaudi_calib.runs.options import RunOptions
    from gaudi_calib.runs.quantize import Quantized
    from gaudi_calib.runs.run import RunResult

_log = logging.getLogger(__name__)

_DATASET_ARGUMENTS = (
    "dataset",
    "limit",
    "seed",
    "min_tokens",
    "max_tokens",
    "columns",
    "skip_bad_rows",
    "chat_template",
    "trust_remote_code",
)
_ENGINE_ARGUMENTS = ("enforce_eager", "max_new_tokens", "max_model_len", "gpu_memory_utilization", "executor", "env")


def make_run_options(arguments: dict[str, Any]) -> "RunOptions":
    """Turn the arguments of a command into `RunOptions`."""
    from gaudi_calib.runs.options import RunOptions

    given = dict(arguments)
    dataset = {name: given.pop(name) for name in _DATASET_ARGUMENTS if name in given}
    device = given.pop("device")
    if "engine_args" in given:
        given["engine_options"] = _make_engine_options(given)
    return RunOptions(dataset=dataset, devices=tuple(DEVICES) if device == "all" else (device,), **given)


def _make_engine_options(given: dict[str, Any]) -> "EngineOptions":
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions

    args = {name.replace("-", "_"): value for name, value in given.pop("engine_args").items()}
    return EngineOptions(**{name: given.pop(name) for name in _ENGINE_ARGUMENTS}, args=args)


def make_conversion(arguments: dict[str, Any]) -> "Conversion":
    """Turn the arguments of `conversion_options` into a value."""
    # NumPy's BLAS is not used, and its waiting threads take a tenth of a short command's time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from gaudi_calib.runs.conversion import Conversion

    return Conversion(**arguments)


def print_paths(paths: Iterable[Path], *, as_json: bool = False) -> None:
    """Print what was, or would be, written: a path a line, or as `files` of a JSON object."""
    if as_json:
        click.echo(json.dumps({"files": list(map(str, paths))}, indent=2))
        return
    for path in paths:
        click.echo(path)


def print_quantized(result: "Quantized", *, as_json: bool) -> None:
    """Print what `quantize DIR` wrote, and on stderr what uses it."""
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2, default=str))
        return
    print_paths(result.files)
    if result.quant_config:
        _log.info("QUANT_CONFIG is %s", result.quant_config)


def print_result(result: "RunResult", options: "RunOptions", *, as_json: bool) -> None:
    """Print what a run wrote, and how to serve it."""
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2, default=str))
        return
    from gaudi_calib.serve.command import ServeOptions, plan_on_gaudi

    click.echo(f"{len(result.files)} files in {result.root}")
    for device, path in result.quant_configs.items():
        for world in result.worlds or (options.world,):
            click.echo(f"\nOn Gaudi {device[1]}, {world} card{'s' * (world > 1)}:")
            click.echo(str(plan_on_gaudi(ServeOptions(options.model, path, world, device))))
    if result.quant_configs:
        click.echo("\nThe configs name this place. If the run moves, run `gaudi-calib relocate DIR` where it is then.")
