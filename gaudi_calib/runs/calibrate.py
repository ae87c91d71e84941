"""The steps of a run: prompts, ranges, ranges of every rank, scales."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from gaudi_calib.config.model import QuantConfig, find_idle_patterns, get_scales_device
from gaudi_calib.config.presets import parse_scale_method, to_content, write_quant_config
from gaudi_calib.data.prompts import prepare_prompts
from gaudi_calib.errors import FileError, RangeError
from gaudi_calib.fp8 import Device
from gaudi_calib.layout import CHANNEL_RANGES_NAME, RankFile
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.coverage import count_coverage
from gaudi_calib.ranges.derive import derive_world, select_nodes
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.channel_file import read_channel_ranges, write_channel_ranges
from gaudi_calib.rankfiles.store import list_worlds, read_world_dir, write_rank_set
from gaudi_calib.runs.reshard import VLLM_NOTE
from gaudi_calib.runs.run import Run, RunOptions, RunResult
from gaudi_calib.runs.vllm_steps import computes_scales, measure_ranks, quantize_ranks, settle_engine
from gaudi_calib.scales.compute import compute_scales

__all__ = ["RunOptions", "RunResult", "calibrate", "list_files", "measure", "quantize"]

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

    Raises:
        DataError, ModelError, TopologyError, RangeError, FileError: files of an earlier
            run are unchanged.
    """
    options = settle_engine(options)
    return Run(options, serves=False).execute([_prepare, *_choose_measuring(options)])


def quantize(options: RunOptions) -> RunResult:
    """Compute scales from an earlier measurement; write them and the QUANTIZE configs.

    Ranges of a world that is not there are derived from the channel ranges.

    Raises:
        FileError: no ranges of this world. RangeError: a range gives no usable scale.
    """
    return Run(options, serves=True, fresh=False).execute([_load_ranges, _quantize])


def list_files(options: RunOptions) -> list[Path]:
    """Return the files `calibrate` would write, without writing or measuring anything.

    Raises:
        ModelError, TopologyError, ConfigError, UsageError: `calibrate` would fail.
    """
    options = settle_engine(options)
    run = Run(options, serves=True)
    layout, paths = options.layout, []
    if run.needs_ranges and options.engine != "vllm":
        paths.append(layout.channel_ranges)
    for device in run.devices:
        paths.append(layout.quant_config(device.name))
        if not run.needs_ranges:
            continue
        tag = parse_scale_method(to_content(run.quant_configs[device.name])["scale_method"]).file_tag
        ranks = [(rank, world) for world in options.worlds for rank in range(world)]
        names = [RankFile(rank=rank, world=world).name for rank, world in ranks]
        names += [RankFile(rank=rank, world=world, method=tag).name for rank, world in ranks]
        names += [name.replace(".json", ".npz") for name in names]
        names += [RankFile(rank=rank, world=world, is_mod_list=True).name for rank, world in ranks]
        paths += [layout.measure_config(device.name), layout.manifest(device.name)]
        paths += [layout.device_dir(device.name) / name for name in sorted(names)]
    return paths


def _choose_measuring(options: RunOptions) -> list[Callable[[Run], None]]:
    return [measure_ranks] if options.engine == "vllm" else [_measure, _derive_ranks]


def _prepare(run: Run) -> None:
    """Prepare prompts."""
    run.prompts = prepare_prompts(str(run.plan.checkpoint.directory), **run.options.dataset)
    _log.info("%d prompts, %d tokens", len(run.prompts), run.prompts.token_count)


def _measure(run: Run) -> None:
    """Measure ranges."""
    from tqdm import tqdm

    from gaudi_calib.engines.torch.experts import ColdPolicy
    from gaudi_calib.engines.torch.stream import DEFAULT_WORLDS, measure_channels

    assert run.prompts is not None
    with tqdm(total=run.prompts.token_count, unit="tok", unit_scale=True, desc="measure") as bar:

        def show(tokens: float) -> None:
            bar.update(tokens) if tokens else bar.unpause()  # loading libraries is not progress

        run.channels = measure_channels(
            run.plan.checkpoint.directory,
            run.prompts.token_ids,
            worlds=DEFAULT_WORLDS,
            required=[run.topology(world) for world in run.options.worlds],
            cold=ColdPolicy(run.options.min_expert_tokens, fill=run.options.cold_experts == "fill"),
            dtype=run.options.dtype,
            compute_dtype=run.options.compute_dtype,
            batch_size=run.options.batch_size,
            on_progress=show,
        )
    _cover_experts(run, run.channels, run.prompts.token_count)
    write_channel_ranges(run.staging / CHANNEL_RANGES_NAME, run.channels)


