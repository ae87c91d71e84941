"""A directory of rank files, and all that can be told about it: the one place that works it out.

A directory may be a run's (`OUT/<model>/g3`), or anybody's: INC's own, without manifest, config or
channel ranges. What is told, and by what, the weightiest first:

    device          manifest; the directory's name; the name of the QUANT_CONFIG that points there
    sharing         manifest
    worlds          names of the rank files
    scaling         `../maxabs_quant_<device>.json`, where its method is that of the scale files
    channel ranges  `../channel_ranges.safetensors`

A `CalibrationDir` is what is there when it is asked first; files that are written later need a new one.
Manifest and config are imported when they are asked for: commands on bare rank files start faster.
"""

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.files import hash_file, read_json
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME, DeviceLayout, RankFile, list_rank_files
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rankfiles.store import read_world_files

if TYPE_CHECKING:
    from gaudi_calib.config.model import QuantConfig
    from gaudi_calib.manifest import Manifest, ScaleOrigin


_log = logging.getLogger(__name__)

_MOST_OF_A_CONFIG = 1 << 20  # bytes; what is larger is something else


class StaleFile(NamedTuple):
    """A scale file that does not fit the ranges in place.

    Attributes:
        path: the file.
        why: what does not fit.
    """

    path: Path
    why: str


