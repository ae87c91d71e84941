"""A calibration run as a list of steps. Its files are staged, and appear together at the end."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaudi_calib.config import measure_config, quant_config, read_quant_config, to_content, write_quant_config
from gaudi_calib.config_model import QuantConfig, find_idle_patterns, get_scales_device, with_dump_stats_path
from gaudi_calib.data.prompts import Prompts, prepare_prompts
from gaudi_calib.errors import ConfigError, FileError, UsageError
from gaudi_calib.files import hash_file, stage_files
from gaudi_calib.fingerprint import fingerprint_model
from gaudi_calib.fp8 import DEVICES, Device, get_device
from gaudi_calib.layout import CHANNEL_RANGES_NAME, RankFile, RunLayout, parse_rank_file
from gaudi_calib.manifest import DatasetFacts, ModelFacts, Record, ScaleOrigin, Topology, hash_files, record_run
from gaudi_calib.ranges.channel_file import read_channel_ranges, write_channel_ranges
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.ranges.node import Node, Op, RankSet, find_op
from gaudi_calib.ranges.shard import ChannelRanges, derive_rank
from gaudi_calib.ranges.store import list_worlds, read_world_dir, write_rank_set
from gaudi_calib.scales.compute import compute_scales
from gaudi_calib.scales.layer_types import find_layer_type
from gaudi_calib.scales.method_table import MethodTable, parse_scale_method

if TYPE_CHECKING:
    from gaudi_calib.engines.base import ModelPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What to calibrate, and how. Relative paths count from the caller's directory.

    Attributes:
        model: directory or hub name of the checkpoint.
        out: root of the runs (-o); this run's files go to `out/<model>/`.
        dataset: arguments of `prepare_prompts` beside the model.
        world: ranks that will serve (-t).
        unified_world: a second world to write (-r); divides `world`.
        devices: devices that will serve.
        engine: `auto` or `torch`.
        batch_size: sequences that run together, at most.
        dtype: what the model is served in.
        compute_dtype: `float32` or `bfloat16`, the arithmetic of the measurement.
        scale_method: a published method, in any case; None for maxabs_hw, or what
            `quant_config` says.
        measure_config, quant_config: QUANT_CONFIG files in place of the family's presets.
    """

    model: str
    out: Path
    dataset: Mapping[str, Any] = field(default_factory=dict)
    world: int = 1
    unified_world: int | None = None
    devices: tuple[str, ...] = tuple(DEVICES)
    engine: str = "auto"
    batch_size: int = 32
    dtype: str = "bfloat16"
    compute_dtype: str = "float32"
    scale_method: str | None = None
    measure_config: Path | None = None
    quant_config: Path | None = None

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.out.expanduser().resolve(), self.model)

    @property
    def worlds(self) -> tuple[int, ...]:
        return tuple(sorted({self.world, self.unified_world or self.world}))


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        root: `out/<model>/`.
        files: everything written.
        quant_configs: device name -> the file that QUANT_CONFIG points to.
        worlds: worlds whose ranges (and scales) were written.
        warnings: what the user should know.
        serve_flags: flags of `vllm serve` beside model and world.
        env: environment that serving needs beside QUANT_CONFIG.
    """

    root: Path
    files: tuple[Path, ...]
    quant_configs: Mapping[str, Path]
    worlds: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    serve_flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def serve_command(self, model: str, world: int) -> list[str]:
        """Return the words of the command that serves `model` on a Gaudi."""
        return ["vllm", "serve", model, *self.serve_flags, "--tensor-parallel-size", str(world)]


def calibrate(options: RunOptions) -> RunResult:
    """Measure ranges, derive every rank's, compute scales, write the configs.

    A scale method that needs no measurement gets its config only.

    Raises:
        CalibrationError: as `measure` and `quantize`; files of an earlier run are unchanged.
    """
    return _Run(options, serves=True).execute([_prepare, _measure, _derive_ranks, _quantize])


def measure(options: RunOptions) -> RunResult:
    """Measure ranges; write the channel ranges, every rank's files and the MEASURE configs.

    Raises:
        DataError, ModelError, TopologyError, RangeError, FileError: files of an earlier
            run are unchanged.
    """
    return _Run(options, serves=False).execute([_prepare, _measure, _derive_ranks])


def quantize(options: RunOptions) -> RunResult:
    """Compute scales from an earlier measurement; write them and the QUANTIZE configs.

    Ranges of a world that is not there are derived from the channel ranges.

    Raises:
        FileError: no ranges of this world. RangeError: a range gives no usable scale.
    """
    return _Run(options, serves=True).execute([_load_ranges, _quantize], fresh=False)


def list_files(options: RunOptions) -> list[Path]:
    """Return the files `calibrate` would write, without writing or measuring anything.

    Raises:
        ModelError, TopologyError, ConfigError, UsageError: `calibrate` would fail.
    """
    run = _Run(options, serves=True)
    layout, paths = options.layout, []
    if run.needs_ranges:
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


class _Run:
    """State shared by the steps.

    Attributes:
        plan: nodes of the model.
        measure_configs, quant_configs: by device name.
        staging: where steps write; renamed into the run directory at the end.
        prompts, channels: results of the steps before.
        ranges: per device name and world, all ranks.
        records: the manifest in progress, by device name.
    """

    def __init__(self, options: RunOptions, *, serves: bool):
        from gaudi_calib.engines.base import plan_model
        from gaudi_calib.engines.checkpoint import resolve_model

        _check_options(options)
        self.options, self.layout, self.serves = options, options.layout, serves
        self.devices = [get_device(name) for name in options.devices]
        self.plan: ModelPlan = plan_model(resolve_model(options.model), options.dtype)
        for world in options.worlds:
            self.plan.require_world(world)
        self.measure_configs = {device.name: self._measure_config(device) for device in self.devices}
        self.quant_configs = {device.name: self._quant_config(device) for device in self.devices}
        self.needs_ranges = not serves or any(one.uses_stats_files for one in self.quant_configs.values())
        self.warnings: list[str] = []
        self.staging = Path()
        self.prompts: Prompts | None = None
        self.channels: ChannelRanges | None = None
        self.ranges: dict[tuple[str, int], list[RankSet[Node]]] = {}
        self.records: dict[str, Record] = {}

    def execute(self, steps: Sequence[Callable[["_Run"], None]], *, fresh: bool = True) -> RunResult:
        """Run `steps`, then rename what they wrote into the run directory.

        Args:
            fresh: False where the run adds to an earlier one.
        """
        if not self.needs_ranges:
            self.warn("this scale method needs no measurement: only QUANT_CONFIG is written")
            steps = []
        with self._recorded(fresh=fresh):
            with stage_files(self.layout.root) as self.staging:
                for number, step in enumerate(steps, 1):
                    _log.info("Step %d/%d: %s", number, len(steps), (step.__doc__ or "").strip().rstrip("."))
                    with self._timed(step.__name__.strip("_")):
                        step(self)
                if self.serves:
                    for name, config in self.quant_configs.items():
                        write_quant_config(self.staging / self.layout.quant_config(name).name, config)
                files = [path.relative_to(self.staging) for path in sorted(self.staging.rglob("*")) if path.is_file()]
            self._remove_stale(files)
            self._record_files()
        return self._result(files)

    def _result(self, files: Sequence[Path]) -> RunResult:
        config = next(iter(self.quant_configs.values()))
        attention = self.plan.attention_node(0, "k_cache")
        flags = ("--quantization", "inc")
        if not config.is_blocked(attention, find_layer_type(attention, Op.KV_CACHE)):
            flags += ("--kv-cache-dtype", "fp8_inc")
        return RunResult(
            self.layout.root,
            tuple(self.layout.root / path for path in files),
            {name: self.layout.quant_config(name) for name in self.quant_configs} if self.serves else {},
            self.options.worlds if self.needs_ranges else (),
            tuple(self.warnings),
            flags,
            {**self.plan.family.env, **config.required_env},
        )

    @contextmanager
    def _recorded(self, *, fresh: bool) -> Iterator[None]:
        """Keep a manifest for every device while the block runs."""
        model = ModelFacts(
            name=self.options.model,
            fingerprint=fingerprint_model(self.plan.checkpoint.directory),
            model_type=self.plan.checkpoint.config["model_type"],
            family=self.plan.family.name,
        )
        topology = Topology(measured_world=1, worlds=list(self.options.worlds))
        with ExitStack() as stack:
            for device in self.devices:
                path = self.layout.manifest(device.name)
                facts = {"device": device.name, "platform": "cpu", "engine": "torch", "topology": topology}
                record = stack.enter_context(record_run(path, fresh=fresh, model=model, **facts))
                self.records[device.name] = record
            yield

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        with ExitStack() as stack:
            for record in self.records.values():
                stack.enter_context(record.time(step))
            yield

    def _record_files(self) -> None:
        for device in self.devices:
            directory, record = self.layout.device_dir(device.name), self.records[device.name]
            config = {"measure": to_content(self.measure_configs[device.name])} if self.ranges else {}
            if self.serves:
                config["quantize"] = to_content(self.quant_configs[device.name])
            dataset = self.prompts and DatasetFacts(
                name=self.prompts.dataset,
                hash=self.prompts.sha256,
                prompts=len(self.prompts),
                tokens=self.prompts.token_count,
            )
            record.update(config=config, files=hash_files(directory), **({"dataset": dataset} if dataset else {}))

    def record_scales(self, device: Device, world: int, rank: int, files: Sequence[Path], method: Any) -> None:
        """Note which ranges, and which settings, the scale `files` were computed from."""
        name = RankFile(rank=rank, world=world, extension="npz").name
        staged, placed = self.staging / device.name / name, self.layout.device_dir(device.name) / name
        origin = ScaleOrigin(
            ranges={name: hash_file(staged if staged.is_file() else placed)},
            settings={"device": device.name, "scale_method": method},
        )
        self.records[device.name].update(scales={path.name: origin for path in files})

    def warn(self, text: str) -> None:
        """Log a warning and keep it for the result."""
        _log.warning(text)
        self.warnings.append(text)

    def _measure_config(self, device: Device) -> QuantConfig:
        path = self.layout.dump_stats_path(device.name)
        if self.options.measure_config is None:
            return measure_config(self.plan.family, path)
        config = read_quant_config(self.options.measure_config)
        if config.mode != "MEASURE" or config.measure_exclude != "OUTPUT":
            raise ConfigError(
                "not usable as a MEASURE config here",
                where=self.options.measure_config,
                why=f"mode is {config.mode}, measure_exclude {config.measure_exclude}; the torch engine records "
                "inputs, weights and the outputs INC requires",
                fix="set mode to MEASURE and leave measure_exclude out",
            )
        return with_dump_stats_path(config, path)

    def _quant_config(self, device: Device) -> QuantConfig:
        path = self.layout.dump_stats_path(device.name)
        if self.options.quant_config is None:
            return quant_config(self.plan.family, path, self.options.scale_method or "maxabs_hw")
        config = with_dump_stats_path(read_quant_config(self.options.quant_config), path)
        if config.mode not in ("QUANTIZE", "LOAD"):
            raise ConfigError(
                "not usable as a QUANTIZE config", where=self.options.quant_config, why=f"mode is {config.mode}",
                fix="set mode to QUANTIZE",
            )  # fmt: skip
        get_scales_device(config, device)
        return config

    def _remove_stale(self, written: Sequence[Path]) -> None:
        """Delete rank files that belong to an earlier measurement than the ranges now in place."""
        if self.channels is None:
            return
        for device in self.devices:
            directory = self.layout.device_dir(device.name)
            for path in directory.glob("*_hooks_*"):
                if parse_rank_file(path.name) and path.relative_to(self.layout.root) not in written:
                    path.unlink()


def _check_options(options: RunOptions) -> None:
    if options.engine not in ("auto", "torch"):
        raise UsageError(f"unknown engine {options.engine!r}", fix="choose auto or torch")
    if options.world < 1 or options.world % (options.unified_world or 1):
        raise UsageError(
            f"cannot unify {options.world} ranks into {options.unified_world}",
            why="-r must divide -t",
            fix="choose a divisor of -t for -r",
        )
    if options.scale_method and options.quant_config:
        raise UsageError("--scale-method and --config-quant both name the scale method", fix="give one of them")


def _prepare(run: _Run) -> None:
    """Prepare prompts."""
    run.prompts = prepare_prompts(str(run.plan.checkpoint.directory), **run.options.dataset)
    _log.info("%d prompts, %d tokens", len(run.prompts), run.prompts.token_count)


def _measure(run: _Run) -> None:
    """Measure ranges."""
    from tqdm import tqdm

    from gaudi_calib.engines.torch_stream import DEFAULT_WORLDS, measure_channels

    assert run.prompts is not None
    with tqdm(total=run.prompts.token_count, unit="tok", unit_scale=True, desc="measure") as bar:

        def show(tokens: float) -> None:
            bar.update(tokens) if tokens else bar.unpause()  # loading libraries is not progress

        run.channels = measure_channels(
            run.plan.checkpoint.directory,
            run.prompts.token_ids,
            worlds=DEFAULT_WORLDS,
            required_worlds=run.options.worlds,
            dtype=run.options.dtype,
            compute_dtype=run.options.compute_dtype,
            batch_size=run.options.batch_size,
            on_progress=show,
        )
    write_channel_ranges(run.staging / CHANNEL_RANGES_NAME, run.channels)


def _derive_ranks(run: _Run) -> None:
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
    run: _Run, channels: ChannelRanges, config: QuantConfig, device: Device, world: int
) -> list[RankSet[Node]]:
    if world not in channels.measured_worlds():
        run.warn(
            f"the outputs of row-parallel layers were not measured for {world} ranks; upper bounds stand in "
            f"(measure with -t {world} for the values)"
        )
    return [_select_nodes(apply_kv_cache(derive_rank(channels, rank, world, device)), config) for rank in range(world)]


def _select_nodes(rank_set: RankSet[Node], config: QuantConfig) -> RankSet[Node]:
    """Leave out the nodes that `config` blocks."""

    def blocked(name: str) -> bool:
        node = rank_set.nodes.get(name)
        layer_type = None if node is None else find_layer_type(name, find_op(name, node))
        return config.is_blocked(name, layer_type)

    modules = tuple(name for name in rank_set.modules if not blocked(name))
    nodes = {name: node for name, node in rank_set.nodes.items() if not blocked(name)}
    return RankSet(rank_set.rank, rank_set.world, nodes, modules, rank_set.num_samples)


def _load_ranges(run: _Run) -> None:
    """Read ranges."""
    for device in run.devices:
        directory = run.layout.device_dir(device.name)
        for world in run.options.worlds:
            if directory.is_dir() and world in list_worlds(directory):
                run.ranges[device.name, world] = read_world_dir(directory, world)
                continue
            if not run.layout.channel_ranges.is_file():
                raise FileError(
                    f"no ranges for {world} ranks on {device.name}",
                    where=directory,
                    why=f"neither rank files nor {CHANNEL_RANGES_NAME} of an earlier measurement",
                    fix=f"run `gaudi-calib measure -m MODEL -d DATASET -o OUT -t {world}` first",
                )
            channels = read_channel_ranges(run.layout.channel_ranges)
            config = run.measure_configs[device.name]
            run.ranges[device.name, world] = _derive_world(run, channels, config, device, world)
            for rank_set in run.ranges[device.name, world]:
                write_rank_set(run.staging / device.name, rank_set)


def _quantize(run: _Run) -> None:
    """Compute scales."""
    for device in run.devices:
        config = run.quant_configs[device.name]
        method: MethodTable = parse_scale_method(to_content(config)["scale_method"])
        scales_device = get_scales_device(config, device)
        for world in run.options.worlds:
            for rank_set in run.ranges[device.name, world]:
                selected = _select_nodes(rank_set, config)
                scales = compute_scales(
                    selected,
                    method,
                    scales_device,
                    weights=lambda node, one=rank_set: run.plan.read_rank_weight(node, one.rank, one.world),  # type: ignore[misc]
                )
                written = write_rank_set(run.staging / device.name, scales, method=method.file_tag)
                run.record_scales(device, world, rank_set.rank, written, to_content(config)["scale_method"])
