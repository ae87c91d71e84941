"""The manifest of a directory whose ranks were unified or expanded."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.runs.evidence import NOTE

if TYPE_CHECKING:
    from gaudi_calib.manifest import Manifest, Record

_INHERITED = ("model", "dataset", "device", "platform", "engine", "config", "notes")


@contextlib.contextmanager
def record_conversion(
    directory: Path, out: Path, world: int, *, expert_parallel: bool | None
) -> "Iterator[Record | None]":
    """Keep the manifest of `out` while its files are written; None where there is no manifest to keep.

    A result elsewhere inherits what the source's manifest says about model and data.

    Args:
        expert_parallel: how the experts of `world` are split; None for a model without.
    """
    source, target = directory / MANIFEST_NAME, out / MANIFEST_NAME
    if not source.is_file() and not target.is_file():
        yield None
        return
    from gaudi_calib.manifest import Topology, hash_files, read_manifest, record_run

    facts = {}
    if not target.is_file():
        before = read_manifest(source).good
        facts = {} if before is None else _inherit(before)
    with record_run(target, fresh=False, **facts) as record:
        before_topology = record.manifest.topology
        worlds = sorted({*before_topology.worlds, world})
        split = before_topology.expert_parallel
        if expert_parallel is not None:
            noted = {**record.manifest.notes.get(NOTE, {}), str(world): expert_parallel}
            record.update(notes={NOTE: noted})
            split = expert_parallel if not set(worlds) - {1, world} else split
        record.update(
            topology=Topology(measured_world=before_topology.measured_world, worlds=worlds, expert_parallel=split)
        )
        yield record
        record.update(files=hash_files(out))


def note_scales(record: "Record", out: Path, origins: Mapping[str, str], settings: Mapping) -> None:
    """Record which ranges each scale file was computed from.

    Args:
        origins: name of the range file (npz) by name of the scale file.
        settings: as `describe_scaling` gives them.
    """
    from gaudi_calib.files import hash_file
    from gaudi_calib.manifest import ScaleOrigin

    hashes = {name: hash_file(out / name) for name in set(origins.values())}
    scales = {
        name: ScaleOrigin(ranges={ranges: hashes[ranges]}, settings=dict(settings)) for name, ranges in origins.items()
    }
    record.update(scales=scales)


def _inherit(before: "Manifest") -> dict:
    from gaudi_calib.manifest import Step

    done = Step(command=before.command, started_at=before.started_at, finished_at=before.finished_at)
    facts = {name: getattr(before, name) for name in _INHERITED}
    topology = before.topology.model_copy(update={"worlds": []})
    return {**facts, "topology": topology, "history": [*before.history, done]}