class CalibrationDir:
    """One directory of rank files.

    Attributes:
        path: the directory; it need not exist.
        dump: first part of the names that count, or None for all.
        config_path: the QUANT_CONFIG that points there, or None.
    """

    def __init__(self, path: Path, *, dump: str | None = None, config_path: Path | None = None):
        self.path, self.dump, self.config_path = path, dump, config_path

    @classmethod
    def named_by(cls, config: "QuantConfig", config_path: Path) -> "CalibrationDir":
        """The directory that the `dump_stats_path` of a QUANT_CONFIG, read from `config_path`, names."""
        dump = Path(config.dump_stats_path).absolute()
        return cls(dump.parent, dump=dump.name, config_path=config_path)

    @property
    def is_filled(self) -> bool:
        """Whether a calibration wrote there."""
        return (self.path / MANIFEST_NAME).is_file() or bool(self.files)

    @cached_property
    def files(self) -> dict[Path, RankFile]:
        """The rank files, in the order of their names."""
        found = list_rank_files(self.path)
        return {path: file for path, file in found.items() if self.dump in (None, file.dump)}

    @cached_property
    def newest_manifest(self) -> "Manifest | None":
        """The manifest, of whatever run was the last, finished or not; None where there is none."""
        path = self.path / MANIFEST_NAME
        if not path.is_file():
            return None
        from gaudi_calib.manifest import read_manifest

        return read_manifest(path)

    @property
    def manifest(self) -> "Manifest | None":
        """The manifest that describes the files in place, None where none does."""
        return self.newest_manifest and self.newest_manifest.good

    @property
    def device(self) -> Device | None:
        """The Gaudi that the files are for, None where nothing tells."""
        told_by_config = self.config_path.stem.rpartition("_")[2] if self.config_path else ""
        names = (self.manifest and self.manifest.device, self.path.resolve().name, told_by_config)
        return next((DEVICES[name] for name in names if name in DEVICES), None)

    def settle_device(self, asked: str | None) -> Device | None:
        """Return the device that is known, else the one called `asked`.

        Raises:
            UsageError: both are there and differ.
        """
        if asked and self.device and asked != self.device.name:
            raise UsageError(
                f"--device {asked} contradicts the directory, which is of {self.device.name}",
                where=self.path / MANIFEST_NAME if self.manifest and self.manifest.device else self.path,
                fix="leave --device out, or give the directory of that device",
            )
        return self.device or (DEVICES[asked] if asked else None)

    @property
    def layout(self) -> DeviceLayout | None:
        """Where a run keeps what belongs to this directory, None where the device is not known."""
        return DeviceLayout(self.path.resolve(), self.device.name) if self.device else None

    @property
    def channel_file(self) -> Path:
        """Where the run's channel ranges are, if it has any."""
        return self.path.resolve().parent / CHANNEL_RANGES_NAME

    @cached_property
    def worlds(self) -> dict[int, dict[int, Path]]:
        """The `.json` files of ranges by world and rank.

        Raises:
            FileError: the directory is missing, or two files are ranges of the same rank.
        """
        if not self.path.is_dir():
            raise FileError(
                "no such directory", where=self.path, fix="give the <device> directory of a run, e.g. OUT/<model>/g3"
            )
        worlds: dict[int, dict[int, Path]] = {}
        for path, file in self.files.items():
            if not file.is_ranges or file.extension != "json":
                continue
            rank, world = file.position
            other = worlds.setdefault(world, {}).setdefault(rank, path)
            if other != path:
                raise FileError(
                    f"two files are ranges of rank {rank} of {world}: {other.name} and {path.name}",
                    where=self.path,
                    why="they are of different measurements",
                    fix="move one of the measurements to a directory of its own",
                )
        return dict(sorted(worlds.items()))

    def warn_of_move(self) -> None:
        """Warn where configs of the run name another place, from which serving would take ranges and scales."""
        run = self.path.resolve().parent
        moved = [path.name for path in find_moved_configs(run)]
        if moved:
            _log.warning("The run in %s has moved: %s name another place; run `%s`",
                         run, ", ".join(moved), advise_relocation(run))  # fmt: skip

    def list_methods(self, world: int) -> list[str]:
        """Return the methods, in upper case, that there are scale files of `world` for."""
        return sorted({file.method for file in self.files.values() if file.method and file.position[1] == world})

    def list_scales(self, world: int, method: str | None = None) -> list[Path]:
        """Return the scale files of `world`, of one method or of all."""
        found = [(path, file) for path, file in self.files.items() if file.method and file.position[1] == world]
        return [path for path, file in found if method in (None, file.method)]

    def name_file(self, rank: int, world: int, *, method: str | None = None, extension: str = "npz") -> Path:
        """Return where the file of one rank is, or would be: ranges, or scales of `method`."""
        dump = self.dump or next((file.dump for file in self.files.values()), RankFile().dump)
        return self.path / RankFile(dump, method=method, rank=rank, world=world, extension=extension).name

    def list_missing(self, world: int, *, method: str | None = None) -> list[Path]:
        """Return the npz files that INC would miss on the ranks of `world`."""
        wanted = [self.name_file(rank, world, method=method) for rank in range(world)]
        return [path for path in wanted if path not in self.files]

    def require_worlds(self) -> dict[int, dict[int, Path]]:
        """Return `worlds`, of which there is at least one.

        Raises:
            FileError: there are no ranges; see also `worlds`.
        """
        if not self.worlds:
            raise FileError(
                "no ranges in the directory",
                where=self.path,
                why=f"no file in it is called like {self.name_file(0, 1, extension='json').name}",
                fix="give the directory that holds such files: <device> of a run, e.g. OUT/<model>/g3",
            )
        return self.worlds

    def read_world(self, world: int) -> list[RankSet[Node]]:
        """Read the ranges of all ranks of `world`, in rank order.

        Raises:
            FileError: a rank's file is missing or malformed, or there are two.
        """
        ranks = self.require_worlds().get(world, {})
        missing = [rank for rank in range(world) if rank not in ranks]
        if missing:
            more = f" (nor of {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise FileError(
                f"no ranges of rank {missing[0]} of {world}{more}",
                where=self.name_file(missing[0], world, extension="json"),
                why=f"the directory holds ranges of world size {', '.join(map(str, self.worlds))}",
                fix=f"run `gaudi-calib measure -t {world}`, or name a world size that is there",
            )
        return read_world_files([ranks[rank] for rank in range(world)])

    @cached_property
    def quant_config(self) -> "QuantConfig | None":
        """The run's QUANTIZE config, None where there is none.

        Raises:
            ConfigError: it is invalid.
        """
        path = self.layout and self.layout.quant_config
        return _read_config(path) if path and path.is_file() else None

    @cached_property
    def measure_config(self) -> "QuantConfig | None":
        """The run's MEASURE config; where there is no file, what the manifest recorded; else None.

        Raises:
            ConfigError: it is invalid.
        """
        path = self.layout and self.layout.measure_config
        if path and path.is_file():
            return _read_config(path)
        recorded = self.manifest and self.manifest.config.get("measure")
        if not recorded:
            return None
        from gaudi_calib.config.check import parse_quant_config

        return parse_quant_config(recorded, where=self.path / MANIFEST_NAME)

    def hash_files(self) -> dict[str, str]:
        """Return the hash of every rank file by name."""
        return {path.name: hash_file(path) for path in self.files}

    def find_stale(
        self,
        paths: Iterable[Path] | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        scales: "Mapping[str, ScaleOrigin] | None" = None,
    ) -> list[StaleFile]:
        """Return the scale files that were made from other ranges or settings.

        INC uses a scale file whatever it was made from: its name tells only the method.

        Args:
            paths: those to look at; None: all of the directory.
            settings: what scales should have been computed with now (`describe_scaling`).
            scales: where scale files come from; None: as the manifest says.

        Returns:
            In the order of names; a scale file nobody recorded is stale.
        """
        if scales is None:
            scales = self.manifest.scales if self.manifest else {}
        hash_once = cache(hash_file)
        found = []
        for path in [path for path, file in self.files.items() if file.method] if paths is None else paths:
            why = self._explain_staleness(scales.get(path.name), settings, hash_once)
            if why is not None:
                found.append(StaleFile(path, why))
        return found

    def _explain_staleness(
        self, origin: "ScaleOrigin | None", settings: Mapping[str, Any] | None, hash_once: Callable[[Path], str]
    ) -> str | None:
        if origin is None:
            return "the manifest does not say what it was computed from"
        for name, expected in origin.ranges.items():
            path = self.path / name
            if not path.is_file():
                return f"its ranges {name} are gone"
            if hash_once(path) != expected:
                return f"its ranges {name} have changed since"
        if settings is not None and dict(settings) != origin.settings:
            keys = dict.fromkeys([*origin.settings, *settings])
            changed = [key for key in keys if origin.settings.get(key) != settings.get(key)]
            return "it was computed with other settings: " + ", ".join(changed)
        return None


