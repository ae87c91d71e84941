"""Whether a QUANT_CONFIG, and the files behind it, can serve a model on a device with so many ranks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.config.model import QuantConfig, get_scales_device
from gaudi_calib.config.presets import describe_scaling, read_quant_config
from gaudi_calib.errors import ConfigError, FileError, ModelError, TopologyError
from gaudi_calib.files import read_json
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.layout import MANIFEST_NAME, RankFile, parse_rank_file
from gaudi_calib.manifest import Manifest, check_scales_fresh, read_manifest
from gaudi_calib.models.families import Family, find_family
from gaudi_calib.models.fingerprint import fingerprint_model
from gaudi_calib.models.source import ServedModel
from gaudi_calib.runs.evidence import NOTE as SHARING_NOTE

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A QUANT_CONFIG that quantizes, and what lies where its `dump_stats_path` points.

    Attributes:
        path: the file.
        config: its content.
        manifest: of the last good calibration there, None where nothing recorded one.
    """

    path: Path
    config: QuantConfig
    manifest: Manifest | None

    @property
    def directory(self) -> Path:
        """Where ranges and scales are."""
        return Path(self.config.dump_stats_path).absolute().parent

    @property
    def device(self) -> Device | None:
        """The device the files are for: what the manifest says, else the directory's name."""
        name = (self.manifest and self.manifest.device) or self.directory.name
        return DEVICES.get(name)

    @property
    def family(self) -> Family | None:
        """Family of the model that was measured, as far as the manifest tells."""
        model = self.manifest and self.manifest.model
        try:
            return find_family(model.model_type) if model and model.model_type else None
        except ModelError:
            return None

    def name_file(self, rank: int, world: int, *, method: str | None = None) -> str:
        """Name of the file that INC reads for one rank."""
        dump = Path(self.config.dump_stats_path).name
        return RankFile(dump=dump, method=method, rank=rank, world=world, extension="npz").name

    def list_worlds(self) -> list[int]:
        """Return the worlds whose ranges are all there."""
        found = [parse_rank_file(path.name) for path in self.directory.glob("*.npz")]
        worlds = {one.world for one in found if one and one.world and one.method is None}
        return sorted(world for world in worlds if not self.list_missing(world))

    def list_missing(self, world: int, *, method: str | None = None) -> list[str]:
        """Return the names of rank files that are not there."""
        names = [self.name_file(rank, world, method=method) for rank in range(world)]
        return [name for name in names if not (self.directory / name).is_file()]

    def list_modules(self, world: int) -> tuple[str, ...]:
        """Return the modules that INC patches, nothing where no list is there."""
        name = RankFile(dump=Path(self.config.dump_stats_path).name, rank=0, world=world, is_mod_list=True).name
        path = self.directory / name
        return tuple(read_json(path)) if path.is_file() else ()


def open_calibration(path: Path) -> Calibration:
    """Return the calibration that the QUANT_CONFIG file `path` names.

    Raises:
        ConfigError: unreadable, or a config that measures.
        FileError: its directory is not there, or the calibration there never finished.
    """
    config = read_quant_config(path)
    if config.mode not in ("QUANTIZE", "LOAD"):
        raise ConfigError(
            f"{path.name} does not serve: its mode is {config.mode}",
            where=path,
            fix="give the config that calibration wrote for serving, OUT/<model>/maxabs_quant_<device>.json",
        )
    manifest_path = Path(config.dump_stats_path).absolute().parent / MANIFEST_NAME
    if config.uses_stats_files and not manifest_path.parent.is_dir():
        raise FileError(
            f"the directory of ranges and scales that {path.name} names is not there",
            where=manifest_path.parent,
            why="dump_stats_path is absolute, and the run was made elsewhere or moved",
            fix=f"copy the run to that path, or correct dump_stats_path in {path}",
        )
    return Calibration(path, config, _read_good(manifest_path))


