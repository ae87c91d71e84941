"""The commands that make the files of a run anew, as they are typed: what errors advise."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.fp8 import Device
from gaudi_calib.layout import DeviceLayout, RunLayout
from gaudi_calib.redaction import REDACTED

# Stands in a command for a checkpoint that nothing names.
UNKNOWN_MODEL = "MODEL"


@dataclass(frozen=True)
class Advice:
    """What to run over one directory of rank files.

    Attributes:
        directory: absolute.
        device: the device it is for, None where nothing tells.
        worlds: those of which every rank has ranges.
        has_channels: whether the run has channel ranges, from which every world follows.
        has_manifest: whether it is recorded how ranks share experts; else `model` may tell.
        model: directory or hub name of the checkpoint.
        datasets: what it was measured on, as -d takes it.
        config: the QUANT_CONFIG that serves it; None: the run's own.
    """

    directory: Path
    device: Device | None
    worlds: Sequence[int]
    has_channels: bool
    has_manifest: bool = True
    model: str = UNKNOWN_MODEL
    datasets: Sequence[str] = ("builtin",)
    config: Path | None = None

    @property
    def run(self) -> Path:
        """The run directory, if it is one of a run."""
        return self.directory.parent

    @property
    def is_of_run(self) -> bool:
        """Whether commands that take -m and -o find it."""
        return self.device is not None and self.directory.name == self.device.name

    def compute_scales(self, world: int, *, method: str | None = None, needs_model: bool = False) -> str:
        """Scales of `world` ranks by this config, or by a method.

        Args:
            needs_model: they come from the weights.
        """
        how: list[object] = ["--scale-method", method.lower()] if method else self._name_config()
        where = ["-t", world, "--device", self.device.name if self.device else "DEVICE"]
        if self.is_of_run and self.model != UNKNOWN_MODEL:
            return _spell("quantize", *self._name_run(), *where, *how)
        return _spell("quantize", self.directory, *(["-m", self.model] if needs_model else []), *where, *how)

    def derive(self, world: int, *, flag: str | None = None) -> str | None:
        """Ranges and scales of `world` ranks from what is there; None where that cannot be.

        Args:
            flag: how they share experts, `-u` or `--no-expert-parallel`, where not as the run does.
        """
        ranges = self.make_ranges(world, flag=flag)
        return ranges and chain(ranges, self.compute_scales(world))

    def make_ranges(self, world: int, *, flag: str | None = None) -> str | None:
        """Ranges alone; see `derive`."""
        return self._reshard(world, flag) if self.has_channels else None if flag else self.convert(world)

    def _reshard(self, world: int, flag: str | None) -> str:
        device = ["--device", self.device.name] if self.device else []
        return _spell("reshard", self.run, "-t", world, *([flag] if flag else []), *device)

    def convert(self, world: int) -> str | None:
        """Ranges of `world` ranks from those of others, as upper bounds where they are more; None where none do."""
        evidence = [] if self.has_manifest or not Path(self.model).is_dir() else ["--model", self.model]
        for source in self.worlds:
            if source > world and source % world == 0:
                return _spell("unify", self.directory, "-r", world, "--from-world", source, *evidence)
        for source in reversed(self.worlds):
            if source < world and world % source == 0:
                return _spell("expand", self.directory, "-w", world, "--from-world", source, *evidence)
        return None

    def make_for(self, device: Device, world: int) -> str:
        """The same calibration for another device."""
        other = self.run / f"maxabs_quant_{device.name}.json"
        if other.is_file():
            return f"give --quant-config {shlex.quote(str(other))}"
        words = [*self._name_run(), "-t", world, "--device", device.name]
        if self.has_channels:
            return f"make {other.name}: {_spell('quantize', *words)}"
        return f"measure for {device.name}: {_spell('calibrate', *words, *self._name_data())}"

    def measure(self, world: int) -> str | None:
        """A measurement with `world` ranks, for this device; None where the directory is no run's."""
        return self._measure("measure", world)

    def calibrate(self, world: int, *more: str) -> str | None:
        """A measurement with `world` ranks and its scales, with further words; None as for `measure`."""
        return self._measure("calibrate", world, *more)

    def _measure(self, command: str, world: int, *more: str) -> str | None:
        if self.device is None or not self.is_of_run:
            return None
        words = [*self._name_run(), *self._name_data(), "-t", world, "--device", self.device.name]
        return _spell(command, *words, *more)

    def merge_whole(self, runs: Sequence[Path]) -> str:
        """The runs merged with their channel ranges, in place."""
        return _spell("merge", *dict.fromkeys(runs), "-o", self.run)

    def _name_config(self) -> list[object]:
        own = self.device and DeviceLayout(self.directory, self.device.name).quant_config
        return ["--config-quant", self.config] if self.config and self.config.resolve() != own else []

    def _name_data(self) -> list[str]:
        return [word for dataset in self.datasets for word in ("-d", dataset)]

    def _name_run(self) -> list[object]:
        words: list[object] = ["-m", self.model, "-o", self.run.parent]
        if RunLayout(self.run.parent, self.model).root != self.run:
            words += ["--name", self.run.name]
        return words


def advise_repeating(command: Sequence[str], directory: str | None) -> str:
    """What to do about a run that failed, given the command line that its manifest records and where it was run."""
    program, *words = command or [""]
    if not words or Path(program).name not in ("gaudi-calib", "__main__.py"):
        return "calibrate again"
    is_elsewhere = directory is not None and Path(directory) != Path.cwd()
    how = ", with what is [redacted] filled in" if any(REDACTED in word for word in words) else ""
    return f"run it again{how}: {chain(shlex.join(['cd', str(directory)]) if is_elsewhere else None, _spell(*words))}"


def advise_relocation(run: Path) -> str:
    """What has the configs of a run name the place where it is."""
    return _spell("relocate", run)


def advise_mending(directory: Path, device: Device | None) -> str:
    """What mends of a calibration, for a device, what can be mended without a measurement."""
    return _spell("check", directory, *(["--device", device.name] if device else []), "--fix")


def advise_configs(model: str, device: str | None) -> str:
    """What prints the configs of a model."""
    return _spell("config", "show", "-m", model, *(["--device", device] if device else []))


def chain(*commands: str | None) -> str:
    """Commands of which each is run where the one before it succeeded."""
    return " && ".join(filter(None, commands))


def _spell(*words: object) -> str:
    return shlex.join(["gaudi-calib", *map(str, words)])
