"""One calibration run: what its steps share, and its result.

Everything is validated before the first step. Steps write into a staging directory,
whose files are renamed into `OUT/<model>/` together when the last step has succeeded.
"""

import logging
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.config.model import QuantConfig, find_idle_patterns, to_content
from gaudi_calib.config.presets import Preset
from gaudi_calib.data.prompts import Prompts
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.fp8 import DEVICES, Device, get_device
from gaudi_calib.gaps import find_uncovered, refuse_uncovered, require_dynamic
from gaudi_calib.layout import CHANNEL_RANGES_NAME, DeviceLayout, list_rank_files
from gaudi_calib.manifest import ModelFacts, PresetFacts, Record, WorldFacts, record_run
from gaudi_calib.models.field import list_idle
from gaudi_calib.models.source import download_model
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.convergence import Convergence
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.ranges.unify import gather_world
from gaudi_calib.runs.configs import (
    choose_devices,
    choose_dtype,
    choose_measure_config,
    choose_preset,
    choose_quant_config,
    describe_failure,
    find_side_config,
    require_blocked,
    require_observable,
    stage_config,
)
from gaudi_calib.runs.facts import describe_dataset, describe_model
from gaudi_calib.runs.options import RunOptions, check_options
from gaudi_calib.runs.recipe import Recipe, advise_scales
from gaudi_calib.runs.sharing import find_evidence, settle_expert_parallel
from gaudi_calib.staging import REPLACED_NAME, claim_directory, set_aside, stage_files

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan

_log = logging.getLogger(__name__)

