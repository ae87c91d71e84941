"""What to calibrate, and how: the options of a run, and which of them go together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gaudi_calib.errors import UsageError
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import DEVICES, HP_DTYPES
from gaudi_calib.layout import RunLayout
from gaudi_calib.models.field import PresetName

if TYPE_CHECKING:
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions

# What some fields of `RunOptions` may be.
CHOICES = {
    "engine": ("auto", "torch", "vllm"),
    "dtype": tuple(HP_DTYPES),
    "compute_dtype": ("float32", "bfloat16"),
    "cold_experts": ("fill", "ignore", "error"),
    "preset": get_args(PresetName),
}
# Options that one engine alone obeys, with their flags: fields of `RunOptions` for torch, of `EngineOptions` for vllm.
# (Not `enforce_eager`: the torch engine does what it asks for. Not `batch_size`, `trust_remote_code`: both obey.)
OPTIONS_OF = {
    "torch": {
        "compute_dtype": "--compute-dtype",
        "min_expert_tokens": "--min-expert-tokens",
        "vllm": "--vllm",
    },
    "vllm": {
        "max_new_tokens": "--max-new-tokens",
        "max_model_len": "--max-model-len",
        "gpu_memory_utilization": "--gpu-memory-utilization",
        "executor": "--executor",
        "args": "--engine-arg",
        "env": "--env",
    },
}


@dataclass(frozen=True)
class RunOptions:
    """What to calibrate, and how. Relative paths count from the caller's directory, `~` is a home.

    Attributes:
        model: directory or hub name of the checkpoint.
        out: root of the runs (-o); this run's files go to `out/<model>/`.
        dataset: arguments of `prepare_prompts` beside the model.
        world: ranks that will serve (-t).
        unified_world: a second world to write (-r); divides `world`.
        devices: devices that will serve.
        engine: `auto`, `torch` or `vllm`.
        platform: what measures now, `hpu`, `cuda` or `cpu`.
        engine_options: how the `vllm` engine runs, or None for its defaults.
        batch_size: sequences that run together, at most.
        dtype: what the model is served in; None: as it was measured, else bfloat16.
        expert_parallel: whether ranks hold whole experts (-u); None: as the family is served.
        vllm: version of the vLLM that will serve, or None for a current one.
        cold_experts: what to do with experts that see fewer than `min_expert_tokens` tokens:
            `fill`, `ignore` or `error`.
        compute_dtype: `float32` or `bfloat16`, the arithmetic of the measurement.
        preset: `reference` (what vllm-gaudi's script sets) or `field` (what engineers found for this
            model); None: as the run was made, else `reference`.
        scale_method: a published method, in any case; None for that of the preset, or what
            `quant_config` says.
        measure_config, quant_config: QUANT_CONFIG files in place of the preset's.
        name: of the run's directory in `out`; None to call it as the model.
    """

    model: str
    out: Path
    dataset: Mapping[str, Any] = field(default_factory=dict)
    world: int = 1
    unified_world: int | None = None
    devices: tuple[str, ...] = tuple(DEVICES)
    engine: str = "auto"
    platform: str = "cpu"
    engine_options: "EngineOptions | None" = None
    batch_size: int = 32
    dtype: str | None = None
    compute_dtype: str = "float32"
    expert_parallel: bool | None = None
    vllm: str | None = None
    cold_experts: str = "fill"
    min_expert_tokens: int = 16
    preset: str | None = None
    scale_method: str | None = None
    measure_config: Path | None = None
    quant_config: Path | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", os.path.expanduser(self.model))
        for name in ("out", "measure_config", "quant_config"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, expand_path(getattr(self, name)))

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.out.resolve(), self.model, self.name)

    @property
    def worlds(self) -> tuple[int, ...]:
        return tuple(sorted({self.world, self.unified_world or self.world}))

    def list_ignored(self, engine: str) -> list[str]:
        """Return the flags of options that `engine` ignores and that are not as they are by default."""
        from gaudi_calib.engines.vllm_runner.phases import EngineOptions

        (other,) = OPTIONS_OF.keys() - {engine}
        given, defaults = (self, RunOptions("", Path())) if other == "torch" else (self.engine_options, EngineOptions())
        flags = OPTIONS_OF[other].items() if given is not None else ()
        return [flag for name, flag in flags if getattr(given, name) != getattr(defaults, name)]


def check_options(options: RunOptions) -> None:
    """Raise UsageError where options contradict each other or name something unknown."""
    from gaudi_calib.data.mixture import parse_datasets
    from gaudi_calib.ranges.derive import parse_vllm_version

    for name, choices in CHOICES.items():
        if getattr(options, name) not in (*choices, getattr(RunOptions, name)):
            raise UsageError(f"unknown {name} {getattr(options, name)!r}", fix=f"choose one of {', '.join(choices)}")
    if options.name is not None and (options.name in ("", "..") or Path(options.name).name != options.name):
        raise UsageError(
            f"--name {options.name!r} is no name of a directory", fix="give a name without /; -o is where it goes"
        )
    if options.world < 1 or options.world % (options.unified_world or 1):
        raise UsageError(
            f"cannot unify {options.world} ranks into {options.unified_world}",
            why="-r must divide -t",
            fix="choose a divisor of -t for -r",
        )
    parse_vllm_version(options.vllm)
    if "dataset" in options.dataset:
        parse_datasets(options.dataset["dataset"])
    if options.scale_method and options.quant_config:
        raise UsageError("--scale-method and --config-quant both name the scale method", fix="give one of them")
