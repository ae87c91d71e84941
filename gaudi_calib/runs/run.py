"""One calibration run: what its steps share, and its result.

Everything is validated before the first step. Steps write into a staging directory,
whose files are renamed into `OUT/<model>/` together when the last step has succeeded.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.config.file import read_quant_config, write_quant_config
from gaudi_calib.config.model import (
    QuantConfig,
    describe_scaling,
    find_idle_patterns,
    get_scales_device,
    to_content,
    with_dump_stats_path,
)
from gaudi_calib.config.presets import measure_config, quant_config
from gaudi_calib.data.prompts import Prompts
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, ModelError
from gaudi_calib.files import hash_file
from gaudi_calib.fp8 import Device, get_device
from gaudi_calib.layout import DeviceLayout, RankFile, list_rank_files
from gaudi_calib.manifest import DatasetFacts, ModelFacts, Record, ScaleOrigin, WorldFacts, record_run
from gaudi_calib.models.fingerprint import fingerprint_model
from gaudi_calib.models.source import download_model
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.runs.options import RunOptions, check_options
from gaudi_calib.staging import REPLACED_NAME, claim_directory, set_aside, stage_files

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
    """

    root: Path
    files: tuple[Path, ...]
    quant_configs: Mapping[str, Path]
    worlds: tuple[int, ...]
    warnings: tuple[str, ...] = ()


@dataclass
class Target:
    """What a run makes for one device.

    Attributes:
        device: the device that will serve.
        layout: where its files go in the end.
        measure_config, quant_config: of the two phases.
        ranges: all ranks by world, as far as steps have made or read them.
        reshared: worlds whose files in place are not known to share experts as they are to be shared now.
        record: the manifest in progress, while the run executes.
    """

    device: Device
    layout: DeviceLayout
    measure_config: QuantConfig
    quant_config: QuantConfig
    ranges: dict[int, list[RankSet[Node]]] = field(default_factory=dict)
    reshared: set[int] = field(default_factory=set)
    record: Record = field(init=False)


