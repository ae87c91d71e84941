"""`gaudi-calib reshard`: the rank files of any topology from one measurement, exactly and without the model."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gaudi_calib.config.model import QuantConfig
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, TopologyError
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import DEVICES, get_device
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME, DeviceLayout, list_rank_files
from gaudi_calib.moved import warn_of_move
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.derive import derive_world
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.channel_file import read_channel_ranges
from gaudi_calib.runs.conversion import write_world

_log = logging.getLogger(__name__)


def reshard_dir(
    run: Path,
    world: int,
    *,
    expert_parallel: bool | None = None,
    devices: Sequence[str] | None = None,
    out: Path | None = None,
    vllm: str | None = None,
) -> list[Path]:
    """Write the ranges of every one of `world` ranks, as a measurement with so many would have left them.

    Args:
        run: the run directory (`OUT/<model>`), or one of its device directories.
        expert_parallel: whether ranks hold whole experts; None: as the run's manifest says.
        devices: names of devices; None: those the run has.
        out: a run directory for the results; None: `run` itself.
        vllm: as for `derive_world`; None: as the run's manifest says.

    Returns:
        The files written.

    Raises:
        FileError: no channel ranges, or they are damaged.
        TopologyError: the model does not divide over the ranks, or it is not known how they share experts.
        RangeError: the MEASURE config asks for outputs, and they were not measured.
    """
    run, devices = _find_run(expand_path(run), devices)
    sources = [CalibrationDir(run / name) for name in devices]
    warn_of_move(sources[0])
    paths = {source.require_channels(world) for source in sources}
    channels = read_channel_ranges(paths.pop())
    results = []
    for source, name in zip(sources, devices, strict=True):
        topology = Topology(world, _choose_sharing(source, channels, world, expert_parallel))
        version = vllm or (source.manifest.vllm if source.manifest else None)
        config = _require_config(source, name)
        if config.measures_outputs:
            channels.require_outputs(source.advise().measure(world))
        ranks = derive_world(channels, topology, get_device(name), config, version)
        results.append((topology, ranks))
    is_bounded = not all(channels.is_measured(topology) for topology, _ in results)
    if is_bounded:
        _log.warning("The %s", describe_bounds(world))
    written: list[Path] = []
    for source, (topology, ranks) in zip(sources, results, strict=True):
        split = topology.expert_parallel if channels.has_experts else None
        target = (expand_path(out) if out else run) / source.path.name
        written += write_world(source, target, ranks, expert_parallel=split, is_bounded=is_bounded)
    return written


def describe_bounds(world: int) -> str:
    """Return what to know about ranges of a world whose partial sums were not measured."""
    return (
        f"outputs of row-parallel layers and experts were not measured for {world} ranks; upper bounds stand in "
        f"(measure with -t {world} for the values)"
    )


def _find_run(run: Path, devices: Sequence[str] | None) -> tuple[Path, Sequence[str]]:
    run = run.resolve()
    if not (run / CHANNEL_RANGES_NAME).is_file() and (run.name in DEVICES or list_rank_files(run)):
        devices, run = devices or [run.name], run.parent
    found = devices or [name for name in DEVICES if (run / name).is_dir()]
    return run, found or list(DEVICES)


def _require_config(source: CalibrationDir, device: str) -> QuantConfig:
    if source.measure_config is None:
        path = DeviceLayout(source.path, device).measure_config
        raise FileError(
            f"no {path.name}",
            where=path,
            why="it says which nodes are blocked",
            fix=f"copy it beside {CHANNEL_RANGES_NAME}, or measure for {device}",
        )
    return source.measure_config


def _choose_sharing(source: CalibrationDir, channels: ChannelRanges, world: int, given: bool | None) -> bool:
    if given is not None or world == 1 or not channels.has_experts:
        return bool(given) and channels.has_experts
    shared = source.manifest.expert_parallel if source.manifest else None
    if shared is None:
        raise TopologyError(
            "it is not known how the ranks share the experts",
            where=source.path.parent,
            why=f"no {MANIFEST_NAME} says how the model is served",
            fix="give --expert-parallel (ranks hold whole experts) or --no-expert-parallel (a slice of each)",
        )
    return shared
