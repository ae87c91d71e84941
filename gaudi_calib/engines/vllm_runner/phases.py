"""The phases of a calibration as values: what each engine is started with, and what it is asked for.

platform   phases              who measures, who computes scales
hpu        measure, quantize   INC, reading QUANT_CONFIG
others     measure             our plugin, reading QUANT_CONFIG; `gaudi_calib.scales`
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gaudi_calib.config.model import QuantConfig
from gaudi_calib.engines import WORKER_EXTENSION
from gaudi_calib.engines.vllm_runner.settings import (
    NODE_CARDS,
    Deployment,
    Settings,
    bind_cpus,
    forward_to_ray,
    plan_settings,
)
from gaudi_calib.errors import UsageError

PhaseName = Literal["measure", "quantize"]
Saving = Literal["ask", "shutdown", "none"]

# Generated after every prompt, so that decoding is measured.
LEAST_NEW_TOKENS = 1

# A worker writes its ranges while it shuts down; vLLM kills those that take longer.
_SHUTDOWN_S = "1800"

# Prompt and new tokens that prove that the quantized model runs.
_PROOF_PROMPT, _PROOF_NEW = 16, 4
_PROOF_LENGTH = 128
# `max_model_len` is a multiple of it, where prompts decide.
_LENGTH_STEP = 128


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM runs; what is None is left to the family, then to vLLM.

    Attributes:
        batch_size: sequences that run together, at most.
        max_new_tokens: tokens generated per prompt, so that decoding is measured, too.
        enforce_eager: without graphs. Our plugin always runs so.
        max_model_len: tokens of a sequence, at most; None: what the prompts need.
        gpu_memory_utilization: part of the device's memory that vLLM may take.
        executor: `mp` on one node, `ray` on several; None chooses by the number of ranks.
        trust_remote_code: run code that comes with the checkpoint.
        args: further engine arguments of vLLM by their Python name; they win.
        env: further environment; it wins.
    """

    batch_size: int = 32
    max_new_tokens: int = 16
    enforce_eager: bool = False
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    executor: str | None = None
    trust_remote_code: bool = False
    args: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """One engine from start to shutdown.

    Attributes:
        name: `measure` or `quantize`.
        model: directory or hub name of the checkpoint.
        settings: engine arguments and environment.
        prompts: token ids.
        max_new_tokens: for each prompt.
        batch_size: prompts per call.
        saving: `ask` the ranks for their files (our plugin), they write them at `shutdown` (INC), or `none`.
    """

    name: PhaseName
    model: str
    settings: Settings
    prompts: Sequence[Sequence[int]]
    max_new_tokens: Sequence[int]
    batch_size: int
    saving: Saving


def choose_executor(asked: object, world: int, platform: str) -> object:
    """Return the executor for `world` ranks: the one `asked` for, if any.

    Raises:
        UsageError: one node cannot hold the ranks, or vLLM has no Ray on this platform.
    """
    chosen = asked or ("ray" if platform == "hpu" and world > NODE_CARDS else "mp")
    if chosen == "mp" and platform == "hpu" and world > NODE_CARDS:
        raise UsageError(
            f"--executor mp cannot run {world} ranks",
            why=f"it runs on one node, which has {NODE_CARDS} cards",
            fix="leave it out, or give --executor ray and start a Ray cluster",
        )
    if chosen == "ray" and platform == "cpu":
        raise UsageError(
            "--executor ray does not run on CPU",
            why="vLLM's CPU platform names no Ray resource for its ranks, and vLLM refuses: "
            "'current platform cpu does not support ray.'",
            fix="leave it out; ranks then are processes of this machine",
        )
    return chosen


def get_asked_length(options: EngineOptions, facts: Mapping[str, object]) -> int | None:
    """Return the tokens of a sequence that are asked for, or that the family's engine arguments `facts` name."""
    given = options.max_model_len or facts.get("max_model_len")
    return given if isinstance(given, int) else None


def plan_phase(
    name: PhaseName,
    platform: str,
    config: QuantConfig,
    quant_config: Path,
    deployed: Deployment,
    prompts: Sequence[Sequence[int]],
    options: EngineOptions,
) -> Phase:
    """Return the phase called `name`.

    Args:
        platform: what runs now.
        quant_config: file of `config`, on a disk that all nodes see.
        prompts: token ids of the calibration data, with room for `LEAST_NEW_TOKENS` after each.

    Raises:
        UsageError: see `choose_executor`.
    """
    if "QUANT_CONFIG" in options.env:
        raise UsageError(
            "--env QUANT_CONFIG", why="each phase has its own", fix="use --config-measure and --config-quant"
        )
    family = deployed.family
    if name == "quantize":
        prompts, new = [list(prompts[0][:_PROOF_PROMPT])], min(_PROOF_NEW, options.max_new_tokens)
        facts, default = family.quantize_args if family else {}, _PROOF_LENGTH
    else:
        new, facts = options.max_new_tokens, family.measure_args if family else {}
        default = -(-(max(map(len, prompts)) + new) // _LENGTH_STEP) * _LENGTH_STEP
    limit = get_asked_length(options, facts) or min(default, deployed.context or default)
    settings = plan_settings(platform, config, quant_config, deployed).with_args(
        max_model_len=limit,
        max_num_seqs=options.batch_size,
        enforce_eager=options.enforce_eager or platform != "hpu",
        distributed_executor_backend=choose_executor(
            options.args.get("distributed_executor_backend") or options.executor, deployed.world, platform
        ),
        gpu_memory_utilization=options.gpu_memory_utilization or facts.get("gpu_memory_utilization"),
        trust_remote_code=options.trust_remote_code or None,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        worker_extension_cls=None if platform == "hpu" else WORKER_EXTENSION,
    )
    settings = settings.with_env(_plan_environment(platform, deployed.world)).with_args(**options.args)
    settings = settings.with_env(options.env)
    if settings.args["distributed_executor_backend"] == "ray":
        settings = forward_to_ray(settings)
    return Phase(
        name,
        deployed.model,
        settings,
        prompts,
        [max(LEAST_NEW_TOKENS, min(new, limit - len(ids))) for ids in prompts],
        options.batch_size,
        "none" if name == "quantize" else "shutdown" if platform == "hpu" else "ask",
    )


def _plan_environment(platform: str, world: int) -> dict[str, str]:
    if platform == "hpu":
        return {
            "VLLM_SKIP_WARMUP": "true",
            "PT_HPU_WEIGHT_SHARING": "0",
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": _SHUTDOWN_S,
            # The engine in this process, so that its executor can be shut down and waited for.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return bind_cpus(world, os.environ) if platform == "cpu" else {}
