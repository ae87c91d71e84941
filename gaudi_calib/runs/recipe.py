"""How the scale files of a directory are made, as far as its surroundings tell, and the command that makes them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.config.methods import SCALE_METHODS, MethodTable
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges
from gaudi_calib.scales.compute import WeightReader, compute_scales

if TYPE_CHECKING:
    from gaudi_calib.config.model import QuantConfig


class Recipe(NamedTuple):
    """How the scale files of one method are made.

    Attributes:
        tag: the method in their names, upper case.
        table: the method of every node.
        device: the device that will serve.
        config: what says so; None for the method's own backoffs.
    """

    tag: str
    table: MethodTable
    device: Device
    config: "QuantConfig | None" = None

    @property
    def needs_weights(self) -> bool:
        """Whether ranges are not enough."""
        return needs_weights(self.table)

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest records about it."""
        from gaudi_calib.config.model import QuantConfig, describe_scaling

        config = self.config or QuantConfig(scale_method=self.tag, dump_stats_path="./ranges")
        return describe_scaling(config, self.device)

    @property
    def hp_dtype(self) -> str:
        """What INC computes them in."""
        return self.config.hp_dtype if self.config else "BF16"

    @property
    def scales_device(self) -> Device:
        """The device whose FP8 range and free scales apply."""
        if self.config is None:
            return self.device
        from gaudi_calib.config.model import get_scales_device

        return get_scales_device(self.config, self.device)

    def compute(
        self,
        ranks: Sequence[RankSet[Node]],
        read_weights: Callable[[RankSet[Node]], WeightReader] | None = None,
        *,
        allows_idle: bool = False,
    ) -> list[RankSet[ScaleNode]]:
        """Return the scales of every rank; consecutive ranks of the same ranges are solved once.

        Args:
            read_weights: what reads the weights of a rank; None where there is no checkpoint.
            allows_idle: see `compute_scales`.

        Raises:
            RangeError: see `compute_scales`.
        """
        scales: list[RankSet[ScaleNode]] = []
        last: RangeTable | None = None
        for rank_set in ranks:
            table = tabulate_ranges(rank_set.nodes)
            if last is None or last is not table or read_weights is not None:
                solved = compute_scales(
                    replace(rank_set, nodes=table),
                    self.table,
                    self.scales_device,
                    weights=read_weights(rank_set) if read_weights else lambda _: None,
                    hp_dtype=self.hp_dtype,
                    allows_idle=allows_idle,
                )
                last = table
            scales.append(replace(solved, rank=rank_set.rank, dump=rank_set.dump))
        return scales


def needs_weights(table: MethodTable) -> bool:
    """Whether scales of `table` come from weights themselves."""
    return any(method.weight.is_per_channel or method.weight.scale_value_type == "OPT" for method in table.methods)


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
        return advice.compute_scales(world, needs_model=config is not None and needs_weights(config.method_table))
    if tag not in SCALE_METHODS:
        return None
    return advice.compute_scales(world, method=tag, needs_model=needs_weights(MethodTable(SCALE_METHODS[tag])))


def find_recipe(source: CalibrationDir, tag: str, device: str | None) -> Recipe | str:
    """Tell how the scales of method `tag` in `source` are computed, or why they cannot be without a checkpoint.

    Backoffs and overrides come from the run's QUANTIZE config where its method is `tag`.

    Raises:
        UsageError: `device` contradicts what is known.
    """
    known = source.settle_device(device)
    if known is None:
        return f"nothing says which device will serve (--device does: {' or '.join(DEVICES)})"
    if tag not in SCALE_METHODS:
        return "the method is not known"
    config = source.quant_config
    if config is not None and config.method_table.file_tag != tag:
        config = None
    table = MethodTable(SCALE_METHODS[tag]) if config is None else config.method_table
    recipe = Recipe(tag, table, known, config)
    return "they need the weights" if recipe.needs_weights else recipe
