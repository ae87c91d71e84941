"""`gaudi-calib calibrate`, `measure` and `quantize`: which steps a run has, and those that both engines share."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from gaudi_calib.data.prompts import prepare_prompts
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, TopologyError
from gaudi_calib.layout import CHANNEL_RANGES_NAME, RankFile
from gaudi_calib.moved import warn_of_move
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.channel_file import read_channel_ranges
from gaudi_calib.rankfiles.store import write_rank_set
from gaudi_calib.runs.facts import require_same_model
from gaudi_calib.runs.limits import warn_of_limits
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.recipe import open_weights
from gaudi_calib.runs.run import Run, RunResult, Target
from gaudi_calib.runs.torch_steps import (
    derive_ranks,
    derive_target,
    measure_model,
    require_savable,
    save_model_tensors,
)
from gaudi_calib.runs.vllm_steps import computes_scales, describe_room, measure_ranks, quantize_ranks, settle_engine

_log = logging.getLogger(__name__)


def calibrate(options: RunOptions) -> RunResult:
    """Measure ranges, derive every rank's, compute scales, write the configs.

    A scale method that needs no measurement gets its config only.

    Raises:
        CalibrationError: as `measure` and `quantize`; files of an earlier run are unchanged.
    """
    options = settle_engine(options)
    scaling = [quantize_ranks, _quantize_unified] if computes_scales(options) else [_quantize]
    return Run(options, serves=True).execute([_prepare, *_choose_measuring(options), *scaling])


def measure(options: RunOptions) -> RunResult:
    """Measure ranges; write the channel ranges, every rank's files and the MEASURE configs.

    With observer `save` in the MEASURE config, tensors are written in place of ranges.

    Raises:
        DataError, ModelError, TopologyError, RangeError, FileError: files of an earlier
            run are unchanged.
    """
    options = settle_engine(options)
    run = Run(options, serves=False)
    if not any(target.quant_config.uses_stats_files for target in run.targets):
        run.warn(f"{run.targets[0].quant_path.name} will need no ranges: its scale method takes none")
    if any(target.saves_tensors for target in run.targets):
        require_savable(run)
        return run.execute([_prepare, save_model_tensors])
    return run.execute([_prepare, *_choose_measuring(options)])


def quantize(options: RunOptions) -> RunResult:
    """Compute scales from an earlier measurement; write them and the QUANTIZE configs.

    Ranges of a world that is not there are derived from the channel ranges.

    Raises:
        FileError: no ranges of this world. RangeError: a range gives no usable scale.
    """
    run = Run(options, serves=True, fresh=False)
    for target in run.targets if run.needs_ranges else ():
        require_same_model(target.placed, run.model, options.world)
        _require_ranges(run, target)
    return run.execute([_load_ranges, _quantize])


def list_files(options: RunOptions) -> list[Path]:
    """Return the files `calibrate` would write, without writing or measuring anything.

    Raises:
        ModelError, TopologyError, ConfigError, UsageError: `calibrate` would fail.
    """
    options = settle_engine(options)
    run = Run(options, serves=True)
    has_channels = run.needs_ranges and options.engine != "vllm"
    paths = [run.layout.channel_ranges, run.layout.convergence] if has_channels else []
    for target in run.targets:
        paths.append(target.quant_path)
        if not run.needs_ranges:
            continue
        tag = target.quant_config.method_table.file_tag
        ranks = [(rank, world) for world in options.worlds for rank in range(world)]
        names = [RankFile(rank=rank, world=world).name for rank, world in ranks]
        names += [RankFile(rank=rank, world=world, method=tag).name for rank, world in ranks]
        names += [name.replace(".json", ".npz") for name in names]
        names += [RankFile(rank=rank, world=world, is_mod_list=True).name for rank, world in ranks]
        paths += [target.layout.measure_config, target.layout.manifest]
        paths += [target.layout.directory / name for name in sorted(names)]
    return paths


def _choose_measuring(options: RunOptions) -> list[Callable[[Run], None]]:
    return [measure_ranks] if options.engine == "vllm" else [measure_model, derive_ranks]


def _prepare(run: Run) -> None:
    """Prepare prompts."""
    room = describe_room(run) if run.options.engine == "vllm" else {}
    run.prompts = prepare_prompts(str(run.plan.checkpoint.directory), **{**room, **run.options.dataset})
    _log.info("%d prompts, %d tokens", len(run.prompts), run.prompts.token_count)


def _require_ranges(run: Run, target: Target) -> None:
    """Raise FileError where there is nothing to compute scales from, before a manifest says that anything runs."""
    placed, advice = target.placed, target.placed.advise(run.options.model, target.quant_path)
    for world in run.options.worlds:
        if world not in (placed.worlds if placed.files else ()) and not placed.channel_file.is_file():
            raise FileError(
                f"no ranges for {world} ranks on {target.device.name}",
                where=placed.path,
                why="observer save left tensors only"
                if target.saves_tensors
                else f"neither rank files nor {CHANNEL_RANGES_NAME}",
                fix=(f"use observer maxabs in {target.layout.measure_config}, then " if target.saves_tensors else "")
                + f"run: {advice.derive(world) or advice.measure(world)}",
            )


def _load_ranges(run: Run) -> None:
    """Read ranges."""
    warn_of_move(run.targets[0].placed)
    for target in run.targets:
        placed = target.placed
        for world in run.options.worlds:
            if world in placed.worlds:
                ranks = placed.read_world(world)
                if _shares_as_wanted(run, target, ranks):
                    target.ranges[world] = ranks
                    _restore_npz(run, target, ranks)
                    continue
                if not placed.channel_file.is_file():
                    raise _refuse_sharing(run, placed, world)
            derive_target(run, read_channel_ranges(placed.require_channels(world)), target, world)
        run.require_covered(target)
    warn_of_limits(run)


def _restore_npz(run: Run, target: Target, ranks: list[RankSet[Node]]) -> None:
    """Write the `.npz` of ranks that have only their `.json`: INC reads nothing else."""
    for rank_set in ranks:
        path = target.placed.name_file(rank_set.rank, rank_set.world)
        if not path.is_file():
            run.warn(f"{path.name} was missing; it is written from the .json beside it")
            write_rank_set(run.staging / target.device.name, rank_set)


def _refuse_sharing(run: Run, placed: CalibrationDir, world: int) -> TopologyError:
    wanted, held, flag = "whole experts", "a slice of each expert", "--no-expert-parallel"
    if not run.expert_parallel:
        wanted, held, flag = held, wanted, "-u"
    return TopologyError(
        f"the ranges are of ranks that hold {held}, and {wanted} are to be served",
        where=placed.path,
        why=f"without {CHANNEL_RANGES_NAME} they cannot be derived for {world} ranks",
        fix=f"give {flag}, which serves what was measured, or measure again",
    )


def _shares_as_wanted(run: Run, target: Target, ranks: list[RankSet[Node]]) -> bool:
    """Whether the ranks hold as many experts each as they are to hold."""
    world = len(ranks)
    if world == 1 or world not in target.reshared:
        return True
    local = {name: experts.count // (world if run.expert_parallel else 1) for name, experts in run.plan.experts.items()}
    return all(
        len(node.outputs or ()) == local[name] + 1
        for rank_set in ranks
        for name, node in rank_set.nodes.items()
        if name in local
    )


def _quantize(run: Run) -> None:
    """Compute scales."""
    _quantize_worlds(run, run.options.worlds)


def _quantize_unified(run: Run) -> None:
    """Compute the scales of the unified ranks."""
    _quantize_worlds(run, [world for world in run.options.worlds if world != run.options.world])


def _quantize_worlds(run: Run, worlds: Iterable[int]) -> None:
    worlds = list(worlds)
    for target in run.targets:
        recipe = target.recipe
        run.warn_idle_patterns(target.quant_config)
        for override in recipe.table.find_unused(run.plan.node_names):
            if not override.startswith("layer_types."):
                run.warn(f"the scale method's {override} matches no node of the model")
        for world in worlds:
            ranks, weights = recipe.select(target.ranges[world]), open_weights(run.plan, run.topology(world))
            for scales in recipe.compute(ranks, weights):
                write_rank_set(run.staging / target.device.name, scales, method=recipe.tag)
                run.record_scales(target, scales)
