"""The steps of a run that vLLM does: it writes the files of every rank itself.

They stand in for measuring channels and deriving ranks from them, and on a Gaudi, where INC
computes the scales, for that as well. What a phase wrote is read back and checked before it counts.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gaudi_calib.config.file import write_quant_config
from gaudi_calib.config.model import QuantConfig, with_dump_stats_path
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import CalibrationError, FileError, RangeError, UsageError
from gaudi_calib.layout import DUMP_NAME, RankFile
from gaudi_calib.ranges.idle import find_idle
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.unify import gather_world, unify_ranks
from gaudi_calib.rankfiles.store import read_scales, write_rank_sets
from gaudi_calib.runs.limits import warn_of_limits
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.run import Run, Target
from gaudi_calib.staging import scratch_directory

if TYPE_CHECKING:
    from gaudi_calib.engines.vllm_runner.phases import PhaseName
    from gaudi_calib.engines.vllm_runner.settings import Deployment

_log = logging.getLogger(__name__)

_SHOWN = 3


def settle_engine(options: RunOptions) -> RunOptions:
    """Return `options` with the engine that measures, the platform it runs on and the devices it can measure for.

    Raises:
        UsageError: a Gaudi measures for itself only, and another is asked for.
        CalibrationError: see `detect_apart`.
    """
    if options.engine == "torch":
        return _settle(options, "torch")
    from gaudi_calib.engines.detect import detect_apart

    platform = detect_apart()
    if options.engine == "auto" and platform.name != "hpu":
        return _settle(options, "torch")
    if find_spec("vllm") is None:
        raise CalibrationError(
            "vLLM is not installed",
            where="--engine vllm",
            fix="install vllm with vllm-gaudi on a Gaudi, `pip install 'gaudi-calib[cpu]'` on a CPU, "
            "or give --engine torch",
        )
    settled = replace(_settle(options, "vllm"), platform=platform.name)
    if platform.device is None:
        return settled
    name = platform.device.name
    if name not in options.devices:
        raise UsageError(
            f"this is a {name}, and files for {', '.join(options.devices)} are asked for",
            why="ranges measured on a Gaudi are those of its own arithmetic",
            fix=f"leave --device out, or give --engine torch, which measures for both ({name} included)",
        )
    if options.dtype not in (None, "bfloat16"):
        raise UsageError(
            f"--dtype {options.dtype}: vllm-gaudi measures in bfloat16",
            why="it replaces any other type, and INC would convert to and from that one",
            fix="leave --dtype out, or give --engine torch",
        )
    if options.devices != (name,):
        _log.warning("Measured on %s: only its files are written. --engine torch writes those of both", name)
    return replace(settled, devices=(name,))


def _settle(options: RunOptions, engine: str) -> RunOptions:
    """Return `options` with the engine, after a warning of those that it ignores."""
    ignored = options.list_ignored(engine)
    if ignored:
        verb = "has" if len(ignored) == 1 else "have"
        _log.warning("%s %s no effect: the %s engine measures", ", ".join(ignored), verb, engine)
    return replace(options, engine=engine)


def computes_scales(options: RunOptions) -> bool:
    """Whether vLLM computes the scales, too: INC does, on a Gaudi."""
    return options.engine == "vllm" and options.platform == "hpu"


def describe_room(run: Run) -> dict[str, int | None]:
    """Return the arguments of `prepare_prompts` that say how long a prompt may be."""
    from gaudi_calib.engines.vllm_runner.phases import LEAST_NEW_TOKENS, EngineOptions, get_asked_length

    family = run.plan.family
    asked = get_asked_length(run.options.engine_options or EngineOptions(), family.measure_args)
    return {"max_model_len": asked, "new_tokens": LEAST_NEW_TOKENS}


def measure_ranks(run: Run) -> None:
    """Measure the ranges of every rank with vLLM."""
    world, unified = run.options.world, run.options.unified_world
    for target in run.targets:
        run.warn_idle_patterns(target.measure_config)
        _run_phase(run, "measure", target, target.measure_config)
        ranks = _read_measured(run, target)
        target.ranges[world] = ranks
        if unified and unified != world:
            joined = unify_ranks(gather_world(ranks), unified, expert_parallel=run.expert_parallel)
            target.ranges[unified] = joined
        for size in run.options.worlds:
            write_rank_sets(run.staging / target.device.name, target.ranges[size])
        run.stage_config(target.layout.measure_config, target.measure_config)
    warn_of_limits(run)


def quantize_ranks(run: Run) -> None:
    """Compute the scales of every rank with INC."""
    for target in run.targets:
        _run_phase(run, "quantize", target, target.quant_config)
        tag = target.quant_config.method_table.file_tag
        for rank_set in target.ranges[run.options.world]:
            name = RankFile(method=tag, rank=rank_set.rank, world=rank_set.world).name
            written = run.staging / target.device.name / name
            if not written.with_suffix(".npz").is_file():
                raise FileError(
                    f"rank {rank_set.rank} of {rank_set.world} wrote no scales",
                    where=target.layout.log("quantize"),
                    why=f"the quantize phase ended well, but INC left no {name}",
                    fix="read the log; INC writes scales while the model is loaded",
                )
            _require_finite_scales(written)
            run.record_scales(target, rank_set)


def _run_phase(run: Run, name: "PhaseName", target: Target, config: QuantConfig) -> None:
    from gaudi_calib.engines.vllm_runner.cluster import require_cluster
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions, plan_phase
    from gaudi_calib.engines.vllm_runner.process import run_phase

    assert run.prompts is not None
    options = replace(
        run.options.engine_options or EngineOptions(),
        batch_size=run.options.batch_size,
        trust_remote_code=bool(run.options.dataset.get("trust_remote_code")),
    )
    with _staged_config(run, name, target, config) as (path, staged):
        platform = run.options.platform
        phase = plan_phase(name, platform, staged, path, _describe_model(run), run.prompts.token_ids, options)
        if phase.settings.args.get("distributed_executor_backend") == "ray":
            require_cluster(platform, run.options.world)
        report = run_phase(phase, target.layout.log(name))
    _log.info("%s: %d prompts, %d new tokens", name, report["prompts"], report["new_tokens"])


@contextmanager
def _staged_config(run: Run, name: str, target: Target, config: QuantConfig) -> Iterator[tuple[Path, QuantConfig]]:
    """Yield a QUANT_CONFIG whose files go to the staging directory; all nodes must see it."""
    directory = run.staging / target.device.name
    directory.mkdir(exist_ok=True)
    staged = with_dump_stats_path(config, directory / DUMP_NAME)
    with scratch_directory(run.layout.root) as scratch:
        path = scratch / f"maxabs_{name}_{target.device.name}.json"
        write_quant_config(path, staged)
        yield path, staged


def _describe_model(run: Run) -> "Deployment":
    from gaudi_calib.engines.vllm_runner.settings import Deployment

    source = run.plan.checkpoint.source
    return Deployment(
        str(run.plan.checkpoint.directory),
        run.options.world,
        run.plan.family,
        expert_parallel=run.expert_parallel,
        quantization=source.quantization,
        modules=run.plan.node_names,
        context=source.context,
        env=source.required_env,
    )


def _read_measured(run: Run, target: Target) -> list[RankSet[Node]]:
    """Return what the ranks wrote, postprocessed, after checking that it is whole.

    Raises:
        FileError: a rank's file is missing. TopologyError: ranks have different nodes.
        RangeError: a range is not finite, or a module that serving needs never ran.
    """
    measured = CalibrationDir(run.staging / target.device.name).read_world(run.options.world)
    ranks = gather_world(list(map(apply_kv_cache, measured))).ranks
    for rank_set in ranks:
        known = {*rank_set.nodes, *find_idle(rank_set.modules, rank_set.nodes)}
        silent = [name for name in rank_set.modules if name not in known]
        if silent:
            raise RangeError(
                f"{len(silent)} modules of rank {rank_set.rank} of {rank_set.world} never ran: "
                + ", ".join(silent[:_SHOWN]),
                where=target.layout.log("measure"),
                why="vLLM would fail where it needs one of them and it was not quantized",
                fix="generate more (--max-new-tokens), or give more prompts; -l limits them",
            )
    _cover_experts(run, ranks)
    return list(ranks)


def _cover_experts(run: Run, ranks: Sequence[RankSet[Node]]) -> None:
    """Fail or warn where an expert saw no token, as -u and --cold-experts say."""
    idle = [
        f"{name} expert {index} (rank {rank_set.rank})"
        for rank_set in ranks
        for name, node in rank_set.nodes.items()
        if name in run.plan.experts
        for index, output in enumerate((node.outputs or ())[1:])
        if not np.any(output)
    ]
    if not idle:
        return
    what = f"{len(idle)} experts saw no token: {', '.join(idle[:_SHOWN])}"
    fix = "give more and more varied prompts, or measure with --engine torch, which sends such experts tokens"
    if run.options.cold_experts == "error":
        raise RangeError(what, where=run.layout.root, why="their ranges are 0", fix=fix)
    run.warn(f"{what}; their ranges are 0, and serving them goes wrong. {fix.capitalize()}")


def _require_finite_scales(path: Path) -> None:
    for name, node in read_scales(path).nodes.items():
        weight = getattr(node.weight, "out_channels", node.weight)
        values = [*node.inputs, *node.outputs, *([] if weight is None else [weight])]
        if not all(np.isfinite(np.asarray(value, dtype=np.float32)).all() for value in values):
            raise RangeError(
                f"a scale of {name} is not finite",
                where=path,
                why="with pow2 and arbitrary methods a range of 0 gives it",
                fix="measure with prompts that reach this module, or use maxabs_hw",
            )
