"""Whether a QUANT_CONFIG, and the files behind it, can serve a model on a device with so many ranks."""

import contextlib
import logging
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.advice import Advice, advise_relocation, advise_repeating
from gaudi_calib.config.file import read_quant_config
from gaudi_calib.config.model import (
    QuantConfig,
    describe_scaling,
    get_scales_device,
    with_dump_stats_path,
)
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, ModelError, TopologyError
from gaudi_calib.files import read_json, write_json
from gaudi_calib.fp8 import Device
from gaudi_calib.layout import MANIFEST_NAME, RankFile
from gaudi_calib.models.families import Family, find_family
from gaudi_calib.models.fingerprint import fingerprint_model
from gaudi_calib.models.source import ModelSource
from gaudi_calib.moved import find_beside

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A QUANT_CONFIG that quantizes, and the ranges and scales that belong to it.

    Attributes:
        path: the file.
        config: its content; where the run has moved, with the `dump_stats_path` it should have.
        placed: ranges and scales.
        old_place: where the file says that they are, if the run has moved.
    """

    path: Path
    config: QuantConfig
    placed: CalibrationDir
    old_place: Path | None = None

    @property
    def family(self) -> Family | None:
        """Family of the model that was measured, as far as the manifest tells."""
        model = self.placed.manifest and self.placed.manifest.model
        try:
            return find_family(model.model_type) if model and model.model_type else None
        except ModelError:
            return None

    @property
    def env(self) -> dict[str, str]:
        """Environment that serving needs by the preset of the run; nothing where no manifest tells."""
        return self.placed.manifest.preset.env if self.placed.manifest else {}

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
    if config.mode != "QUANTIZE":
        raise ConfigError(
            f"{path.name} does not serve: its mode is {config.mode}",
            where=path,
            fix="give the config that calibration wrote for serving, OUT/<model>/maxabs_quant_<device>.json",
        )
    beside = find_beside(path, config.dump_stats_path)
    old_place = Path(config.dump_stats_path).parent if beside and config.uses_stats_files else None
    config = with_dump_stats_path(config, beside) if beside else config
    placed = CalibrationDir.named_by(config, path)
    if config.uses_stats_files and not placed.path.is_dir():
        raise FileError(
            f"the directory of ranges and scales that {path.name} names is not there",
            where=placed.path,
            why="dump_stats_path is absolute, the run was made elsewhere or moved, and no such directory is beside "
            f"{path.name}",
            fix=f"copy {placed.path.name} beside {path}, or the run to that path",
        )
    newest = placed.newest_manifest
    if newest is not None and newest.good is None:
        raise FileError(
            "the calibration did not finish",
            where=placed.path / MANIFEST_NAME,
            why=f"its status is {newest.status}" + (f": {newest.error}" if newest.error else ""),
            fix=advise_repeating(newest.command, newest.directory),
        )
    return Calibration(path, config, placed, old_place)


def place_config(calibration: Calibration) -> Path:
    """Return the file that QUANT_CONFIG must be: the one given; where the run has moved, a copy that names its place.

    The copy outlives this process, and ranks of all nodes read it, so it is a hidden file beside the one given.
    There is one for each place from which a run is served.

    Raises:
        FileError: it can be written neither there nor to the user's cache.
    """
    if calibration.old_place is None:
        return calibration.path
    path, dump = calibration.path.absolute(), calibration.config.dump_stats_path
    content = {**read_json(path), "dump_stats_path": dump}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gaudi-calib").absolute()
    for directory, mark in ((path.parent, dump), (cache, f"{path}:{dump}")):
        copy = directory / f".{zlib.crc32(mark.encode()):08x}-{path.name}"
        with contextlib.suppress(FileError):
            if copy.is_file() and read_json(copy) == content:
                return copy
        with contextlib.suppress(FileError):
            write_json(copy, content)
            return copy
    raise FileError(
        "the run has moved, and no copy of its config can be written that says so",
        where=path,
        why=f"neither {path.parent} nor {cache} can be written",
        fix=f"set XDG_CACHE_HOME to a directory that can, or run `{advise_relocation(path.parent)}` as its owner",
    )


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
    _require_device(calibration, model, world, device)
    if not calibration.config.uses_stats_files:
        manifest = calibration.placed.manifest
        served_so = manifest.expert_parallel if manifest else model.family is not None and model.family.expert_parallel
        return bool(served_so) if expert_parallel is None else expert_parallel
    _require_files(calibration, model, world)
    _require_fresh(calibration, model, world)
    _require_model(calibration, model)
    return _choose_sharing(calibration, model, world, expert_parallel)


def _require_device(calibration: Calibration, model: ModelSource, world: int, device: Device | None) -> None:
    made_for = calibration.placed.device
    if device is None or not calibration.config.uses_stats_files:
        return
    if made_for is not None and made_for != device:
        raise FileError(
            f"these files are for {made_for.name}, and {device.name} would serve",
            where=calibration.path,
            why="FP8 range and free scales differ between the devices",
            fix=advise(calibration, model).make_for(device, world),
        )
    get_scales_device(calibration.config, device)


def _require_files(calibration: Calibration, model: ModelSource, world: int) -> None:
    tag, advice = calibration.config.method_table.file_tag, advise(calibration, model)
    for method, what in ((None, "ranges"), (tag, "scales")):
        missing = calibration.placed.list_missing(world, method=method)
        if not missing:
            files = [calibration.placed.name_file(rank, world, method=method) for rank in range(world)]
            calibration.placed.require_recorded(files, advice)
            continue
        if len(missing) == world and method is None:
            raise _no_world(calibration, model, world)
        more = f" (nor {len(missing) - 1} more)" * (len(missing) > 1)
        mend = advice.compute_scales(world) if method or world in advice.worlds else advice.derive(world)
        raise FileError(
            f"the {what} of a rank are missing: {missing[0].name}{more}",
            where=calibration.placed.path,
            why=f"each of the {world} ranks reads its own file",
            fix="copy the whole directory again" + (f", or make them: {mend}" if mend else ""),
        )


def advise(calibration: Calibration, model: ModelSource) -> Advice:
    """Return what to run over a calibration of `model`."""
    return calibration.placed.advise(model.name, calibration.path)


def _no_world(calibration: Calibration, model: ModelSource, world: int) -> FileError:
    advice = advise(calibration, model)
    worlds = [str(size) for size in advice.worlds if not calibration.placed.list_missing(size)]
    made = advice.compute_scales(world) if world in advice.worlds else advice.derive(world)
    ways = [made, "serve with " + " or ".join(f"-t {size}" for size in worlds) if worlds else None]
    return FileError(
        f"no files for {world} ranks",
        where=calibration.placed.name_file(0, world),
        why=f"there are files for {', '.join(worlds) or 'no'} ranks; scales depend on what a rank holds",
        fix="; or ".join(filter(None, ways)) or "copy the whole directory again",
    )


def _require_fresh(calibration: Calibration, model: ModelSource, world: int) -> None:
    placed = calibration.placed
    if placed.manifest is None:
        _log.warning("no %s in %s: model and scales are not checked", MANIFEST_NAME, placed.path)
        return
    settings = describe_scaling(calibration.config, placed.device) if placed.device else None
    served = placed.list_scales(world, calibration.config.method_table.file_tag)
    for stale in placed.find_stale(served, settings=settings):
        mend = advise(calibration, model).compute_scales(world)
        raise FileError(f"{stale.path.name} is stale", where=stale.path, why=stale.why, fix=mend)


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


def _choose_sharing(calibration: Calibration, model: ModelSource, world: int, asked: bool | None) -> bool:
    """Return whether ranks hold whole experts in the files of `world`, or complain when otherwise is asked."""
    if asked and model.config and model.expert_count is None:
        _log.warning("-u/--expert-parallel has no effect: the model has no experts")
        return False
    manifest = calibration.placed.manifest
    made = manifest.shares_experts(world) if manifest else None
    if made is None:
        return bool(asked)
    if asked is not None and asked is not made and world > 1:
        flag = "-u" if asked else "--no-expert-parallel"
        others = advise(calibration, model).derive(world, flag=flag)
        raise TopologyError(
            f"the files of {world} ranks are for {'whole' if made else 'slices of'} experts on each rank",
            where=calibration.placed.path / MANIFEST_NAME,
            fix=f"leave {flag} out" + (f", or make others: {others}" if others else ""),
        )
    return made
