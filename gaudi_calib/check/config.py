"""The QUANT_CONFIG files of a calibration, and the place that they name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gaudi_calib.advice import advise_relocation
from gaudi_calib.check.subject import Subject
from gaudi_calib.config.file import validate_file
from gaudi_calib.config.model import QuantConfig, find_idle_patterns
from gaudi_calib.config.presets import find_failure
from gaudi_calib.errors import Finding, name_first
from gaudi_calib.files import read_json
from gaudi_calib.fp8 import Device
from gaudi_calib.models.field import list_idle
from gaudi_calib.moved import find_beside, find_moved_configs, list_quant_configs


def inspect_config(path: Path, device: Device | None) -> tuple[QuantConfig | None, list[Finding]]:
    """Return the config in the file `path`, None where it is not usable, and all there is to say about it."""
    inspection = validate_file(path, device.name if device else None)
    kinds = {"config-invalid": inspection.errors, "config": inspection.warnings}
    return inspection.config, [
        replace(finding, where=f"{path}, key {finding.where}" if finding.where else str(path), kind=kind)
        for kind, findings in kinds.items()
        for finding in findings
    ]


def find_misplaced(subject: Subject) -> Iterator[Finding]:
    """Yield the configs of the run whose `dump_stats_path` leads elsewhere, or nowhere."""
    run = subject.place.path.resolve().parent
    moved = dict(find_moved_configs(run))
    given = subject.config_path
    if given and subject.config and given.resolve().parent != run:
        beside = find_beside(given, read_json(given)["dump_stats_path"])
        moved |= {given: beside} if beside else {}
    if moved:
        yield Finding(
            name_first(moved, 1),
            "configs name another place than the one where their run is",
            "dump_stats_path is absolute, and the run was moved or copied; INC takes ranges and scales from there",
            f"run: {advise_relocation(next(iter(moved)).parent)}",
            "place-moved",
        )
    layout = subject.place.layout
    own = (given and given.resolve(), layout and layout.measure_config)  # others in the directory may be anybody's
    for path, named in list_quant_configs(run).items():
        if path in own and path not in moved and not Path(named).parent.is_dir():
            yield Finding(
                str(path),
                f"dump_stats_path leads nowhere: {Path(named).parent} is not there",
                "INC finds no ranges, and stops at the first module",
                "copy the directory there, or name the one that is meant",
                "place-missing",
            )


def find_idle(subject: Subject) -> Iterator[Finding]:
    """Yield the patterns that match no module, where the model is known."""
    if subject.plan is not None and subject.config is not None:
        listed = {name for ranks in subject.ranges.values() for rank in ranks for name in rank.modules}
        made = subject.place.manifest
        expected = list_idle(made.preset.name if made else "")
        for finding in find_idle_patterns(subject.config, [*subject.plan.node_names, *listed], expected):
            yield replace(finding, where=f"{subject.config_path}, key {finding.where}")


def find_failure_of_attention(subject: Subject) -> Iterator[Finding]:
    """Yield what is known to go wrong where the model's KV cache is in FP8, if the model is there to be looked at."""
    if subject.plan is None or subject.config is None:
        return
    found = find_failure(subject.plan.checkpoint.source.text_config, subject.config)
    if found is not None:
        yield replace(found, where=f"{subject.config_path}, key {found.where}")
