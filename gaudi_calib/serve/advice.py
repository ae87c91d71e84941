"""The commands that mend what `serve` complains of, as they are typed."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.fp8 import Device
from gaudi_calib.layout import RunLayout


@dataclass(frozen=True)
class Advice:
    """What to run over one calibration.

    Attributes:
        placed: its ranges and scales.
        config: the QUANT_CONFIG that serves them.
        model: directory or hub name of the checkpoint.
    """

    placed: CalibrationDir
    config: Path
    model: str

    @cached_property
    def worlds(self) -> list[int]:
        """Worlds of which every rank has ranges."""
        found = {file.position[1] for file in self.placed.files.values() if file.is_ranges}
        return sorted(world for world in found if not self.placed.list_missing(world))

    @property
    def _run(self) -> Path:
        return self.placed.path.resolve().parent

    def compute_scales(self, world: int) -> str | None:
        """Scales of `world` ranks by this config; None where the directory is no run's."""
        if self.placed.layout is None or self.placed.layout.directory.name != self.placed.layout.device:
            return None
        words = [*self._name_run(), "-t", world, "--device", self.placed.layout.device]
        if not self._is_the_runs:
            words += ["--config-quant", self.config]
        return _spell("quantize", *words)

    def derive(self, world: int, *, flag: str | None = None) -> str | None:
        """Ranges and scales of `world` ranks from what is there; None where that cannot be.

        Args:
            flag: how they share experts, `-u` or `--no-expert-parallel`, where not as the run does.
        """
        ranges = (
            self._reshard(world, flag) if self.placed.channel_file.is_file() else None if flag else self._convert(world)
        )
        return ranges and " && ".join(filter(None, [ranges, self.compute_scales(world)]))

    def _reshard(self, world: int, flag: str | None) -> str:
        words = ["-t", world, *([flag] if flag else [])]
        return _spell(
            "reshard", self._run, *words, *(["--device", self.placed.device.name] if self.placed.device else [])
        )

    def _convert(self, world: int) -> str | None:
        for source in self.worlds:
            if source % world == 0:
                return _spell("unify", self.placed.path, "-r", world, "--from-world", source)
        for source in reversed(self.worlds):
            if world % source == 0:
                return _spell("expand", self.placed.path, "-w", world, "--from-world", source)
        return None

    def make_for(self, device: Device, world: int) -> str:
        """The same calibration for another device."""
        other = self._run / f"maxabs_quant_{device.name}.json"
        if other.is_file():
            return f"give --quant-config {shlex.quote(str(other))}"
        words = [*self._name_run(), "-t", world, "--device", device.name]
        if self.placed.channel_file.is_file():
            return f"make {other.name}: {_spell('quantize', *words)}"
        dataset = self.placed.manifest and self.placed.manifest.dataset
        return f"measure for {device.name}: {_spell('calibrate', *words, '-d', dataset.name if dataset else 'builtin')}"

    def _name_run(self) -> list[object]:
        words: list[object] = ["-m", self.model, "-o", self._run.parent]
        if RunLayout(self._run.parent, self.model).root != self._run:
            words += ["--name", self._run.name]
        return words

    @property
    def _is_the_runs(self) -> bool:
        layout = self.placed.layout
        return layout is not None and self.config.resolve() == layout.quant_config


def advise_repeating(command: Sequence[str]) -> str:
    """What to do about a run that failed, given the command line that its manifest records."""
    program, *words = command or [""]
    if words and Path(program).name in ("gaudi-calib", "__main__.py"):
        return f"run it again: {_spell(*words)}"
    return "calibrate again"


def _spell(*words: object) -> str:
    return shlex.join(["gaudi-calib", *map(str, words)])
