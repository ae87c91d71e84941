"""The steps of a run that the torch engine does: it measures per channel, and every rank follows from that."""

import logging
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gaudi_calib.errors import ConfigError, FileError, RangeError, UsageError
from gaudi_calib.files import hash_file, show_size
from gaudi_calib.layout import CHANNEL_RANGES_NAME, CONVERGENCE_NAME
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.convergence import gather_convergence
from gaudi_calib.ranges.coverage import count_coverage, describe_coverage, list_cold, suggest_data
from gaudi_calib.ranges.derive import derive_world
from gaudi_calib.rankfiles.channel_file import write_channel_ranges
from gaudi_calib.rankfiles.convergence_file import write_convergence
from gaudi_calib.rankfiles.store import write_rank_sets
from gaudi_calib.runs.convergence import warn_of_convergence
from gaudi_calib.runs.limits import warn_of_limits
from gaudi_calib.runs.reshard import describe_bounds
from gaudi_calib.runs.run import Run, Target

if TYPE_CHECKING:
    from gaudi_calib.engines.torch.tensors import SavedNode

_log = logging.getLogger(__name__)


@contextmanager
def _show_progress(total: int) -> Iterator[Callable[[float], None]]:
    """Yield what is to be called with the tokens finished, and with 0 at the start."""
    from tqdm import tqdm

    with tqdm(total=total, unit="tok", unit_scale=True, desc="measure") as bar:

        def show(tokens: float) -> None:
            if not tokens:
                bar.unpause()  # loading libraries is not progress
            bar.update(min(tokens, bar.total - bar.n))  # shares of a token may add up to a little more than all

        yield show


def measure_model(run: Run) -> None:
    """Measure ranges."""
    from gaudi_calib.engines.torch.experts import ColdPolicy
    from gaudi_calib.engines.torch.measure import DEFAULT_WORLDS, measure_channels

    assert run.prompts is not None
    with _show_progress(run.prompts.token_count) as show:
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
    channel_file = run.staging / CHANNEL_RANGES_NAME
    write_channel_ranges(channel_file, run.channels)
    run.convergence = gather_convergence(run.channels, run.prompts.origins)
    write_convergence(run.staging / CONVERGENCE_NAME, run.convergence, hash_file(channel_file))


def require_savable(run: Run) -> None:
    """Raise UsageError where tensors would not be told apart, or be mixed up with what is there."""
    target, root, options = run.targets[0], run.layout.root, run.options
    config = options.measure_config or target.layout.measure_config
    if len(run.targets) > 1:
        raise UsageError(
            "observer save is for one device at a time",
            where=config,
            why="tensors are the same for both, and take much space",
            fix=f"give --device {options.devices[0]}",
        )
    if options.worlds != (1,):
        raise UsageError(
            f"observer save is for one rank, and -t is {options.world}",
            where=config,
            why="INC names the files of tensors without the rank, so that ranks overwrite each other's",
            fix="leave -t and -r out",
        )
    if target.placed.files or run.layout.channel_ranges.is_file() or target.layout.tensors.exists():
        raise UsageError(
            "there are results already where tensors are to be saved",
            where=root,
            why="they would not belong to them",
            fix=f"give this run a name of its own: --name {shlex.quote(root.name + '-tensors')}",
        )


def save_model_tensors(run: Run) -> None:
    """Save tensors."""
    from gaudi_calib.engines.torch.tensors import plan_tensors, save_tensors

    assert run.prompts is not None
    (target,) = run.targets
    run.warn_idle_patterns(target.measure_config)
    nodes = plan_tensors(run.plan, target.measure_config)
    if not nodes:
        raise ConfigError(
            "no linear layer and no expert is left to save",
            where=run.options.measure_config or target.layout.measure_config,
            why="its lists block them all",
            fix="take names out of the blocklist, or add some to the allowlist",
        )
    _require_space(run, nodes.values(), run.prompts.token_ids)
    directory = run.staging / target.layout.tensors.relative_to(run.layout.root)
    with _show_progress(run.prompts.token_count) as show:
        save_tensors(
            run.plan,
            nodes,
            run.prompts.token_ids,
            directory,
            vllm=run.options.vllm,
            compute_dtype=run.options.compute_dtype,
            batch_size=run.options.batch_size,
            on_progress=show,
        )
    run.stage_config(target.layout.measure_config, target.measure_config)
    run.warn(
        "tensors of linear layers and experts were saved, and no ranges; those of attention have the shapes of a "
        "device's kernels, and are left out"
    )


def _require_space(run: Run, nodes: Iterable["SavedNode"], prompts: Sequence[Sequence[int]]) -> None:
    """Say how much space tensors will take, and fail where there is less."""
    from gaudi_calib.engines.torch.tensors import estimate_bytes

    nodes = list(nodes)
    weights, all_of_it = (estimate_bytes(nodes, those, run.dtype) for those in ([], prompts))
    free, each = shutil.disk_usage(run.staging).free, (all_of_it - weights) // len(prompts)
    what = f"tensors take about {show_size(all_of_it)}, of which weights {show_size(weights)}"
    _log.info("The %s; %s are free", what, show_size(free))
    if all_of_it > free:
        fitting = (free - weights) // each if each else 0
        raise FileError(
            f"the {what}, and {show_size(free)} are free",
            where=run.layout.root,
            why=f"every prompt takes about {show_size(each)}",
            fix=(f"give fewer prompts (-l {fitting}), " if fitting > 0 else "")
            + "name the modules of interest in the allowlist of the MEASURE config, or give another -o",
        )


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
    warn_of_convergence(run)


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
