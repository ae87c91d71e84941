"""How the scale files of a directory are made, as far as its surroundings tell, and the command that makes them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gaudi_calib.config.methods import SCALE_METHODS, MethodTable
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import hash_file
from gaudi_calib.fp8 import DEVICES, HP_DTYPES, Device
from gaudi_calib.layout import RankFile
from gaudi_calib.ranges.derive import select_nodes
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.scales.compute import WeightReader, compute_scales, require_precision

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan
    from gaudi_calib.config.model import QuantConfig
    from gaudi_calib.manifest import Record

# Returns what reads the weights of a rank.
OpenWeights = Callable[[RankSet[Node]], WeightReader]


class Recipe(NamedTuple):
    """How the scale files of one method are made.

    Attributes:
        config: the method of every node, and which nodes have scales.
        device: the device that will serve.
    """

    config: "QuantConfig"
    device: Device

    @classmethod
    def of_method(cls, tag: str, source: CalibrationDir, device: Device) -> "Recipe":
        """Return that of a published method, in upper case, for all nodes: its own backoffs, in what was measured."""
        from gaudi_calib.config.model import QuantConfig

        hp_dtype = HP_DTYPES[(source.manifest and source.manifest.dtype) or "bfloat16"]
        return cls(QuantConfig(scale_method=tag, hp_dtype=hp_dtype, dump_stats_path="./ranges"), device)

    @property
    def table(self) -> MethodTable:
        """The method of every node."""
        return self.config.method_table

    @property
    def tag(self) -> str:
        """The method in the names of the files, upper case."""
        return self.table.file_tag

    @property
    def scales_device(self) -> Device:
        """The device whose FP8 range and free scales apply.

        Raises:
            ConfigError: the config asks for one that does not go with the device.
        """
        from gaudi_calib.config.model import get_scales_device

        return get_scales_device(self.config, self.device)

    def require_possible(self) -> None:
        """Raise ConfigError where INC could not compute such scales for the device."""
        _ = self.scales_device
        require_precision(self.table, self.config.hp_dtype)

    def select(self, ranks: Iterable[RankSet[Node]]) -> list[RankSet[Node]]:
        """Return the nodes that have scales."""
        return [select_nodes(rank_set, self.config) for rank_set in ranks]

    def compute(
        self, ranks: Iterable[RankSet[Node]], weights: OpenWeights | None = None, *, allows_idle: bool = False
    ) -> Iterator[RankSet[ScaleNode]]:
        """Yield the scales of every rank; without weights, consecutive ranks of the same ranges are solved once.

        Args:
            weights: None where there is no checkpoint.
            allows_idle: see `compute_scales`.

        Raises:
            RangeError: see `compute_scales`.
        """
        table, device = self.table, self.scales_device
        last: RangeTable | None = None
        for rank_set in ranks:
            ranges = tabulate_ranges(rank_set.nodes)
            if last is not ranges or weights is not None:
                solved = compute_scales(
                    replace(rank_set, nodes=ranges),
                    table,
                    device,
                    weights=weights(rank_set) if weights else lambda _: None,
                    hp_dtype=self.config.hp_dtype,
                    allows_idle=allows_idle,
                )
                last = ranges
            yield replace(solved, rank=rank_set.rank, dump=rank_set.dump)

    def record(self, record: "Record", staging: Path, out: Path, ranks: Iterable[RankSet]) -> None:
        """Note which ranges, in `staging` or else in `out`, the scale files of `ranks` were computed from, and how."""
        from gaudi_calib.config.model import describe_scaling
        from gaudi_calib.manifest import ScaleOrigin

        settings = describe_scaling(self.config, self.device)
        for rank_set in ranks:
            ranges = RankFile(rank_set.dump, rank=rank_set.rank, world=rank_set.world, extension="npz")
            place = staging if (staging / ranges.name).is_file() else out
            scales = replace(ranges, method=self.tag)
            origin = ScaleOrigin(ranges={ranges.name: hash_file(place / ranges.name)}, settings=settings)
            record.update(scales=dict.fromkeys((replace(scales, extension="json").name, scales.name), origin))


def open_weights(plan: "ModelPlan", topology: Topology) -> OpenWeights:
    """Return what reads the weights of the ranks of `topology`."""
    return lambda rank_set: partial(plan.read_rank_weight, rank=rank_set.rank, topology=topology)


def advise_scales(
    place: CalibrationDir, world: int, tag: str | None, model: str | None = None, device: Device | None = None
) -> str | None:
    """Return what computes the scales in `place` of the method called `tag`; None where no command does.

    Args:
        tag: None: the method of the run's config, or the default.
        model: the checkpoint; None: the one that was measured.
        device: the device that will serve, where `place` does not tell.
    """
    advice = place.advise(model)
    advice = replace(advice, device=advice.device or device)
    config = place.quant_config
    if tag is None or (config and config.method_table.file_tag == tag):
        return advice.compute_scales(world, needs_model=config is not None and config.method_table.needs_weights)
    if tag not in SCALE_METHODS:
        return None
    return advice.compute_scales(world, method=tag, needs_model=SCALE_METHODS[tag].needs_weights)


def find_recipe(source: CalibrationDir, tag: str, device: str | None) -> Recipe | str:
    """Tell how the scales of method `tag` in `source` are computed, or why they cannot be without a checkpoint.

    Backoffs and overrides come from the run's QUANTIZE config where its method is `tag`.

    Raises:
        UsageError: `device` contradicts what is known.
    """
    known, config = source.settle_device(device), source.quant_config
    if known is None:
        return f"nothing says which device will serve (--device does: {' or '.join(DEVICES)})"
    if tag not in SCALE_METHODS:
        return "the method is not known"
    is_its_own = config is not None and config.method_table.file_tag == tag
    recipe = Recipe(config, known) if config is not None and is_its_own else Recipe.of_method(tag, source, known)
    return "they need the weights" if recipe.table.needs_weights else recipe
