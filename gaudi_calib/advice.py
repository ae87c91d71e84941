"""The commands that make the files of a run anew, as they are typed: what errors advise."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.fp8 import Device
from gaudi_calib.layout import DeviceLayout, RunLayout


@dataclass(frozen=True)
class Advice:
    """What to run over one directory of rank files.

    Attributes:
        directory: absolute.
        device: the device it is for, None where nothing tells.
        worlds: those of which every rank has ranges.
        has_channels: whether the run has channel ranges, from which every world follows.
        model: directory or hub name of the checkpoint.
        dataset: what it was measured on.
        config: the QUANT_CONFIG that serves it; None: the run's own.
    """

    directory: Path
    device: Device | None
    worlds: Sequence[int]
    has_channels: bool
    model: str = "MODEL"
    dataset: str = "builtin"
    config: Path | None = None

    @property
    def run(self) -> Path:
        """The run directory, if it is one of a run."""
        return self.directory.parent

    def compute_scales(self, world: int) -> str | None:
        """Scales of `world` ranks by this config; None where the directory is no run's."""
        if self.device is None or self.directory.name != self.device.name:
            return None
        words = [*self._name_run(), "-t", world, "--device", self.device.name]
        if self.config and self.config.resolve() != DeviceLayout(self.directory, self.device.name).quant_config:
            words += ["--config-quant", self.config]
        return _spell("quantize", *words)

    def derive(self, world: int, *, flag: str | None = None) -> str | None:
        """Ranges and scales of `world` ranks from what is there; None where that cannot be.

        Args:
            flag: how they share experts, `-u` or `--no-expert-parallel`, where not as the run does.
        """
        ranges = self._reshard(world, flag) if self.has_channels else None if flag else self._convert(world)
        return ranges and " && ".join(filter(None, [ranges, self.compute_scales(world)]))

    def _reshard(self, world: int, flag: str | None) -> str:
        device = ["--device", self.device.name] if self.device else []
        return _spell("reshard", self.run, "-t", world, *([flag] if flag else []), *device)

    def _convert(self, world: int) -> str | None:
        for source in self.worlds:
            if source > world and source % world == 0:
                return _spell("unify", self.directory, "-r", world, "--from-world", source)
        for source in reversed(self.worlds):
            if source < world and world % source == 0:
                return _spell("expand", self.directory, "-w", world, "--from-world", source)
        return None

    def make_for(self, device: Device, world: int) -> str:
        """The same calibration for another device."""
        other = self.run / f"maxabs_quant_{device.name}.json"
        if other.is_file():
            return f"give --quant-config {shlex.quote(str(other))}"
        words = [*self._name_run(), "-t", world, "--device", device.name]
        if self.has_channels:
            return f"make {other.name}: {_spell('quantize', *words)}"
        return f"measure for {device.name}: {_spell('calibrate', *words, '-d', self.dataset)}"

    def measure(self, world: int) -> str:
        """A measurement with `world` ranks."""
        return _spell("measure", *self._name_run(), "-d", self.dataset, "-t", world)

    def expand(self) -> str:
        """Upper bounds for any world, from what is there."""
        return _spell("expand", self.directory, "-w", "N")

    def merge_whole(self, runs: Sequence[Path]) -> str:
        """The runs merged with their channel ranges, in place."""
        return _spell("merge", *dict.fromkeys(runs), "-o", self.run)

    def _name_run(self) -> list[object]:
        words: list[object] = ["-m", self.model, "-o", self.run.parent]
        if RunLayout(self.run.parent, self.model).root != self.run:
            words += ["--name", self.run.name]
        return words


def advise_repeating(command: Sequence[str]) -> str:
    """What to do about a run that failed, given the command line that its manifest records."""
    program, *words = command or [""]
    if words and Path(program).name in ("gaudi-calib", "__main__.py"):
        return f"run it again: {_spell(*words)}"
    return "calibrate again"


def _spell(*words: object) -> str:
    return shlex.join(["gaudi-calib", *map(str, words)])
