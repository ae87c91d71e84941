"""Whether a QUANT_CONFIG, and the files behind it, can serve a model on a device with so many ranks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.config.file import read_quant_config
from gaudi_calib.config.model import QuantConfig, describe_scaling, get_scales_device
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, ModelError, TopologyError
from gaudi_calib.files import read_json
from gaudi_calib.fp8 import Device
from gaudi_calib.layout import MANIFEST_NAME, RankFile
from gaudi_calib.models.families import Family, find_family
from gaudi_calib.models.fingerprint import fingerprint_model
from gaudi_calib.models.source import ModelSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A QUANT_CONFIG that quantizes, and what lies where its `dump_stats_path` points.

    Attributes:
        path: the file.
        config: its content.
        placed: ranges and scales.
    """

    path: Path
    config: QuantConfig
    placed: CalibrationDir

    @property
    def family(self) -> Family | None:
        """Family of the model that was measured, as far as the manifest tells."""
        model = self.placed.manifest and self.placed.manifest.model
        try:
            return find_family(model.model_type) if model and model.model_type else None
        except ModelError:
            return None

    def list_modules(self, world: int) -> tuple[str, ...]:
        """Return the modules that INC patches, nothing where no list is there."""
        path = self.placed.path / RankFile(self.placed.dump or "", rank=0, world=world, is_mod_list=True).name
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
    placed = CalibrationDir.named_by(config, path)
    if config.uses_stats_files and not placed.path.is_dir():
        raise FileError(
            f"the directory of ranges and scales that {path.name} names is not there",
            where=placed.path,
            why="dump_stats_path is absolute, and the run was made elsewhere or moved",
            fix=f"copy the run to that path, or correct dump_stats_path in {path}",
        )
    newest = placed.newest_manifest
    if newest is not None and newest.good is None:
        raise FileError(
            "the calibration did not finish",
            where=placed.path / MANIFEST_NAME,
            why=f"its status is {newest.status}" + (f": {newest.error}" if newest.error else ""),
            fix="run `gaudi-calib calibrate` again",
        )
    return Calibration(path, config, placed)


def require_fit(
    calibration: Calibration,
    model: ModelSource,
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
        served_so = model.family is not None and model.family.expert_parallel
        return served_so if expert_parallel is None else expert_parallel
    _require_files(calibration, model, world)
    _require_fresh(calibration, model, world)
    _require_model(calibration, model)
    return _choose_sharing(calibration, world, expert_parallel)


def _require_device(calibration: Calibration, device: Device | None) -> None:
    made_for = calibration.placed.device
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


def _require_files(calibration: Calibration, model: ModelSource, world: int) -> None:
    tag = calibration.config.method_table.file_tag
    for method, what in ((None, "ranges"), (tag, "scales")):
        missing = calibration.placed.list_missing(world, method=method)
        if len(missing) == world and method is None:
            raise _no_world(calibration, model, world)
        if missing:
            more = f" (nor {len(missing) - 1} more)" * (len(missing) > 1)
            raise FileError(
                f"the {what} of a rank are missing: {missing[0].name}{more}",
                where=calibration.placed.path,
                why=f"each of the {world} ranks reads its own file",
                fix=f"copy the whole directory again, or make them: {_quantize(calibration, model, world)}",
            )
        files = [calibration.placed.name_file(rank, world, method=method) for rank in range(world)]
        calibration.placed.require_recorded(files)


def _quantize(calibration: Calibration, model: ModelSource, world: int) -> str:
    """The command that makes scales for `world` ranks."""
    return f"gaudi-calib quantize -m {model.name} -o {calibration.path.parent.parent} -t {world}"


def _no_world(calibration: Calibration, model: ModelSource, world: int) -> FileError:
    placed = calibration.placed
    found = {file.position[1] for file in placed.files.values() if file.is_ranges}
    worlds = sorted(size for size in found if not placed.list_missing(size))
    served = " or ".join(f"-t {size}" for size in worlds)
    return FileError(
        f"no files for {world} ranks",
        where=placed.name_file(0, world),
        why=f"there are files for {', '.join(map(str, worlds)) or 'no'} ranks; scales depend on what a rank holds",
        fix=f"gaudi-calib reshard {calibration.path.parent} -t {world} && {_quantize(calibration, model, world)}"
        + (f"; or serve with {served}" if worlds else ""),
    )


def _require_fresh(calibration: Calibration, model: ModelSource, world: int) -> None:
    placed = calibration.placed
    if placed.manifest is None:
        _log.warning("no %s in %s: model and scales are not checked", MANIFEST_NAME, placed.path)
        return
    settings = describe_scaling(calibration.config, placed.device) if placed.device else None
    served = placed.list_scales(world, calibration.config.method_table.file_tag)
    for stale in placed.find_stale(served, settings=settings):
        raise FileError(
            f"{stale.path.name} is stale", where=stale.path, why=stale.why, fix=_quantize(calibration, model, world)
        )


def _require_model(calibration: Calibration, model: ModelSource) -> None:
    measured = calibration.placed.manifest and calibration.placed.manifest.model
    if not measured or not measured.fingerprint:
        return
    if model.directory is None:
        _log.warning("%s is not downloaded: whether it is the model that was measured is not checked", model.name)
    elif fingerprint_model(model.directory) != measured.fingerprint:
        raise ModelError(
            "another checkpoint was measured",
            where=model.directory,
            why=f"its fingerprint is not that of {measured.name!r} in {calibration.placed.path / MANIFEST_NAME}",
            fix="serve the model that was measured, or calibrate this one",
        )


def _choose_sharing(calibration: Calibration, world: int, asked: bool | None) -> bool:
    """Return whether ranks hold whole experts in the files of `world`, or complain when otherwise is asked."""
    manifest = calibration.placed.manifest
    if manifest is None:
        return bool(asked)
    made = manifest.shares_experts(world)
    if asked is not None and asked is not made and world > 1:
        flag = "-u" if asked else "--no-expert-parallel"
        raise TopologyError(
            f"the files of {world} ranks are for {'whole' if made else 'slices of'} experts on each rank",
            where=calibration.placed.path / MANIFEST_NAME,
            fix=f"leave {flag} out, or make others: gaudi-calib reshard {calibration.path.parent} -t {world} "
            f"{flag}, then gaudi-calib quantize",
        )
    return made
