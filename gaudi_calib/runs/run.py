"""One calibration run: its options, what the steps share, and its result.

Everything is validated before the first step. Steps write into a staging directory,
whose files are renamed into `OUT/<model>/` together when the last step has succeeded.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaudi_calib.config.file import read_quant_config, write_quant_config
from gaudi_calib.config.model import QuantConfig, describe_scaling, get_scales_device, to_content, with_dump_stats_path
from gaudi_calib.config.presets import measure_config, quant_config
from gaudi_calib.data.prompts import Prompts
from gaudi_calib.errors import ConfigError, ModelError
from gaudi_calib.files import REPLACED_NAME, hash_file, set_aside, stage_files
from gaudi_calib.fp8 import Device, get_device
from gaudi_calib.layout import RankFile, parse_rank_file
from gaudi_calib.manifest import (
    DatasetFacts,
    ModelFacts,
    Record,
    ScaleOrigin,
    Topology,
    check_scales_fresh,
    hash_files,
    read_manifest,
    record_run,
)
from gaudi_calib.models.fingerprint import fingerprint_model
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import Node, Op, RankSet
from gaudi_calib.ranges.topology import Topology as RankTopology
from gaudi_calib.runs.evidence import NOTE as SHARING_NOTE
from gaudi_calib.runs.options import RunOptions, check_options
from gaudi_calib.runs.reshard import VLLM_NOTE

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan

_log = logging.getLogger(__name__)


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
        expert_parallel: whether ranks hold whole experts.
    """

    root: Path
    files: tuple[Path, ...]
    quant_configs: Mapping[str, Path]
    worlds: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    serve_flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    expert_parallel: bool = False

    def serve_command(self, model: str, world: int) -> list[str]:
        """Return the words of the command that serves `model` on a Gaudi."""
        experts = ["--enable-expert-parallel"] if self.expert_parallel and world > 1 else []
        return ["vllm", "serve", model, *self.serve_flags, "--tensor-parallel-size", str(world), *experts]