class Run:
    """State shared by the steps.

    Attributes:
        plan: nodes of the model.
        targets: one per device that will serve.
        staging: where steps write; renamed into the run directory at the end.
        prompts, channels: results of the steps before.
    """

    def __init__(self, options: RunOptions, *, serves: bool, fresh: bool = True):
        """Validate everything.

        Args:
            serves: whether scales and QUANTIZE configs are written.
            fresh: False where the run adds to an earlier one.
        """
        from gaudi_calib.checkpoints.plan import plan_model

        check_options(options)
        self.warnings: list[str] = []
        self.options, self.layout, self.serves, self.fresh = options, options.layout, serves, fresh
        self.plan: ModelPlan = plan_model(download_model(options.model), options.dtype)
        if options.expert_parallel and not self.plan.experts:
            self.warn("-u/--expert-parallel has no effect: the model has no experts")
        for world in options.worlds:
            self.plan.require_topology(self.topology(world))
        self.targets = [self._make_target(get_device(name)) for name in options.devices]
        for target in self.targets:
            self._require_blocked(target.measure_config)
            self._require_blocked(target.quant_config)
        self.needs_ranges = not serves or any(target.quant_config.uses_stats_files for target in self.targets)
        self.staging = Path()
        self.prompts: Prompts | None = None
        self.channels: ChannelRanges | None = None

    @cached_property
    def expert_parallel(self) -> bool:
        """Whether ranks hold whole experts: as asked for, else as measured, else as the family is served."""
        if not self.plan.experts:
            return False
        if self.options.expert_parallel is not None:
            return self.options.expert_parallel
        for name in self.options.devices if not self.fresh else ():
            manifest = CalibrationDir(self.layout.device(name).directory).manifest
            if manifest is not None and manifest.worlds:
                return manifest.shares_experts(self.options.world)
        return self.plan.family.expert_parallel

    def topology(self, world: int) -> Topology:
        """How `world` ranks share the model."""
        return Topology(world, self.expert_parallel)

    def describe_world(self, *, is_bounded: bool = False) -> WorldFacts:
        """What the manifest says about a world whose files this run makes."""
        return WorldFacts(expert_parallel=self.expert_parallel if self.plan.experts else None, is_bounded=is_bounded)

    def execute(self, steps: Sequence[Callable[["Run"], None]]) -> RunResult:
        """Run `steps`, then rename what they wrote into the run directory."""
        if not self.needs_ranges:
            self.warn("this scale method needs no measurement: only QUANT_CONFIG is written")
            steps = []
        with claim_directory(self.layout.root), self._recorded():
            with stage_files(self.layout.root) as self.staging:
                for number, step in enumerate(steps, 1):
                    _log.info("Step %d/%d: %s", number, len(steps), (step.__doc__ or "").strip().rstrip("."))
                    self._take(step)
                if self.serves:
                    for target in self.targets:
                        write_quant_config(self.staging / target.layout.quant_config.name, target.quant_config)
                files = [path.relative_to(self.staging) for path in sorted(self.staging.rglob("*")) if path.is_file()]
                replaced = self._set_aside(files)
                self._record_files(replaced)
            self._warn_changed(replaced)
        return RunResult(
            self.layout.root,
            tuple(self.layout.root / path for path in files),
            {target.device.name: target.layout.quant_config for target in self.targets} if self.serves else {},
            self.options.worlds if self.needs_ranges else (),
            tuple(self.warnings),
        )

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep a manifest for every device while the block runs."""
        model = ModelFacts(
            name=self.options.model,
            fingerprint=fingerprint_model(self.plan.checkpoint.directory),
            model_type=self.plan.checkpoint.source.model_type,
            family=self.plan.family.name,
        )
        with ExitStack() as stack:
            for target in self.targets:
                made = {"device": target.device.name, "platform": self.options.platform, "engine": self.options.engine}
                facts = made if self.fresh else {}
                recorded = record_run(target.layout.manifest, fresh=self.fresh, model=model, **facts)
                target.record = stack.enter_context(recorded)
                self._record_worlds(target)
            yield

    def _record_worlds(self, target: Target) -> None:
        before, now = target.record.manifest.worlds, self.describe_world()
        target.reshared = {
            world
            for world in self.options.worlds
            if world not in before or before[world].expert_parallel is not now.expert_parallel
        }
        measured = self.options.world if self.options.engine == "vllm" else 1
        if not self.fresh:
            measured = target.record.manifest.measured_world or 1
        target.record.update(
            measured_world=measured,
            expert_parallel=self.expert_parallel,
            worlds=dict.fromkeys(target.reshared, now),
            vllm=self.options.vllm or target.record.manifest.vllm,
        )

    def _take(self, step: Callable[["Run"], None]) -> None:
        """Run a step; the manifests say how long it took, even where it fails."""
        start = time.perf_counter()
        try:
            step(self)
        finally:
            seconds = round(time.perf_counter() - start, 3)
            for target in self.targets:
                target.record.update(timings_s={step.__name__.strip("_"): seconds})

    def _record_files(self, replaced: Collection[Path]) -> None:
        """Complete the manifests, and stage them with the files they describe."""
        for target in self.targets:
            config = {"measure": to_content(target.measure_config)} if target.ranges else {}
            if self.serves:
                config["quantize"] = to_content(target.quant_config)
            staging = self.staging / target.device.name
            files = CalibrationDir(target.layout.directory).hash_files(staging, without=replaced)
            target.record.update(config=config, files=files)
            if self.prompts is not None:
                sizes = {"prompts": len(self.prompts), "tokens": self.prompts.token_count}
                target.record.update(dataset=DatasetFacts(name=self.prompts.dataset, hash=self.prompts.sha256, **sizes))
            target.record.stage(staging)

    def _warn_changed(self, replaced: Sequence[Path]) -> None:
        """Warn of earlier files that the new ones make useless."""
        for target in self.targets:
            directory = target.layout.directory
            old = [path for path in replaced if path.parent == directory]
            if old:
                self.warn(f"{len(old)} files of an earlier measurement were moved to {directory / REPLACED_NAME}")
            for stale in CalibrationDir(target.layout.directory).find_stale():
                self.warn(f"{stale.path} is stale: {stale.why}; `gaudi-calib quantize` computes it anew")

    def require_same_model(self, target: Target) -> None:
        """Raise ModelError where the ranges in place were measured on other weights, as far as the manifest knows."""
        manifest = target.record.manifest
        before = manifest.last_good and manifest.last_good.model
        now = manifest.model
        if before and now and before.fingerprint and before.fingerprint != now.fingerprint:
            raise ModelError(
                f"the ranges for {target.device.name} were measured on another checkpoint",
                where=target.layout.directory,
                why=f"the fingerprint of {self.options.model!r} is not that of {before.name!r} when it was measured",
                fix="give the model that was measured, or run `gaudi-calib measure` with this one",
            )

    def record_scales(self, target: Target, ranks: RankSet, files: Sequence[Path]) -> None:
        """Note which ranges, and which settings, the scale `files` of one rank were computed from."""
        name = RankFile(rank=ranks.rank, world=ranks.world, extension="npz").name
        staged, placed = self.staging / target.device.name / name, target.layout.directory / name
        origin = ScaleOrigin(
            ranges={name: hash_file(staged if staged.is_file() else placed)},
            settings=describe_scaling(target.quant_config, target.device),
        )
        target.record.update(scales={path.name: origin for path in files})

    def warn(self, text: str) -> None:
        """Log a warning and keep it for the result."""
        _log.warning(text)
        self.warnings.append(text)

    def warn_idle_patterns(self, config: QuantConfig) -> None:
        """Warn of patterns of `config` that match no node."""
        for finding in find_idle_patterns(config, self.plan.node_names):
            self.warn(f"{finding.what} ({finding.where})")

    def _make_target(self, device: Device) -> Target:
        layout = self.layout.device(device.name)
        return Target(device, layout, self._measure_config(layout), self._quant_config(layout, device))

    def _measure_config(self, layout: DeviceLayout) -> QuantConfig:
        if self.options.measure_config is None:
            return measure_config(self.plan.family, layout.dump_stats_path)
        config = read_quant_config(self.options.measure_config)
        if config.mode != "MEASURE" or config.measure_exclude != "OUTPUT":
            raise ConfigError(
                "not usable as a MEASURE config here",
                where=self.options.measure_config,
                why=f"mode is {config.mode}, measure_exclude {config.measure_exclude}; the torch engine records "
                "inputs, weights and the outputs INC requires",
                fix="set mode to MEASURE and leave measure_exclude out",
            )
        return with_dump_stats_path(config, layout.dump_stats_path)

    def _quant_config(self, layout: DeviceLayout, device: Device) -> QuantConfig:
        if self.options.quant_config is None:
            return quant_config(self.plan.family, layout.dump_stats_path, self.options.scale_method or "maxabs_hw")
        config = with_dump_stats_path(read_quant_config(self.options.quant_config), layout.dump_stats_path)
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

    def _set_aside(self, written: Sequence[Path]) -> list[Path]:
        """Move rank files of an earlier measurement out of the way of the new ranges, and return them."""
        replaced: list[Path] = []
        if not (self.fresh and any(target.ranges for target in self.targets)):
            return replaced
        if self.channels is None and self.layout.channel_ranges.is_file():
            replaced.append(self.layout.channel_ranges)
        for target in self.targets:
            old = list_rank_files(target.layout.directory)
            replaced += [path for path in old if path.relative_to(self.layout.root) not in written]
        set_aside(self.staging, replaced)
        return replaced
