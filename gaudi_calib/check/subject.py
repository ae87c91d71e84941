"""What a check looks at: one measurement of one directory, and what surrounds it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.config.model import QuantConfig, get_scales_device
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan


@dataclass
class Subject:
    """One measurement of one directory.

    Attributes:
        place: its files.
        device: the device that will serve, None where nothing tells.
        config_path: the QUANT_CONFIG that serves, None where there is none.
        config: its content, None where it is not usable.
        model: the checkpoint asked for, directory or hub name.
        worlds: numbers of ranks that are looked at.
        ranges: of the ranks that can be read, by world, in rank order.
        plan: the nodes of the model, None where it is not there.
    """

    place: CalibrationDir
    device: Device | None = None
    config_path: Path | None = None
    config: QuantConfig | None = None
    model: str | None = None
    worlds: tuple[int, ...] = ()
    ranges: dict[int, list[RankSet[Node]]] = field(default_factory=dict)
    plan: "ModelPlan | None" = None

    @property
    def scales_device(self) -> Device | None:
        """The device whose FP8 range and free scales apply."""
        return get_scales_device(self.config, self.device) if self.config and self.device else self.device

    @property
    def tag(self) -> str | None:
        """The method that serves from scale files, in upper case; None where no config says so."""
        serves = self.config and self.config.mode == "QUANTIZE" and self.config.uses_stats_files
        return self.config.method_table.file_tag if self.config and serves else None

    def list_methods(self, world: int) -> list[str]:
        """Return the methods of which there are scales, or should be."""
        return sorted({*self.place.list_methods(world), *filter(None, [self.tag])})


def iterate_ranks(subject: Subject) -> Iterator[tuple[RankSet[Node], RangeTable]]:
    """Yield every rank of every world with its ranges as a table."""
    for ranks in subject.ranges.values():
        for rank in ranks:
            yield rank, tabulate_ranges(rank.nodes)
