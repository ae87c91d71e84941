"""What vLLM must be told to use a QUANT_CONFIG: engine arguments and environment, by platform.

On a Gaudi, INC inside vllm-gaudi reads QUANT_CONFIG. Elsewhere our plugin does, which computes
what that Gaudi would.
"""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gaudi_calib.config.model import QuantConfig
from gaudi_calib.engines import QUANTIZATION
from gaudi_calib.models.families import Family
from gaudi_calib.ranges.node import Op, find_op_by_name

# Cards of one Gaudi node; more ranks need Ray.
NODE_CARDS = 8

# vLLM copies variables with its own prefixes to Ray's workers, and those that this one names.
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
_RAY_PREFIXES = ("VLLM_", "HF_", "NCCL_")


@dataclass(frozen=True)
class Settings:
    """How one vLLM engine is started.

    Attributes:
        args: engine arguments by their Python name.
        env: environment beside the caller's; values win over the caller's.
    """

    args: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def with_args(self, **args: object) -> "Settings":
        """Return a copy with further engine arguments; None leaves one as it is."""
        return Settings({**self.args, **{name: value for name, value in args.items() if value is not None}}, self.env)

    def with_env(self, env: Mapping[str, str]) -> "Settings":
        """Return a copy with further environment variables."""
        return Settings(self.args, {**self.env, **env})

    @property
    def flags(self) -> list[str]:
        """The engine arguments as words of `vllm serve`.

        >>> Settings({"quantization": "inc", "enable_expert_parallel": True, "enforce_eager": False}).flags
        ['--quantization', 'inc', '--enable-expert-parallel']
        """
        words = []
        for name, value in self.args.items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [] if value is False else [flag, str(value)]
        return words


@dataclass(frozen=True)
class Deployment:
    """A model, and how its ranks share it.

    Attributes:
        model: directory or hub name of the checkpoint.
        world, expert_parallel: ranks, and whether they hold whole experts.
        family: the model's, for what it needs; None where nobody described it.
        quantization: `quantization_config` of the checkpoint, where it has one. It keeps that
            method then, and on a Gaudi QUANT_CONFIG alone turns INC on.
        modules: nodes of the model, or those that `_mod_list.json` lists; where no cache among them is
            quantized, they stay in BF16. Nothing where they are not known.
        context: tokens of a sequence the model can take, None where it does not say.
        env: environment that the checkpoint needs on a Gaudi.
    """

    model: str
    world: int
    family: Family | None
    expert_parallel: bool = False
    quantization: Mapping[str, object] | None = None
    modules: Sequence[str] = ()
    context: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def plan_settings(platform: str, config: QuantConfig, quant_config: Path, deployed: Deployment) -> Settings:
    """Return how to start vLLM so that the ranks obey `config`.

    Args:
        platform: what runs now, `hpu`, `cuda` or `cpu`.
        quant_config: file of `config`; QUANT_CONFIG is set to it.
    """
    env = {"QUANT_CONFIG": str(quant_config.resolve())}
    shared: dict[str, object] = {"dtype": config.dtype, "tensor_parallel_size": deployed.world}
    if deployed.expert_parallel and deployed.world > 1:
        shared["enable_expert_parallel"] = True
    if platform != "hpu":
        return Settings({"quantization": QUANTIZATION, "enforce_eager": True, **shared}, env)
    args: dict[str, object] = {} if deployed.quantization else {"quantization": "inc"}
    if deployed.quantization and deployed.quantization.get("weight_block_size"):
        env["VLLM_HPU_FORCE_CHANNEL_FP8"] = "0"
    caches = _list_caches(deployed.modules)
    if config.mode != "MEASURE" and config.quantizes_caches(caches):
        args["kv_cache_dtype"] = "fp8_inc"
    if deployed.world > 1:
        env["PT_HPU_ENABLE_LAZY_COLLECTIVES"] = "true"
    family_env = deployed.family.env if deployed.family else {}
    return Settings({**args, **shared}, {**env, **family_env, **deployed.env, **config.list_required_env(caches)})


def _list_caches(modules: Sequence[str]) -> list[str] | None:
    """Return the KV caches among `modules`; None where no module is known."""
    return [name for name in modules if find_op_by_name(name) is Op.KV_CACHE] if modules else None


def bind_cpus(world: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that lets `world` ranks share this machine's cores; the caller's settings win.

    vLLM reserves all of the memory for the KV cache, and binds each rank to a NUMA node,
    of which a small machine has one.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if world > 1:
        share = max(1, len(cores) // world)
        parts = [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(world)]
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part)) for part in parts)
    return {name: environ.get(name, value) for name, value in env.items()}


def forward_to_ray(settings: Settings) -> Settings:
    """Have vLLM copy to Ray's workers what it would not copy by itself, QUANT_CONFIG first of all."""
    asked = os.environ.get(_RAY_COPIES, "").split(",")
    names = [*asked, *(name for name in settings.env if not name.startswith(_RAY_PREFIXES))]
    return settings.with_env({_RAY_COPIES: ",".join(dict.fromkeys(name for name in names if name))})


def to_shell(argv: Iterable[str], env: Mapping[str, str]) -> str:
    """Return the command as one line that a shell runs.

    >>> to_shell(["vllm", "serve", "my model"], {"QUANT_CONFIG": "/a b.json"})
    "QUANT_CONFIG='/a b.json' vllm serve 'my model'"
    """
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in env.items()), *map(shlex.quote, argv)])