def _cover_experts(run: Run, channels: ChannelRanges, tokens: int) -> None:
    """Say how tokens spread over the experts, and fail or warn where some saw too few."""
    policy = run.options.cold_experts
    coverage = count_coverage(channels, run.options.min_expert_tokens, tokens)
    if coverage is None:
        return
    for record in run.records.values():
        record.update(expert_coverage=coverage.to_facts(policy))
    _log.info("%s", coverage.describe())
    if not coverage.cold_count:
        return
    what = f"{coverage.cold_count} experts saw fewer than {coverage.min_tokens} tokens"
    if policy == "error":
        raise RangeError(
            what,
            where=coverage.list_cold(),
            why="their ranges would not be those of real use",
            fix=f"{coverage.suggest_data()}; or --cold-experts fill, which sends them tokens of their own layer",
        )
    outcome = {
        "fill": "tokens of their own layer, those the router likes best for them, were sent through them alone",
        "ignore": "their ranges are as they are, 0 for those that saw none: serving them goes wrong",
    }[policy]
    run.warn(f"{what} ({coverage.list_cold()}); {outcome}. {coverage.suggest_data().capitalize()}")


def _derive_ranks(run: Run) -> None:
    """Derive the ranges of every rank."""
    assert run.channels is not None
    for device in run.devices:
        config = run.measure_configs[device.name]
        write_quant_config(run.staging / run.layout.measure_config(device.name).name, config)
        for finding in find_idle_patterns(config, run.plan.node_names):
            run.warn(f"{finding.what} ({finding.where})")
        for world in run.options.worlds:
            run.ranges[device.name, world] = _derive_world(run, run.channels, config, device, world)
            for rank_set in run.ranges[device.name, world]:
                write_rank_set(run.staging / device.name, rank_set)


def _derive_world(
    run: Run, channels: ChannelRanges, config: QuantConfig, device: Device, world: int
) -> list[RankSet[Node]]:
    topology = run.topology(world)
    if not channels.is_measured(topology):
        run.warn(
            f"the outputs of row-parallel layers and experts were not measured for {world} ranks; upper bounds "
            f"stand in (measure with -t {world} for the values)"
        )
        run.note(
            device, **{f"world_{world}": "outputs[0] of row-parallel layers and experts are upper bounds, not measured"}
        )
    vllm = run.options.vllm or run.records[device.name].manifest.notes.get(VLLM_NOTE)
    return derive_world(channels, topology, device, config, vllm)


def _load_ranges(run: Run) -> None:
    """Read ranges."""
    for device in run.devices:
        run.require_same_model(device)
        directory = run.layout.device_dir(device.name)
        for world in run.options.worlds:
            if directory.is_dir() and world in list_worlds(directory):
                ranks = read_world_dir(directory, world)
                if _shares_as_wanted(run, device, ranks):
                    run.ranges[device.name, world] = ranks
                    continue
            if not run.layout.channel_ranges.is_file():
                raise FileError(
                    f"no ranges for {world} ranks on {device.name}",
                    where=directory,
                    why=f"neither rank files (with experts shared as they are to be served) nor {CHANNEL_RANGES_NAME}",
                    fix=f"run `gaudi-calib measure -m MODEL -d DATASET -o OUT -t {world}`, or make them of ranks "
                    "that are there: `gaudi-calib unify DIR -r N`, `gaudi-calib expand DIR -w N`",
                )
            channels = read_channel_ranges(run.layout.channel_ranges)
            config = run.measure_configs[device.name]
            run.ranges[device.name, world] = _derive_world(run, channels, config, device, world)
            for rank_set in run.ranges[device.name, world]:
                write_rank_set(run.staging / device.name, rank_set)


def _shares_as_wanted(run: Run, device: Device, ranks: list[RankSet[Node]]) -> bool:
    """Whether the ranks hold as many experts each as they are to hold."""
    world = len(ranks)
    if world == 1 or (device.name, world) not in run.reshared:
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
    for device in run.devices:
        config = run.quant_configs[device.name]
        method = parse_scale_method(to_content(config)["scale_method"])
        for finding in find_idle_patterns(config, run.plan.node_names):
            run.warn(f"{finding.what} ({finding.where})")
        for override in method.find_unused(run.plan.node_names):
            if not override.startswith("layer_types."):
                run.warn(f"the scale method's {override} matches no node of the model")
        for rank_set in (one for world in worlds for one in run.ranges[device.name, world]):
            weights = partial(run.plan.read_rank_weight, rank=rank_set.rank, topology=run.topology(rank_set.world))
            scales = compute_scales(
                select_nodes(rank_set, config), method, get_scales_device(config, device), weights=weights
            )
            written = write_rank_set(run.staging / device.name, scales, method=method.file_tag)
            run.record_scales(device, scales, written)
