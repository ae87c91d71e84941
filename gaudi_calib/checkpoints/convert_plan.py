"""What converting an FP8 checkpoint for Gaudi 2 will do, decided before anything is written."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.dequantize import find_input
from gaudi_calib.checkpoints.halving import LARGEST_OF_GAUDI2, count_codes, find_largest
from gaudi_calib.errors import FileError, ModelError, UsageError
from gaudi_calib.files import is_temporary, read_json

RECORD_NAME = "gaudi2_conversion.json"
# Of the downloading tools, not of the model.
_NOT_OF_THE_MODEL = {".git", ".cache"}
_FP8 = ("F8_E4M3", "F8_E5M2")
CHUNK_BYTES = 1 << 20
# vllm-gaudi reads this key of compressed-tensors configs: values that fit Gaudi 2 are not halved again while loading.
FLAVOR_KEY, FLAVOR = "fp8_dtype_flavor", "float8_e4m3fnuz"
_FLAVORED_METHOD = "compressed-tensors"


class Action(Enum):
    """What happens to a tensor."""

    HALVE = "halve"
    DOUBLE = "double"
    COPY = "copy"


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in a safetensors file.

    Attributes:
        name: of the tensor.
        kind: safetensors' word for its dtype.
        start, stop: from the beginning of the file.
    """

    name: str
    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that can be run.

    Attributes:
        checkpoint: what is converted.
        out: directory of the result.
        actions: what happens to each tensor.
        shards: size in bytes of each weight file; the converted one has the same.
        copies: size in bytes of each other file, by its path inside the directory.
    """

    checkpoint: Checkpoint
    out: Path
    actions: dict[str, Action]
    shards: dict[str, int]
    copies: dict[Path, int]

    @property
    def source(self) -> Path:
        """Directory of the checkpoint."""
        return self.checkpoint.directory

    @cached_property
    def is_flavored(self) -> bool:
        """Whether config.json gets the mark by which vllm-gaudi knows that the values fit Gaudi 2."""
        return (self.checkpoint.source.quantization or {}).get("quant_method") == _FLAVORED_METHOD

    def count(self, action: Action) -> int:
        """Return how many tensors an action is for."""
        return sum(one is action for one in self.actions.values())


def plan_conversion(source: Path, out: Path) -> ConversionPlan:
    """Decide what happens to every tensor and file of `source`; nothing is written.

    FP8 weights that have a scale are halved. Their scales are doubled, and so are static
    scales of the activations they multiply and of KV caches, which were made for +-448 too.

    Raises:
        ModelError: no FP8 weights, weights that fit already, or a checkpoint that cannot be read.
        UsageError: `out` is `source` or inside it.
        FileError: `out` holds something else, or the disk is too small.
    """
    source, out = source.resolve(), out.expanduser().resolve()
    if out == source or source in out.parents:
        raise UsageError(
            "the output is inside the checkpoint",
            where=out,
            why="the source is never changed",
            fix="choose a directory outside of it for -o",
        )
    checkpoint = Checkpoint(source)
    plan = ConversionPlan(
        checkpoint,
        out,
        _choose_actions(checkpoint),
        {name: (source / name).stat().st_size for name in sorted(set(checkpoint.tensors.values()))},
        {},
    )
    plan.copies.update(_list_others(source, set(plan.shards)))
    _check_values(plan)
    _check_output(plan)
    return plan


def _choose_actions(checkpoint: Checkpoint) -> dict[str, Action]:
    _ = checkpoint.shapes  # refuses what cannot be read
    actions = dict.fromkeys(checkpoint.stored, Action.COPY)
    for weight in checkpoint.weights.values():
        if weight.scale is not None and not weight.packed:
            actions[weight.values], actions[weight.scale] = Action.HALVE, Action.DOUBLE
    left = [name for name, (kind, _) in checkpoint.stored.items() if kind in _FP8 and actions[name] is Action.COPY]
    if left:
        raise ModelError(
            f"{left[0]!r} is FP8 and no part of the checkpoint",
            where=checkpoint.directory,
            why="a weight file holds it and the index does not list it; loaders read it all the same",
            fix="get the checkpoint again from its source",
        )
    halved = {name for name, action in actions.items() if action is Action.HALVE}
    if not halved:
        raise ModelError(
            "the checkpoint has no FP8 weights, there is nothing to convert",
            where=checkpoint.directory,
            why=f"its weights are {', '.join(sorted({checkpoint.stored[name][0] for name in checkpoint.tensors}))}",
            fix="calibrate it as it is; only FP8 (E4M3) weights are too large for Gaudi 2",
        )
    for name in checkpoint.stored:
        owner = find_input(name)
        if owner == "" or (owner is not None and (owner in halved or f"{owner}.weight" in halved)):
            actions[name] = Action.DOUBLE
    return actions


def _list_others(source: Path, shards: set[str]) -> dict[Path, int]:
    """Return the size of every file that is not a shard, links followed, by its path inside `source`."""
    sizes: dict[Path, int] = {}
    for directory, names, files in os.walk(source, followlinks=True):
        names[:] = sorted(set(names) - _NOT_OF_THE_MODEL)
        for file in sorted(files):
            path = Path(directory, file)
            if path.relative_to(source).as_posix() not in shards | {RECORD_NAME}:
                sizes[path.relative_to(source)] = path.stat().st_size
    return sizes


def find_unconverted(plan: ConversionPlan) -> list[Path]:
    """Return the safetensors files that are no part of the checkpoint, travel as they are and hold FP8."""
    found = []
    for path in plan.copies:
        if path.suffix == ".safetensors":
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                if any(span.kind in _FP8 for span in list_spans(plan.source / path)):
                    found.append(path)
    return found


def _check_values(plan: ConversionPlan) -> None:
    """Refuse weights that fit already; the first value that does not ends the search."""
    for shard in plan.shards:
        for span in list_spans(plan.source / shard):
            if plan.actions[span.name] is Action.HALVE:
                for chunk in read_chunks(plan.source / shard, span):
                    if find_largest(count_codes(chunk)) > LARGEST_OF_GAUDI2:
                        return
    raise ModelError(
        "the checkpoint fits Gaudi 2 already, there is nothing to convert",
        where=plan.source,
        why=f"no FP8 weight is above {LARGEST_OF_GAUDI2:g}",
        fix="serve it as it is, with VLLM_SCALE_ADJUSTMENT=0 in the environment",
    )


def _check_output(plan: ConversionPlan) -> None:
    record = plan.out / RECORD_NAME
    if record.is_file():
        if read_json(record).get("source") != str(plan.source):
            raise FileError(
                "the output holds the conversion of another checkpoint",
                where=record,
                why=f"not of {plan.source}",
                fix="choose another -o",
            )
    elif plan.out.exists() and any(not is_temporary(path.name) for path in plan.out.iterdir()):
        raise FileError(
            "the output directory is not empty",
            where=plan.out,
            why=f"and it has no {RECORD_NAME}, so it is no conversion that could go on",
            fix="choose an empty or a new directory for -o",
        )
    parent = next(path for path in (plan.out, *plan.out.parents) if path.exists())
    present = sum(path.stat().st_size for path in plan.out.rglob("*") if path.is_file()) if plan.out.exists() else 0
    needed, free = sum(plan.shards.values()) + sum(plan.copies.values()) - present, shutil.disk_usage(parent).free
    if needed > free:
        raise FileError(
            "the disk is too small for the converted checkpoint",
            where=plan.out,
            why=f"it needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free",
            fix="free space, or choose an -o on another disk",
        )


def list_spans(path: Path) -> list[Span]:
    """Return the tensors of a safetensors file, in the order of their bytes."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    base = 8 + header_bytes
    spans = [
        Span(name, entry["dtype"], base + entry["data_offsets"][0], base + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return sorted(spans, key=lambda span: (span.start, span.stop))


def read_chunks(path: Path, span: Span) -> Iterator[bytearray]:
    """Yield the bytes of a tensor, a megabyte at a time."""
    with path.open("rb") as file:
        file.seek(span.start)
        for start in range(span.start, span.stop, CHUNK_BYTES):
            yield bytearray(file.read(min(CHUNK_BYTES, span.stop - start)))
