"""A directory of rank files, and all that can be told about it: the one place that works it out.

A directory may be a run's (`OUT/<model>/g3`), or anybody's: INC's own, without manifest, config or
channel ranges. What is told, and by what, the weightiest first:

    device          manifest; the directory's name; the name of the QUANT_CONFIG that points there
    sharing         manifest
    worlds          names of the rank files
    scaling         `../maxabs_quant_<device>.json`, where its method is that of the scale files
    channel ranges  `../channel_ranges.safetensors`, where the manifest says that they are of this measurement

A `CalibrationDir` is what is there when it is asked first; files that are written later need a new one. Files that
a killed run left half in place are put back before.
Manifest and config are imported when they are asked for: commands on bare rank files start faster.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaudi_calib.advice import UNKNOWN_MODEL, Advice
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.files import hash_bytes, hash_file
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.layout import CHANNEL_RANGES_NAME, CONVERGENCE_NAME, MANIFEST_NAME, DeviceLayout, list_rank_files
from gaudi_calib.provenance import StaleFile, find_changed, find_stale, follow_channels, hash_paths
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.rank_directory import RankDirectory
from gaudi_calib.rankfiles.store import read_world_files
from gaudi_calib.staging import undo_unfinished

if TYPE_CHECKING:
    from gaudi_calib.config.model import QuantConfig
    from gaudi_calib.manifest import Manifest, ScaleOrigin


class CalibrationDir(RankDirectory):
    """One directory of rank files and what belongs to it.

    Attributes:
        config_path: the QUANT_CONFIG that points there, or None.
    """

    def __init__(self, path: Path, *, dump: str | None = None, config_path: Path | None = None):
        super().__init__(path, dump=dump)
        self.config_path = config_path
        for place in (path, path.resolve().parent):
            undo_unfinished(place)

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

    @property
    def convergence_file(self) -> Path:
        """Where the run says how its ranges came about, if it does."""
        return self.channel_file.with_name(CONVERGENCE_NAME)

    @cached_property
    def origin(self) -> "Manifest | None":
        """The manifest of the measurement that ranges of this directory are of; None where none tells.

        That is its own; where it has none yet, the one beside it that the channel ranges are of.

        Raises:
            FileError: the channel ranges are of none of the manifests beside them.
        """
        if self.manifest is not None or not self.channel_file.is_file():
            return self.manifest
        beside = [CalibrationDir(self.channel_file.parent / name) for name in DEVICES]
        told = [place for place in beside if place.manifest is not None]
        owner = next((place.manifest for place in told if place._owns_channels), None)
        if told and owner is None:
            raise self._refuse_channels()
        return owner

    @cached_property
    def measurement(self) -> str | None:
        """Which measurement the ranges in place are of, as manifests call it; None where nothing tells.

        Manifests of earlier releases do not tell: there it is that of the channel ranges, if ranges in place follow
        from those.
        """
        recorded = self.manifest.measurement if self.manifest else None
        if recorded is None and self.manifest is not None and self.channel_file.is_file():
            found = follow_channels(self.worlds, self.read_world, self.channel_file, self.manifest, self.device)
            return self._channel_hash if found else None
        return recorded

    def require_channels(self, world: int | None = None) -> Path:
        """Return the path of the channel ranges, which are of this measurement as far as manifests tell.

        Args:
            world: what ranges are wanted of, for what an error advises.

        Raises:
            FileError: there are none, or they are of another measurement.
        """
        if not self.channel_file.is_file():
            raise FileError(
                f"no {CHANNEL_RANGES_NAME}",
                where=self.channel_file.parent,
                why="only the torch engine writes it; rank files alone cannot be resharded exactly",
                fix="; or ".join(["give the run directory (OUT/<model>)", *self._advise_conversion(world)]),
            )
        if self.manifest is not None and not self._owns_channels:
            raise self._refuse_channels(world)
        _ = self.origin  # without a manifest, one beside it is to be of these
        return self.channel_file

    @property
    def _owns_channels(self) -> bool:
        return self.measurement == self._channel_hash

    @cached_property
    def _channel_hash(self) -> str:
        return hash_file(self.channel_file)

    def identify(self, channels: Path | None) -> str:
        """Return what a manifest calls the measurement in place.

        Args:
            channels: its channel ranges; None where all of it are the ranges of this directory.
        """
        if channels is not None:
            return hash_file(channels)
        ranges = hash_paths(path for path, file in self.files.items() if file.is_ranges and file.extension == "npz")
        return hash_bytes("".join(ranges.values()).encode())

    def _advise_conversion(self, world: int | None) -> list[str]:
        """What makes use of the rank files for `world` ranks, where it can be done."""
        if world is None or not self.list_missing(world):
            return []
        if world in self.whole_worlds:
            return [f"use those that are there: {self.advise().compute_scales(world)}"]
        made = self.advise().convert(world)
        return [f"convert what is there: {made}"] if made else []

    def _refuse_channels(self, world: int | None = None) -> FileError:
        merged = [Path(path).parent for path in (self.manifest.merged if self.manifest else ())]
        whole = f"merge the whole runs: {self.advise().merge_whole(merged)}" if merged else ""
        is_told = self.manifest is None or self.manifest.measurement is not None
        why = f"its checksum is not the one in {MANIFEST_NAME}" if is_told else "the ranges do not follow from it"
        return FileError(
            f"{CHANNEL_RANGES_NAME} is of another measurement than {self.path.name}/",
            where=self.channel_file,
            why=why + (": the merge left it out" if merged else ": it was changed, or copied from another run"),
            fix="; or ".join([whole or "restore it, or measure again", *self._advise_conversion(world)]),
        )

    def read_present(self, world: int) -> list[RankSet[Node]]:
        """Read the ranges of those ranks of `world` that are there, in rank order.

        Raises:
            FileError: there are none, or one is malformed.
        """
        ranks = self.require_worlds().get(world)
        return self.read_ranks(list(ranks.values())) if ranks else self.read_world(world)

    def read_world(self, world: int) -> list[RankSet[Node]]:
        """Read the ranges of all ranks of `world`, in rank order.

        Raises:
            FileError: a rank's file is missing or malformed, or there are two.
        """
        ranks = self.require_worlds().get(world, {})
        missing = [rank for rank in range(world) if rank not in ranks]
        if missing:
            more = f" (nor of {len(missing) - 1} more)" if len(missing) > 1 else ""
            made = self.advise().make_ranges(world) or self.advise().measure(world)
            raise FileError(
                f"no ranges of rank {missing[0]} of {world}{more}",
                where=self.name_file(missing[0], world, extension="json"),
                why=f"the directory holds ranges of world size {', '.join(map(str, self.worlds))}",
                fix="name a world size that is there, or restore the files" + (f"; or run: {made}" if made else ""),
            )
        return self.read_ranks([ranks[rank] for rank in range(world)])

    def read_ranks(self, paths: Sequence[Path]) -> list[RankSet[Node]]:
        """Read the ranges of some ranks of one world, each from its `.json` and the `.npz` beside it.

        Raises:
            FileError: a file is malformed, or not the one that the run wrote.
        """
        self.require_recorded(file for path in paths for file in (path, path.with_suffix(".npz")))
        return read_world_files(paths)

    def require_recorded(self, paths: Iterable[Path], advice: Advice | None = None) -> None:
        """Check that rank files are those the manifest recorded; without a manifest nothing is known.

        Args:
            paths: files of this directory; those that are not there are passed over.
            advice: how to make them anew; None: as the run is known to be made.

        Raises:
            FileError: a file was changed, or is another run's.
        """
        changed = find_changed(self.manifest.files if self.manifest else {}, paths)
        if changed is not None:
            file, advice = self.files[changed], advice or self.advise()
            anew = advice.compute_scales(file.position[1]) if file.method else advice.derive(file.position[1])
            raise FileError(
                f"{changed.name} is not the file that the run wrote",
                where=changed,
                why=f"its checksum is not in {MANIFEST_NAME}: it was changed, cut short, or copied from another run",
                fix="restore it" + (f", or make it anew: {anew}" if anew else ", or measure again"),
            )

    def advise(self, model: str | None = None, config: Path | None = None) -> Advice:
        """Return what to run over this directory.

        Args:
            model: the checkpoint; None: the one that was measured.
            config: the QUANT_CONFIG that serves; None: the run's own.
        """
        made = self.manifest
        return Advice(
            self.path.resolve(),
            self.device,
            self.whole_worlds,
            self.channel_file.is_file(),
            made is not None,
            model or (made.model.name if made and made.model else UNKNOWN_MODEL),
            made.list_datasets() if made else ("builtin",),
            config,
        )

    @cached_property
    def quant_config(self) -> "QuantConfig | None":
        """The run's QUANTIZE config, None where there is none.

        Raises:
            ConfigError: it is invalid.
        """
        return _read_config(self.quant_path) if self.quant_path else None

    @property
    def quant_path(self) -> Path | None:
        """The file of the run's QUANTIZE config, None where there is none."""
        path = self.layout.quant_config if self.layout else None
        return path if path and path.is_file() else None

    @cached_property
    def measure_config(self) -> "QuantConfig | None":
        """The run's MEASURE config; where there is no file, what the measurement was made with; else None.

        Raises:
            ConfigError: it is invalid.
        """
        path = self.layout and self.layout.measure_config
        return _read_config(path) if path and path.is_file() else self.measured_with

    @cached_property
    def measured_with(self) -> "QuantConfig | None":
        """The MEASURE config that the ranges were made with, as recorded, whatever the file says now; else None."""
        recorded = self.origin and self.origin.config.get("measure")
        if not recorded:
            return None
        from gaudi_calib.config.check import parse_quant_config

        return parse_quant_config(recorded, where=f"{self.path / MANIFEST_NAME}, config.measure")

    def hash_files(self, staging: Path | None = None, *, without: Collection[Path] = ()) -> dict[str, str]:
        """Return the hash of rank files by name, as they will be with those in `staging` and `without` others.

        Of files that stay as they are, a manifest's word counts: those that it does not know are left out.
        """
        staged = hash_paths(list_rank_files(staging) if staging else ())
        kept = [path for path in self.files if path not in without and path.name not in staged]
        known = hash_paths(kept) if self.manifest is None else self.manifest.files
        return dict(sorted(({path.name: known[path.name] for path in kept if path.name in known} | staged).items()))

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
        chosen = [path for path, file in self.files.items() if file.method] if paths is None else paths
        return find_stale(chosen, scales, settings)


def _read_config(path: Path) -> "QuantConfig":
    from gaudi_calib.config.file import read_quant_config

    return read_quant_config(path)


def list_devices(path: Path, dump: str | None = None) -> dict[str, CalibrationDir]:
    """Return the directories with ranges in a run, by device; `path` itself, called "", where it is such a directory.

    Raises:
        FileError: there is no such directory.
    """
    place = CalibrationDir(path, dump=dump)
    if place.worlds:
        return {"": place}
    inside = {name: CalibrationDir(path / name, dump=dump) for name in DEVICES if (path / name).is_dir()}
    return {name: place for name, place in inside.items() if place.worlds}