def _read_good(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    manifest = read_manifest(path)
    if manifest.good is None:
        raise FileError(
            "the calibration did not finish",
            where=path,
            why=f"its status is {manifest.status}" + (f": {manifest.error}" if manifest.error else ""),
            fix="run `gaudi-calib calibrate` again",
        )
    return manifest.good


def require_fit(
    calibration: Calibration,
    model: ServedModel,
    *,
    world: int,
    device: Device | None,
    expert_parallel: bool | None = None,
) -> bool:
    """Check that `calibration` serves `model` and return whether ranks hold whole experts.

    Args:
        device: the Gaudi that will serve, None where any may be emulated.
        expert_parallel: as asked for with -u, None to serve as the files were made.

    Raises:
        FileError: files of a rank are missing or stale, or are another device's.
        ModelError: another checkpoint was measured. TopologyError: experts are shared otherwise.
        ConfigError: the device cannot serve with this config.
    """
    _require_device(calibration, device)
    if not calibration.config.uses_stats_files:
        return bool(expert_parallel)
    _require_files(calibration, model, world)
    _require_fresh(calibration, model, world)
    _require_model(calibration, model)
    return _choose_sharing(calibration, world, expert_parallel)


def _require_device(calibration: Calibration, device: Device | None) -> None:
    made_for = calibration.device
    if device is None or not calibration.config.uses_stats_files:
        return
    if made_for is not None and made_for != device:
        raise FileError(
            f"these files are for {made_for.name}, and {device.name} would serve",
            where=calibration.path,
            why="FP8 range and free scales differ between the devices",
            fix=f"give maxabs_quant_{device.name}.json; if the run has none, `gaudi-calib quantize -m MODEL -o OUT "
            f"--device {device.name}` makes it from channel_ranges.safetensors",
        )
    get_scales_device(calibration.config, device)


def _require_files(calibration: Calibration, model: ServedModel, world: int) -> None:
    tag = calibration.config.method_table.file_tag
    for method, what in ((None, "ranges"), (tag, "scales")):
        missing = calibration.list_missing(world, method=method)
        if len(missing) == world and method is None:
            raise _no_world(calibration, model, world)
        if missing:
            more = f" (nor {len(missing) - 1} more)" * (len(missing) > 1)
            raise FileError(
                f"the {what} of a rank are missing: {missing[0]}{more}",
                where=calibration.directory,
                why=f"each of the {world} ranks reads its own file",
                fix=f"copy the whole directory again, or make them: gaudi-calib quantize -m {model.name} "
                f"-o {calibration.path.parent.parent} -t {world}",
            )


def _no_world(calibration: Calibration, model: ServedModel, world: int) -> FileError:
    worlds = calibration.list_worlds()
    run, out = calibration.path.parent, calibration.path.parent.parent
    served = " or ".join(f"-t {one}" for one in worlds)
    return FileError(
        f"no files for {world} ranks",
        where=calibration.directory / calibration.name_file(0, world),
        why=f"there are files for {', '.join(map(str, worlds)) or 'no'} ranks; scales depend on what a rank holds",
        fix=f"gaudi-calib reshard {run} -t {world} && gaudi-calib quantize -m {model.name} -o {out} -t {world}"
        + (f"; or serve with {served}" if worlds else ""),
    )


def _require_fresh(calibration: Calibration, model: ServedModel, world: int) -> None:
    manifest, device = calibration.manifest, calibration.device
    if manifest is None:
        _log.warning("no %s in %s: model and scales are not checked", MANIFEST_NAME, calibration.directory)
        return
    settings = describe_scaling(calibration.config, device) if device else None
    tag = calibration.config.method_table.file_tag
    for stale in check_scales_fresh(manifest, calibration.directory, settings=settings):
        parts = parse_rank_file(stale.name)
        if parts and parts.world == world and parts.method == tag:
            raise FileError(
                f"{stale.name} is stale",
                where=calibration.directory / stale.name,
                why=stale.why,
                fix=f"gaudi-calib quantize -m {model.name} -o {calibration.path.parent.parent} -t {world}",
            )


def _require_model(calibration: Calibration, model: ServedModel) -> None:
    measured = calibration.manifest and calibration.manifest.model
    if not measured or not measured.fingerprint:
        return
    if model.directory is None:
        _log.warning("%s is not downloaded: whether it is the model that was measured is not checked", model.name)
    elif fingerprint_model(model.directory) != measured.fingerprint:
        raise ModelError(
            "another checkpoint was measured",
            where=model.directory,
            why=f"its fingerprint is not that of {measured.name!r} in {calibration.directory / MANIFEST_NAME}",
            fix="serve the model that was measured, or calibrate this one",
        )


def _choose_sharing(calibration: Calibration, world: int, asked: bool | None) -> bool:
    """Return whether ranks hold whole experts in the files of `world`, or complain when otherwise is asked."""
    manifest = calibration.manifest
    if manifest is None:
        return bool(asked)
    noted = manifest.notes.get(SHARING_NOTE, {}).get(str(world))
    made = manifest.topology.expert_parallel if noted is None else bool(noted)
    if asked is not None and asked is not made and world > 1:
        flag = "-u" if asked else "--no-expert-parallel"
        raise TopologyError(
            f"the files of {world} ranks are for {'whole' if made else 'slices of'} experts on each rank",
            where=calibration.directory / MANIFEST_NAME,
            fix=f"leave {flag} out, or make others: gaudi-calib reshard {calibration.path.parent} -t {world} "
            f"{flag}, then gaudi-calib quantize",
        )
    return made