class Run:
    """State shared by the steps.

    Attributes:
        plan: nodes of the model.
        measure_configs, quant_configs: by device name.
        staging: where steps write; renamed into the run directory at the end.
        prompts, channels: results of the steps before.
        ranges: per device name and world, all ranks.
        records: the manifest in progress, by device name.
        reshared: (device name, world) of files in place that are not known to share experts as
            they are to be shared now.
    """

    def __init__(self, options: RunOptions, *, serves: bool, fresh: bool = True):
        """Validate everything.

        Args:
            serves: whether scales and QUANTIZE configs are written.
            fresh: False where the run adds to an earlier one.
        """
        from gaudi_calib.checkpoints.checkpoint import resolve_model
        from gaudi_calib.checkpoints.plan import plan_model

        check_options(options)
        self.warnings: list[str] = []
        self.options, self.layout, self.serves, self.fresh = options, options.layout, serves, fresh
        self.devices = [get_device(name) for name in options.devices]
        self.plan: ModelPlan = plan_model(resolve_model(options.model), options.dtype)
        if options.expert_parallel and not self.plan.experts:
            self.warn("-u/--expert-parallel has no effect: the model has no experts")
        for world in options.worlds:
            self.plan.require_topology(self.topology(world))
        self.measure_configs = {device.name: self._measure_config(device) for device in self.devices}
        self.quant_configs = {device.name: self._quant_config(device) for device in self.devices}
        for config in (*self.measure_configs.values(), *self.quant_configs.values()):
            self._require_blocked(config)
        self.needs_ranges = not serves or any(one.uses_stats_files for one in self.quant_configs.values())
        self.staging = Path()
        self.prompts: Prompts | None = None
        self.channels: ChannelRanges | None = None
        self.ranges: dict[tuple[str, int], list[RankSet[Node]]] = {}
        self.records: dict[str, Record] = {}
        self.reshared: set[tuple[str, int]] = set()

    @cached_property
    def expert_parallel(self) -> bool:
        """Whether ranks hold whole experts: as asked for, else as measured, else as the family is served."""
        if not self.plan.experts:
            return False
        if self.options.expert_parallel is not None:
            return self.options.expert_parallel
        for device in self.devices if not self.fresh else ():
            path = self.layout.manifest(device.name)
            good = read_manifest(path).good if path.is_file() else None
            if good is not None and good.topology.worlds:
                noted = good.notes.get(SHARING_NOTE, {})
                return noted.get(str(self.options.world), good.topology.expert_parallel)
        return self.plan.family.expert_parallel

    def topology(self, world: int) -> RankTopology:
        """How `world` ranks share the model."""
        return RankTopology(world, self.expert_parallel)

    def execute(self, steps: Sequence[Callable[["Run"], None]]) -> RunResult:
        """Run `steps`, then rename what they wrote into the run directory."""
        if not self.needs_ranges:
            self.warn("this scale method needs no measurement: only QUANT_CONFIG is written")
            steps = []
        with self._recorded():
            with stage_files(self.layout.root) as self.staging:
                for number, step in enumerate(steps, 1):
                    _log.info("Step %d/%d: %s", number, len(steps), (step.__doc__ or "").strip().rstrip("."))
                    with self._timed(step.__name__.strip("_")):
                        step(self)
                if self.serves:
                    for name, config in self.quant_configs.items():
                        write_quant_config(self.staging / self.layout.quant_config(name).name, config)
                files = [path.relative_to(self.staging) for path in sorted(self.staging.rglob("*")) if path.is_file()]
            self._set_aside(files)
            self._record_files()
        return self._result(files)

    def _result(self, files: Sequence[Path]) -> RunResult:
        config = next(iter(self.quant_configs.values()))
        # A checkpoint that is quantized keeps its own method; QUANT_CONFIG alone turns INC on.
        quantized = "quantization_config" in self.plan.checkpoint.config
        flags: tuple[str, ...] = () if quantized else ("--quantization", "inc")
        if not self._blocks_caches(config):
            flags += ("--kv-cache-dtype", "fp8_inc")
        return RunResult(
            self.layout.root,
            tuple(self.layout.root / path for path in files),
            {name: self.layout.quant_config(name) for name in self.quant_configs} if self.serves else {},
            self.options.worlds if self.needs_ranges else (),
            tuple(self.warnings),
            flags,
            {**self.plan.family.env, **config.required_env},
            self.expert_parallel,
        )

    def _note_sharing(self, device: Device, record: Record) -> None:
        noted = record.manifest.notes.get(SHARING_NOTE, {})
        self.reshared |= {
            (device.name, world) for world in self.options.worlds if noted.get(str(world)) is not self.expert_parallel
        }
        now = {str(world): self.expert_parallel for world in self.options.worlds}
        record.update(notes={SHARING_NOTE: {**noted, **now}})

    def _blocks_caches(self, config: QuantConfig) -> bool:
        caches = [name for name, op in self.plan.attention_ops.items() if op is Op.KV_CACHE]
        names = [self.plan.attention_node(layer, cache) for layer in self.plan.attention_layers for cache in caches]
        return all(config.is_blocked(name, find_layer_type(name, Op.KV_CACHE)) for name in names)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep a manifest for every device while the block runs."""
        model = ModelFacts(
            name=self.options.model,
            fingerprint=fingerprint_model(self.plan.checkpoint.directory),
            model_type=self.plan.checkpoint.config["model_type"],
            family=self.plan.family.name,
        )
        with ExitStack() as stack:
            for device in self.devices:
                path = self.layout.manifest(device.name)
                made = {"device": device.name, "platform": self.options.platform, "engine": self.options.engine}
                facts = made if self.fresh else {}
                record = stack.enter_context(record_run(path, fresh=self.fresh, model=model, **facts))
                worlds = sorted({*record.manifest.topology.worlds, *self.options.worlds})
                if self.plan.experts:
                    self._note_sharing(device, record)
                measured = self.options.world if self.options.engine == "vllm" else 1
                if not self.fresh:
                    measured = record.manifest.topology.measured_world or 1
                shared = self.expert_parallel
                record.update(topology=Topology(measured_world=measured, worlds=worlds, expert_parallel=shared))
                if self.options.vllm:
                    record.update(notes={VLLM_NOTE: self.options.vllm})
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
            record.update(config=config, files=hash_files(directory))
            if self.prompts is not None:
                sizes = {"prompts": len(self.prompts), "tokens": self.prompts.token_count}
                record.update(dataset=DatasetFacts(name=self.prompts.dataset, hash=self.prompts.sha256, **sizes))
            for stale in check_scales_fresh(record.manifest.updated(status="ok"), directory):
                self.warn(f"{directory / stale.name} is stale: {stale.why}; `gaudi-calib quantize` computes it anew")

    def require_same_model(self, device: Device) -> None:
        """Raise ModelError where the ranges in place were measured on other weights, as far as the manifest knows."""
        manifest = self.records[device.name].manifest
        before = manifest.last_good and manifest.last_good.model
        now = manifest.model
        if before and now and before.fingerprint and before.fingerprint != now.fingerprint:
            raise ModelError(
                f"the ranges for {device.name} were measured on another checkpoint",
                where=self.layout.device_dir(device.name),
                why=f"the fingerprint of {self.options.model!r} is not that of {before.name!r} when it was measured",
                fix="give the model that was measured, or run `gaudi-calib measure` with this one",
            )

    def note(self, device: Device, **notes: Any) -> None:
        """Add `notes` to the manifest of `device`."""
        self.records[device.name].update(notes=notes)

    def record_scales(self, device: Device, ranks: RankSet, files: Sequence[Path]) -> None:
        """Note which ranges, and which settings, the scale `files` of one rank were computed from."""
        name = RankFile(rank=ranks.rank, world=ranks.world, extension="npz").name
        staged, placed = self.staging / device.name / name, self.layout.device_dir(device.name) / name
        origin = ScaleOrigin(
            ranges={name: hash_file(staged if staged.is_file() else placed)},
            settings=describe_scaling(self.quant_configs[device.name], device),
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
        if config.mode not in ("QUANTIZE", "LOAD") or config.fp8_config != "E4M3":
            raise ConfigError(
                "not usable as a QUANTIZE config here",
                where=self.options.quant_config,
                why=f"mode is {config.mode}, fp8_config {config.fp8_config}",
                fix="set mode to QUANTIZE, and fp8_config to E4M3, for which scales are computed",
            )
        get_scales_device(config, device)
        return config

    def _require_blocked(self, config: QuantConfig) -> None:
        free = [name for name in self.plan.unmeasured if not config.is_blocked(name)]
        if free and config.uses_stats_files:
            raise ConfigError(
                f"{free[0]} cannot be measured (nor {len(free) - 1} more)",
                where="blocklist",
                why="no engine measures such layers, and serving fails where one that is not blocked has no ranges",
                fix="add " + ", ".join(repr(name) for name in self.plan.family.blocklist) + " to the blocklist's names",
            )

    def _set_aside(self, written: Sequence[Path]) -> None:
        """Move rank files of an earlier measurement out of the way of the ranges now in place."""
        if not (self.fresh and self.ranges):
            return
        channels = self.layout.channel_ranges
        if self.channels is None and channels.is_file():
            set_aside([channels])
        for device in self.devices:
            directory = self.layout.device_dir(device.name)
            old = [path for path in directory.iterdir() if parse_rank_file(path.name)]
            old = [path for path in old if path.relative_to(self.layout.root) not in written]
            set_aside(old)
            if old:
                self.warn(f"{len(old)} files of an earlier measurement were moved to {directory / REPLACED_NAME}")