# Facts of a measurement that hold for every device.
_INHERITED = (
    "dataset",
    "platform",
    "engine",
    "dtype",
    "vllm",
    "measured_world",
    "measurement",
    "merged",
    "merged_datasets",
)


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
        quant_path: file of `quant_config`; the layout's, or another one in the run that the user chose.
        preset: where their settings come from that nobody asked for.
        ranges: all ranks by world, as far as steps have made or read them.
        reshared: worlds whose files in place are not known to share experts as they are to be shared now.
        record: the manifest in progress, while the run executes.
    """

    device: Device
    layout: DeviceLayout
    measure_config: QuantConfig
    quant_config: QuantConfig
    quant_path: Path
    preset: Preset
    ranges: dict[int, list[RankSet[Node]]] = field(default_factory=dict)
    reshared: set[int] = field(default_factory=set)
    record: Record = field(init=False)

    @property
    def saves_tensors(self) -> bool:
        """Whether measuring leaves tensors in place of ranges."""
        return self.measure_config.observer == "save"

    @property
    def recipe(self) -> Recipe:
        """How its scales are made."""
        return Recipe(self.quant_config, self.device)

    @property
    def placed(self) -> CalibrationDir:
        """What is in its directory now."""
        return CalibrationDir(self.layout.directory)


class Run:
    """State shared by the steps.

    Attributes:
        plan: nodes of the model.
        targets: one per device that will serve.
        staging: where steps write; renamed into the run directory at the end.
        prompts, channels, convergence: results of the steps before.
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
        self.layout, self.serves, self.fresh = options.layout, serves, fresh
        self.options = options = replace(options, devices=choose_devices(options, fresh=fresh))
        self.dtype = choose_dtype(options, fresh=fresh)
        self.plan: ModelPlan = plan_model(download_model(options.model), self.dtype, options.vllm)
        if self.plan.head and (told := self.plan.head.describe(self.plan.checkpoint)):
            self.warn(told)
        if options.expert_parallel and not self.plan.experts:
            self.warn("-u/--expert-parallel has no effect: the model has no experts")
        if self.dtype != "bfloat16":
            self.warn(
                f"--dtype {self.dtype}: vllm-gaudi serves every model in bfloat16, and INC would convert to "
                f"{self.dtype}; calibrate without --dtype unless another vLLM serves"
            )
        for world in options.worlds:
            self.plan.require_topology(self.topology(world))
        self._require_own_root()
        self.targets = [self._make_target(get_device(name)) for name in options.devices]
        for target in self.targets if serves and fresh else ():
            if target.quant_config.uses_stats_files:
                self.require_covered(target)
        for told in {describe_failure(target.preset, self.plan, target.quant_config) for target in self.targets} - {
            None
        }:
            self.warn(str(told))
        self.needs_ranges = not serves or any(target.quant_config.uses_stats_files for target in self.targets)
        self.staging = Path()
        self.prompts: Prompts | None = None
        self.channels: ChannelRanges | None = None
        self.convergence: Convergence | None = None

    @cached_property
    def expert_parallel(self) -> bool:
        """Whether ranks hold whole experts: as asked for, else as measured, else as the family is served."""
        if not self.plan.experts:
            return False
        if self.options.expert_parallel is not None:
            return self.options.expert_parallel
        for name in self.options.devices if not self.fresh else ():
            placed = CalibrationDir(self.layout.device(name).directory)
            origin = placed.origin
            shared = origin.shares_experts(self.options.world) if origin is not None and origin.worlds else None
            if shared is not None:
                return shared
            if self.options.world > 1 and placed.files and self.options.world in placed.worlds:
                world = gather_world(placed.read_world(self.options.world))
                return settle_expert_parallel(world, None, find_evidence(placed, world, self.plan.checkpoint.directory))
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
                        self.stage_config(target.quant_path, target.quant_config)
                files = [path.relative_to(self.staging) for path in sorted(self.staging.rglob("*")) if path.is_file()]
                replaced = self._set_aside(files)
                self._record_files(replaced)
            self._warn_changed(replaced)
        return RunResult(
            self.layout.root,
            tuple(self.layout.root / path for path in files),
            {target.device.name: target.quant_path for target in self.targets} if self.serves else {},
            self.options.worlds if self.needs_ranges else (),
            tuple(self.warnings),
        )

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep a manifest for every device while the block runs."""
        with ExitStack() as stack:
            for target in self.targets:
                made = {"device": target.device.name, "platform": self.options.platform, "engine": self.options.engine}
                made["dtype"] = self.dtype
                fresh = self.fresh and (self.needs_ranges or target.placed.manifest is None)
                facts = made if fresh else self._inherit(target)
                preset = PresetFacts.model_validate({"name": target.preset.name, "env": target.preset.env})
                recorded = record_run(target.layout.manifest, fresh=fresh, model=self.model, preset=preset, **facts)
                target.record = stack.enter_context(recorded)
                self._record_worlds(target)
            yield

    @cached_property
    def model(self) -> ModelFacts:
        """What the manifests say about the model."""
        return describe_model(self.options.model, self.plan)

    def _inherit(self, target: Target) -> dict[str, object]:
        """What the manifest of a run that adds to an earlier measurement takes over from where that is told."""
        if target.placed.manifest is not None:
            return {"measurement": target.placed.measurement}
        origin = target.placed.origin
        facts = {name: getattr(origin, name) for name in _INHERITED} if origin else {}
        return {"device": target.device.name, **facts}

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
            config = {"measure": to_content(target.measure_config)} if target.ranges or target.saves_tensors else {}
            if self.serves:
                config["quantize"] = to_content(target.quant_config)
            staging = self.staging / target.device.name
            files = target.placed.hash_files(staging, without=replaced)
            target.record.update(config=config, files=files)
            if self.fresh and target.ranges:
                channels = self.staging / CHANNEL_RANGES_NAME if self.channels is not None else None
                target.record.update(measurement=CalibrationDir(staging).identify(channels))
            if self.prompts is not None:
                target.record.update(dataset=describe_dataset(self.prompts))
            target.record.stage(staging)

    def _warn_changed(self, replaced: Sequence[Path]) -> None:
        """Warn of earlier files that the new ones make useless."""
        for target in self.targets:
            directory = target.layout.directory
            old = [path for path in replaced if path.parent == directory]
            if old:
                self.warn(f"{len(old)} files of an earlier measurement were moved to {directory / REPLACED_NAME}")
            placed = target.placed
            for stale in placed.find_stale():
                file = placed.files[stale.path]
                anew = advise_scales(placed, file.position[1], str(file.method), self.options.model)
                self.warn(f"{stale.path} is stale: {stale.why}" + (f"; `{anew}` computes it anew" if anew else ""))

    def _require_own_root(self) -> None:
        """Raise UsageError where a new measurement would lie among files of another checkpoint of the same name."""
        for name in DEVICES if self.fresh else ():
            with suppress(FileError):  # what cannot be read is replaced
                before = CalibrationDir(self.layout.device(name).directory).manifest
                measured = before and before.model
                if not measured or measured.fingerprint in (None, self.model.fingerprint):
                    continue
                if measured.name != self.model.name:
                    root = shlex.quote(str(self.layout.root))
                    raise UsageError(
                        f"the calibration of another checkpoint is in {self.layout.root.name}/",
                        where=self.layout.root,
                        why=f"{measured.name} was measured there, and this is {self.model.name}",
                        fix=f"give this one a name (--name) or another -o, or move that away: mv {root} {root}.other",
                    )
                if name not in self.options.devices:
                    self.warn(f"the files for {name} stay those of the checkpoint as it was before")

    def record_scales(self, target: Target, ranks: RankSet) -> None:
        """Note which ranges, and which settings, the scale files of one rank were computed from."""
        target.recipe.record(target.record, self.staging / target.device.name, target.layout.directory, [ranks])

    def warn(self, text: str) -> None:
        """Log a warning and keep it for the result."""
        _log.warning(text)
        self.warnings.append(text)

    def warn_idle_patterns(self, config: QuantConfig) -> None:
        """Warn of patterns of `config` that match no node."""
        expected = {pattern for target in self.targets for pattern in list_idle(target.preset.name)}
        for finding in find_idle_patterns(config, self.plan.node_names, expected):
            self.warn(f"{finding.what} ({finding.where})")

    def _make_target(self, device: Device) -> Target:
        options, layout = self.options, self.layout.device(device.name)
        preset = choose_preset(options, layout, self.plan, fresh=self.fresh)
        measuring = choose_measure_config(options, layout, preset, self.dtype, fresh=self.fresh)
        serving = choose_quant_config(options, layout, preset, self.dtype)
        path = find_side_config(options) or layout.quant_config
        if self.fresh:
            needs_ranges = self.serves and serving.uses_stats_files
            require_observable(measuring, options, options.measure_config or layout.measure_config, scales=needs_ranges)
        require_blocked(measuring, self.plan, layout.measure_config)
        require_blocked(serving, self.plan, path)
        require_dynamic(serving, self.plan.ops, self.plan.layout, path)
        target = Target(device, layout, measuring, serving, path, preset)
        target.recipe.require_possible()
        return target

    def stage_config(self, path: Path, config: QuantConfig) -> None:
        """Stage a config for `path` in the run; see `configs.stage_config`."""
        stage_config(self.staging, path, config)

    def require_covered(self, target: Target) -> None:
        """Raise ConfigError where a module that INC will quantize has no ranges, or will have none."""
        if target.quant_config.ignore_modules_wo_measures:
            return
        known = None if self.fresh else target.placed.measured_with
        find = partial(find_uncovered, self.plan.ops, target.quant_config, measured_with=known or target.measure_config)
        ranks = [rank_set for ranks in target.ranges.values() for rank_set in ranks]
        found = [find(rank_set.nodes, modules=rank_set.modules) for rank_set in ranks] or [find((), modules=())]
        if any(found):
            path, world = self.options.quant_config or target.quant_path, self.options.world
            advice, changes = target.placed.advise(self.options.model), target.preset.replaces and not self.fresh
            again = advice.calibrate(world, "--preset", target.preset.name) if changes else None
            raise refuse_uncovered(target.placed, next(filter(None, found)), path, world, again)

    def _set_aside(self, written: Sequence[Path]) -> list[Path]:
        """Move rank files of an earlier measurement out of the way of the new ranges, and return them."""
        replaced: list[Path] = []
        if not (self.fresh and any(target.ranges for target in self.targets)):
            return replaced
        if self.channels is None:
            of_channels = (self.layout.channel_ranges, self.layout.convergence)
            replaced += [path for path in of_channels if path.is_file()]
        for target in self.targets:
            old = [*list_rank_files(target.layout.directory)]
            if not self.serves and target.preset.replaces and target.layout.quant_config.is_file():
                old.append(target.layout.quant_config)
            replaced += [path for path in old if path.relative_to(self.layout.root) not in written]
        set_aside(self.staging, replaced)
        return replaced
