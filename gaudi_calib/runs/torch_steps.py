"""The steps of a run that the torch engine does: it measures per channel, and every rank follows from that."""

import logging

from gaudi_calib.errors import RangeError
from gaudi_calib.layout import CHANNEL_RANGES_NAME
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.coverage import count_coverage, describe_coverage, list_cold, suggest_data
from gaudi_calib.ranges.derive import derive_world
from gaudi_calib.rankfiles.channel_file import write_channel_ranges
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.limits import warn_of_limits
from gaudi_calib.runs.reshard import describe_bounds
from gaudi_calib.runs.run import Run, Target

_log = logging.getLogger(__name__)


def measure_model(run: Run) -> None:
    """Measure ranges."""
    from tqdm import tqdm

    from gaudi_calib.engines.torch.experts import ColdPolicy
    from gaudi_calib.engines.torch.measure import DEFAULT_WORLDS, measure_channels

    assert run.prompts is not None
    with tqdm(total=run.prompts.token_count, unit="tok", unit_scale=True, desc="measure") as bar:

        def show(tokens: float) -> None:
            if not tokens:
                bar.unpause()  # loading libraries is not progress
            bar.update(min(tokens, bar.total - bar.n))  # shares of a token may add up to a little more than all

        run.channels = measure_channels(
            run.plan.checkpoint.directory,
            run.prompts.token_ids,
            worlds=DEFAULT_WORLDS,
            required=[run.topology(world) for world in run.options.worlds],
            cold=ColdPolicy(run.options.min_expert_tokens, fill=run.options.cold_experts == "fill"),
            dtype=run.dtype,
            vllm=run.options.vllm,
            compute_dtype=run.options.compute_dtype,
            batch_size=run.options.batch_size,
            outputs=any(target.measure_config.measures_outputs for target in run.targets),
            on_progress=show,
        )
    _cover_experts(run, run.channels, run.prompts.token_count)
    write_channel_ranges(run.staging / CHANNEL_RANGES_NAME, run.channels)


def _cover_experts(run: Run, channels: ChannelRanges, tokens: int) -> None:
    """Say how tokens spread over the experts, and fail or warn where some saw too few."""
    policy = run.options.cold_experts
    coverage = count_coverage(channels, policy=policy, min_tokens=run.options.min_expert_tokens)
    if coverage is None:
        return
    for target in run.targets:
        target.record.update(expert_coverage=coverage)
    _log.info("%s", describe_coverage(coverage))
    if not coverage.cold:
        return
    what = f"{sum(map(len, coverage.cold.values()))} experts saw fewer than {coverage.min_tokens} tokens"
    more_data = suggest_data(coverage, tokens)
    if policy == "error":
        raise RangeError(
            what,
            where=list_cold(coverage),
            why="their ranges would not be those of real use",
            fix=f"{more_data}; or --cold-experts fill, which sends them tokens of their own layer",
        )
    outcome = {
        "fill": "tokens of their own layer, those the router likes best for them, were sent through them alone",
        "ignore": "their ranges are as they are, 0 for those that saw none: serving them goes wrong",
    }[policy]
    run.warn(f"{what} ({list_cold(coverage)}); {outcome}. {more_data.capitalize()}")


def derive_ranks(run: Run) -> None:
    """Derive the ranges of every rank."""
    assert run.channels is not None
    for target in run.targets:
        run.stage_config(target.layout.measure_config, target.measure_config)
        run.warn_idle_patterns(target.measure_config)
        for world in run.options.worlds:
            derive_target(run, run.channels, target, world)
    warn_of_limits(run)


def derive_target(run: Run, channels: ChannelRanges, target: Target, world: int) -> None:
    """Derive and write the ranges of all ranks of one world for one device.

    Raises:
        RangeError: its MEASURE config asks for outputs, and they were not measured.
    """
    topology = run.topology(world)
    if not channels.is_measured(topology):
        run.warn(f"the {describe_bounds(world)}")
        target.record.update(worlds={world: run.describe_world(is_bounded=True)})
    if target.measure_config.measures_outputs:
        channels.require_outputs(target.placed.advise(run.options.model).measure(world))
    vllm = run.options.vllm or target.record.manifest.vllm
    target.ranges[world] = derive_world(channels, topology, target.device, target.measure_config, vllm)
    write_rank_sets(run.staging / target.device.name, target.ranges[world])
