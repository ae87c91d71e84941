"""The run that QUANT_CONFIG in the environment describes, for step 2 and step 4.

`dump_stats_path` says where the rank files are. `<OUT>/<model>/<device>/inc_output` is the layout
of a run, so that `-o OUT` finds it; any other path gets its rank files (no manifest: that one
describes a layout) through a scratch directory beside it, renamed in together at the end.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from gaudi_calib.advice import advise_configs
from gaudi_calib.cli.main import main
from gaudi_calib.config.file import read_quant_config
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.engines.detect import detect_platform, require_gaudi
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import DEVICES
from gaudi_calib.layout import DUMP_NAME, RunLayout
from gaudi_calib.staging import stage_files

# Our flags of measuring -> those of step 2, wherever a step advises to measure again.
MEASURING_FLAGS = {"-t": "--tensor-parallel-size", "-b": "--batch-size"}


@dataclass(frozen=True)
class ConfiguredRun:
    """What a QUANT_CONFIG file says about a run.

    Attributes:
        config: the file.
        dump: its `dump_stats_path`, absolute; rank files are called `<dump>_hooks_...`.
        device: name of the device that will serve.
    """

    config: Path
    dump: Path
    device: str

    def find_layout(self, model: str) -> RunLayout | None:
        """Return the layout of the run that keeps its files at `dump` anyway, None where `dump` is no run's.

        A run with a manifest counts, whatever its directory is called.
        """
        out, name = self.dump.parent.parent.parent, self.dump.parent.parent.name
        is_run = CalibrationDir(self.dump.parent).manifest is not None
        layouts = [RunLayout(out, model), *([RunLayout(out, model, name)] if is_run and name else [])]
        return next((one for one in layouts if one.device(self.device).dump_stats_path == self.dump), None)

    def require_world(self, world: int, model: str) -> None:
        """Raise FileError where ranges of `world` ranks are not there and do not follow from channel ranges."""
        placed = CalibrationDir(self.dump.parent, dump=self.dump.name)
        if self.find_layout(model) is not None or world in placed.worlds:
            return
        made = placed.advise(model).convert(world)
        raise FileError(
            f"no ranges for {world} ranks",
            where=placed.path,
            why=f"there are those of {', '.join(map(str, placed.worlds)) or 'no'} ranks",
            fix=f"run step 2 with --tensor-parallel-size {world}" + (f"; or run: {made}" if made else ""),
        )

    def execute(
        self, command: Sequence[str], model: str, *, reads_ranges: bool, flags: Mapping[str, str] | None = None
    ) -> int:
        """Run a `gaudi-calib` command on this run and return its exit code.

        Args:
            command: words of the command, without -m, -o and --device.
            model: what -m gets.
            reads_ranges: the command needs the rank files that are there already.
            flags: flags of the command to those of the step, for what errors advise.
        """
        layout = self.find_layout(model)
        if layout is not None:
            named = ["--name", layout.name] if layout.name else []
            return main([*self._words(command, model, layout.out), *named], flags=flags)
        self.dump.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.dump.parent, prefix=".step-") as scratch:
            directory = RunLayout(Path(scratch), model).device(self.device).directory
            directory.mkdir(parents=True)
            if reads_ranges:
                self._copy_in(directory)
            told = Renaming(sys.stderr, str(directory), str(self.dump.parent))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
                exit_code = main(self._words(command, model, Path(scratch)), flags=flags)
            if exit_code == 0:
                self._move_out(directory)
        return exit_code

    def _words(self, command: Sequence[str], model: str, out: Path) -> list[str]:
        return [*command, "-m", model, "-o", str(out), "--device", self.device]

    def _copy_in(self, directory: Path) -> None:
        for path, file in CalibrationDir(self.dump.parent, dump=self.dump.name).files.items():
            shutil.copy2(path, directory / replace(file, dump=DUMP_NAME).name)

    def _move_out(self, directory: Path) -> None:
        files = CalibrationDir(directory).files
        with stage_files(self.dump.parent) as staging:
            for path, file in files.items():
                shutil.move(path, staging / replace(file, dump=self.dump.name).name)
        print(f"{len(files)} files in {self.dump.parent}")


def find_configured_run(model: str, device: str | None) -> ConfiguredRun:
    """Read the run from QUANT_CONFIG.

    Args:
        model: what the step is for.
        device: `g2`, `g3`, or None to take it from the path, the config or this machine.

    Raises:
        UsageError: QUANT_CONFIG is not set, or has no dump_stats_path.
        CalibrationError: the file is no valid config, or nothing says which device will serve.
    """
    given = os.environ.get("QUANT_CONFIG")
    if not given:
        raise UsageError(
            "QUANT_CONFIG is not set",
            why="this step reads from it where the measurements are and what is left out",
            fix=f"export QUANT_CONFIG=FILE.json; such files are printed by: {advise_configs(model, device)}",
        )
    path = expand_path(given)
    config = read_quant_config(path)
    if not config.dump_stats_path:
        raise UsageError(
            "QUANT_CONFIG has no dump_stats_path", where=path, fix="add it: OUT/<model>/<device>/inc_output"
        )
    placed = CalibrationDir.named_by(config, path)
    known = placed.settle_device(device) or require_gaudi(detect_platform())
    return ConfiguredRun(path, placed.path / str(placed.dump), known.name)


class Renaming(io.TextIOBase):
    """A text stream that calls a directory otherwise: the scratch directory as the place it stands for."""

    def __init__(self, stream: TextIO, name: str, other: str):
        self.stream, self.name, self.other = stream, name, other

    def write(self, text: str) -> int:
        """Write `text` at once."""
        return self.stream.write(text.replace(self.name, self.other))

    def flush(self) -> None:
        """Flush the stream behind it."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Tell whether a person reads it, who sees progress move."""
        return self.stream.isatty()


class IdleFlag(argparse.Action):
    """A flag of the reference that is taken and has no effect without vLLM; says so on stderr."""

    def __call__(self, *arguments: object) -> None:
        print(f"Note: no effect with the torch engine: {arguments[-1]}", file=sys.stderr)


def _read_world(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks")
    return int(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that both steps have.

    The reference has no --device because it always runs on the device.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-m", "--model", required=True, help="directory or Hugging Face name of the model")
    parser.add_argument(
        "--tensor-parallel-size", type=_read_world, default=1, help="ranks that will serve (%(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=sorted(DEVICES),
        help="device that will serve (default: from dump_stats_path, else this one)",
    )
    return parser
