"""The nodes of a calibration: the same on every rank, and all that the model needs."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from gaudi_calib.check.subject import Subject, iterate_ranks
from gaudi_calib.config.presets import quant_config
from gaudi_calib.errors import CalibrationError, ConfigError, Finding, ModelError, RangeError, name_first
from gaudi_calib.gaps import find_uncovered, refuse_uncovered
from gaudi_calib.layout import RankFile
from gaudi_calib.models.source import locate_model
from gaudi_calib.ranges.idle import find_idle
from gaudi_calib.ranges.unify import gather_world


def find_differing(subject: Subject) -> Iterator[Finding]:
    """Yield, for every rank whose nodes are not those of the first, what differs."""
    for ranks in subject.ranges.values():
        for rank in ranks[1:] or ranks:
            try:
                gather_world([ranks[0], rank])
            except RangeError:  # the values are looked at elsewhere
                continue
            except CalibrationError as error:
                file = subject.place.name_file(rank.rank, rank.world, extension="json")
                yield replace(Finding.of(error, "nodes-differ"), where=error.where or str(file))


def find_silent(subject: Subject) -> Iterator[Finding]:
    """Yield the modules that INC patched, and that have no ranges because they never ran."""
    silent: dict[str, None] = {}
    for rank, table in iterate_ranks(subject):
        if rank.modules != table.inventory.names:
            idle = find_idle(rank.modules, table.inventory.names)
            missing = (name for name in rank.modules if name not in table.inventory.index and name not in idle)
            silent |= dict.fromkeys(missing)
    unblocked = [name for name in silent if subject.config is None or not subject.config.is_blocked(name)]
    if unblocked:
        yield Finding(
            name_first(unblocked),
            f"modules that never ran when it was measured: {len(unblocked)}",
            "they are in _mod_list.json and have no ranges; INC fails where one of them runs when serving",
            "measure with data, and with a prefill and a decode, that reach them; or add them to the blocklist",
            "module-silent",
        )


def plan_model(subject: Subject) -> Iterator[Finding]:
    """Find the nodes of the model, where it is there, for `subject`; yield why not, and whether it is another."""
    made = subject.place.manifest
    name, directory = subject.model or (made.model.name if made and made.model else ""), None
    with suppress(*([] if subject.model else [ModelError])):  # the one that was measured need not be there
        directory = locate_model(name) if name else None
    if directory is None:
        if subject.model:
            yield Finding(name, "the model is not downloaded", fix="give its directory to -m", kind="model-unread")
        return
    from gaudi_calib.checkpoints.plan import plan_model as plan
    from gaudi_calib.runs.facts import describe_model, require_same_model

    dtype = subject.config.dtype if subject.config else (made and made.dtype) or "bfloat16"
    try:
        subject.plan = plan(directory, dtype, made.vllm if made else None)
    except CalibrationError as error:  # for example of a family that nobody described
        yield Finding.of(error, "model-unread")
        return
    try:
        require_same_model(subject.place, describe_model(name, subject.plan))
    except CalibrationError as error:
        yield Finding.of(error, "model-foreign")


def find_gaps(subject: Subject) -> Iterator[Finding]:
    """Yield the modules that the config, or without one the preset of the family, quantizes and that have no ranges."""
    place, plan = subject.place, subject.plan
    if plan is None or (subject.config_path is not None and not subject.tag):
        return
    config = subject.config or quant_config(plan.family, place.path / (place.dump or RankFile().dump))
    if config.ignore_modules_wo_measures:
        return
    measured_with = None
    with suppress(ConfigError):  # one that is invalid is told of elsewhere
        measured_with = place.measured_with or place.measure_config
    for rank, table in iterate_ranks(subject):
        names = find_uncovered(
            plan.ops, config, table.inventory.names, modules=rank.modules, measured_with=measured_with
        )
        if names:
            path = subject.config_path or place.path
            kind = "module-unmeasured" if place.manifest is None else "module-uncovered"
            yield Finding.of(refuse_uncovered(place, names, path, rank.world), kind)
            return