def find_beside(config_path: Path, dump_stats_path: str) -> Path | None:
    """Return what the `dump_stats_path` of a config would be where the config is now, None where it leads there.

    A run that was copied, or is mounted elsewhere, names its old place, which may be there as well.
    None, too, where no rank files lie beside the config: then the path alone tells where they are.
    """
    named = Path(os.path.abspath(dump_stats_path))
    for parent in dict.fromkeys((config_path.absolute().parent, config_path.resolve().parent)):
        for directory in (parent / named.parent.name, parent):
            if directory.name == named.parent.name and CalibrationDir(directory, dump=named.name).is_filled:
                place = directory.parent.resolve() / directory.name
                return None if is_same_place(place, named.parent) else place / named.name
    return None


def is_same_place(directory: Path, other: Path) -> bool:
    """Whether two paths lead to one directory that exists."""
    try:
        return directory.samefile(other)
    except OSError:
        return False


def list_quant_configs(run: Path) -> dict[Path, str]:
    """Return the `dump_stats_path` of every QUANT_CONFIG file directly in a run directory."""
    found = {}
    for path in sorted(run.glob("[!.]*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # anybody's JSON
            content = read_json(path) if path.is_file() and path.stat().st_size <= _MOST_OF_A_CONFIG else None
            if isinstance(content, dict) and isinstance(content.get("dump_stats_path"), str):
                os.fsencode(content["dump_stats_path"])  # no path otherwise
                found[path] = content["dump_stats_path"]
    return found


def find_moved_configs(run: Path) -> dict[Path, Path]:
    """Return what the `dump_stats_path` of every QUANT_CONFIG of a run should be, where it leads elsewhere."""
    beside = {path: find_beside(path, named) for path, named in list_quant_configs(run).items()}
    return {path: dump for path, dump in beside.items() if dump is not None}


def advise_relocation(run: Path) -> str:
    """Return the command that has the configs of a run name the place where it is."""
    return shlex.join(["gaudi-calib", "relocate", str(run)])


def _read_config(path: Path) -> "QuantConfig":
    from gaudi_calib.config.file import read_quant_config

    return read_quant_config(path)
