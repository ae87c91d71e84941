"""`check --fix`: what of a calibration can be mended without a measurement."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from gaudi_calib.check.files import list_bare
from gaudi_calib.check.subject import Subject
from gaudi_calib.errors import RangeError, count
from gaudi_calib.rankfiles.store import read_ranges, read_scales, write_rank_set
from gaudi_calib.runs.postprocess import postprocess_dir
from gaudi_calib.runs.quantize import Scaling, quantize_dir
from gaudi_calib.runs.recipe import find_recipe
from gaudi_calib.runs.relocate import relocate_run
from gaudi_calib.staging import stage_files

_log = logging.getLogger(__name__)

# Where one of these was found, files are not what they should be, and nothing is computed from them.
_UNSAFE = {"file-damaged", "file-changed", "nodes-differ", "range-damaged", "config-invalid", "scales-foreign"}


def mend(subject: Subject, kinds: Collection[str]) -> Iterator[str]:
    """Mend what is safe to mend, and yield what was done.

    Args:
        kinds: what was found.

    Raises:
        FileError: a file cannot be written.
    """
    place = subject.place
    if "place-moved" in kinds and (changed := relocate_run(place.path)):
        yield f"relocated: {count(len(changed), 'file')} to {place.path.resolve().parent}"
    if _UNSAFE & set(kinds):
        return
    if "npz-missing" in kinds:  # what depends on them is to be looked at again
        if written := _restore_npz(subject):
            yield f"restored: {count(len(written), 'npz file')} in {place.path}"
        return
    every = {world: place.list_methods(world) for world in place.worlds}
    if "kv-cache" in kinds and all(_can_compute(subject, tag) for tags in every.values() for tag in tags):
        postprocess_dir(place.path, place.path, dump=place.dump)
        yield f"postprocessed: the ranges in {place.path}"
        yield from _recompute(subject, every)  # scales of the ranges as they were have been set aside
    if {"scales-missing", "scales-stale"} & set(kinds):
        yield from _recompute(subject, {world: subject.list_methods(world) for world in subject.worlds})


def _can_compute(subject: Subject, tag: str) -> bool:
    device = subject.device
    return device is not None and not isinstance(find_recipe(subject.place, tag, device.name), str)


def _restore_npz(subject: Subject) -> list[Path]:
    """Write the `.npz` of every rank file that has only its `.json`, and return them."""
    place, written = subject.place, []
    with stage_files(place.path) as staging:
        for path in list_bare(subject):
            method, npz = place.files[path].method, path.with_suffix(".npz")
            rank_set = read_scales(path) if method else read_ranges(path)
            for made in write_rank_set(staging, rank_set, method=method):
                if made.suffix == ".npz":  # INC without torch.distributed has no rank and world in its name
                    made.rename(staging / npz.name)
                    written.append(npz)
                else:
                    made.unlink()
    return written


def _recompute(subject: Subject, methods: dict[int, list[str]]) -> Iterator[str]:
    place, device = subject.place, subject.device
    for world, tags in methods.items():
        for tag in tags:
            if device is None or not _can_compute(subject, tag):
                continue
            own = place.quant_config is not None and place.quant_config.method_table.file_tag == tag
            side = subject.config_path if tag == subject.tag and subject.config_path != place.quant_path else None
            method = None if own or side else tag
            scaling = Scaling(method, quant_config=side, device=device.name, world=world, dump=place.dump)
            try:
                made = quantize_dir(place.path, scaling=scaling)
            except RangeError as error:
                _log.warning("Not computed: %s scales of %d ranks: %s", tag, world, error)
                continue
            yield f"computed: {tag} scales of {count(world, 'rank')}, {count(len(made.files), 'file')} in {place.path}"
