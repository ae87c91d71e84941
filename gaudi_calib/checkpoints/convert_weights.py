"""Converting an FP8 checkpoint for Gaudi 2: FP8 weights halved, their scales doubled, all else as it was.

The result has the source's layout to the byte: a weight file is its header, unchanged
(names, types, shapes, metadata such as `format`), then its tensors one after the other.
Files are written beside their place, compared with the source tensor by tensor and
renamed; a record in the output says which are done, so that a second call goes on
where the first was stopped. The source is only read.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from gaudi_calib.checkpoints.convert_plan import (
    CHUNK_BYTES,
    FLAVOR,
    FLAVOR_KEY,
    RECORD_NAME,
    Action,
    ConversionPlan,
    Span,
    find_unconverted,
    list_spans,
    read_chunks,
)
from gaudi_calib.checkpoints.dequantize import read_scale
from gaudi_calib.checkpoints.halving import count_codes, count_nan, count_rounded, double_scale, halve, is_half
from gaudi_calib.errors import FileError, ModelError
from gaudi_calib.files import read_json, stage_files, write_json

_LOG = logging.getLogger(__name__)
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,
}


@dataclass(frozen=True)
class Tally:
    """What was done to the tensors of one file, or of all.

    Attributes:
        weights: tensors that were halved.
        scales: tensors that were doubled.
        values: FP8 values that were halved.
        rounded: those of them that lost their last bit, 2**-9 before the scale.
    """

    weights: int = 0
    scales: int = 0
    values: int = 0
    rounded: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(asdict(self).values(), asdict(other).values())))


def convert_weights(plan: ConversionPlan, *, on_file: Callable[[str], None] = lambda name: None) -> Tally:
    """Run `plan` and return what was done, by this call and by those that it continues.

    Args:
        on_file: called with the name of every file that is done.

    Raises:
        ModelError: an FP8 weight is NaN, or a scale is too large to be doubled.
        FileError: the disk is full, or a written file differs from what it should be.
    """
    record = _open_record(plan)
    for shard in plan.shards:
        done = record["shards"].get(shard)
        if done is None or done["files"] != _stamp(plan, shard):
            tally = _convert_shard(plan, shard)
            record["shards"][shard] = {"files": _stamp(plan, shard), **asdict(tally)}
            write_json(plan.out / RECORD_NAME, record)
        on_file(shard)
    for path in plan.copies:
        _copy_file(plan, path)
        on_file(str(path))
    write_json(plan.out / RECORD_NAME, record | {"status": "ok"})
    return sum((_read_tally(record["shards"][shard]) for shard in plan.shards), Tally())


def _open_record(plan: ConversionPlan) -> dict[str, Any]:
    path = plan.out / RECORD_NAME
    record = read_json(path) if path.is_file() else {"source": str(plan.source), "shards": {}}
    record["status"] = "running"
    write_json(path, record)
    return record


def _read_tally(entry: dict[str, Any]) -> Tally:
    return Tally(*(entry[name] for name in asdict(Tally())))


def _stamp(plan: ConversionPlan, shard: str) -> list[list[int]]:
    """Return size and time of change of a shard and of its conversion, or nothing where one is missing."""
    with contextlib.suppress(FileNotFoundError):
        stats = [(directory / shard).stat() for directory in (plan.source, plan.out)]
        return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    return []


def _convert_shard(plan: ConversionPlan, shard: str) -> Tally:
    """Write, compare and put in place one weight file."""
    source = plan.source / shard
    with _explained(plan.out / shard), stage_files(plan.out) as staging:
        written = staging / shard
        written.parent.mkdir(parents=True, exist_ok=True)
        with written.open("wb") as file:
            tally = _write_shard(source, file, plan.actions)
            file.flush()
            os.fsync(file.fileno())
        compare_shards(source, written, plan.actions)
    _LOG.debug("%s: %s", shard, tally)
    return tally


def _write_shard(source: Path, file: IO[bytes], actions: dict[str, Action]) -> Tally:
    """Write the conversion of the safetensors file `source`, a megabyte at a time."""
    spans = list_spans(source)
    with source.open("rb") as original:
        file.write(original.read(spans[0].start if spans else None))
    tally = Tally()
    for span in spans:
        action = actions[span.name]
        if action is Action.HALVE:
            tally += _write_halves(source, span, file)
        elif action is Action.DOUBLE:
            file.write(_double_span(source, span))
            tally += Tally(scales=1)
        else:
            file.writelines(read_chunks(source, span))
    return tally


def _write_halves(source: Path, span: Span, file: IO[bytes]) -> Tally:
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in read_chunks(source, span):
        counts += count_codes(chunk)
        file.write(halve(chunk))
    if count_nan(counts):
        raise ModelError(
            f"{count_nan(counts)} values of {span.name!r} are NaN",
            where=source,
            why="a weight is a number",
            fix="get the checkpoint again from its source",
        )
    return Tally(weights=1, values=span.stop - span.start, rounded=count_rounded(counts))


def _double_span(source: Path, span: Span) -> bytes:
    data = b"".join(read_chunks(source, span))
    scale = torch.frombuffer(bytearray(data), dtype=_DTYPES[span.kind]) if span.kind in _DTYPES and data else None
    doubled = None if scale is None else double_scale(scale)
    if doubled is None:
        raise ModelError(
            f"the scale {span.name!r} cannot be doubled",
            where=source,
            why=f"twice its largest value is no {span.kind}",
            fix="get the checkpoint again from its source, or convert the unquantized one to FP8 for Gaudi 2",
        )
    return doubled.view(torch.uint8).numpy().tobytes()


def compare_shards(source: Path, written: Path, actions: dict[str, Action]) -> None:
    """Open both files anew and compare every tensor.

    Raises:
        FileError: a tensor that should be as it was differs, a weight is not half (but for
            one rounding), a scale is not twice the source's, or names or metadata differ.
    """
    with safe_open(source, framework="pt") as before, safe_open(written, framework="pt") as after:
        if before.metadata() != after.metadata() or set(before.keys()) != set(after.keys()):
            raise _differs(written, "names or metadata")
        for name in before.keys():
            old, new = before.get_tensor(name), after.get_tensor(name)
            if old.dtype != new.dtype or old.shape != new.shape or not _is_converted(old, new, actions[name]):
                raise _differs(written, repr(name))


def _is_converted(old: torch.Tensor, new: torch.Tensor, action: Action) -> bool:
    if action is Action.DOUBLE:
        return torch.equal(read_scale(new).to(torch.float64), 2 * read_scale(old).to(torch.float64))
    compare = is_half if action is Action.HALVE else torch.equal
    pairs = zip(_split_bytes(old), _split_bytes(new))
    return all(compare(mine, theirs) for mine, theirs in pairs)


def _split_bytes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from tensor.reshape(-1).view(torch.uint8).split(CHUNK_BYTES)


def _differs(path: Path, what: str) -> FileError:
    return FileError(
        f"{what} of {path.name} is not what was written",
        where=path,
        why="it was read again and compared with the source",
        fix="check the disk, and that nobody changes the checkpoint; then run the same command again",
    )


def _copy_file(plan: ConversionPlan, path: Path) -> None:
    """Copy a file as it is, or config.json with the mark that vllm-gaudi looks for, unless it is there already."""
    source, target = plan.source / path, plan.out / path
    if plan.is_flavored and path == Path("config.json"):
        config = read_json(source)
        for place in (config, config.get("text_config") or {}):
            if "quantization_config" in place:
                place["quantization_config"][FLAVOR_KEY] = FLAVOR
        write_json(target, config)
        return
    if target.is_file():
        old, new = source.stat(), target.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return
    with _explained(target), stage_files(plan.out) as staging:
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, staging / path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what to do when a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"cannot write {path.name}",
            where=path,
            why=error.strerror or str(error),
            fix="free disk space or choose another -o; run the same command again, files that are done are kept",
        ) from error


def describe_plan(plan: ConversionPlan, *, is_full: bool) -> str:
    """Return the plan as lines for people.

    Args:
        is_full: also every file with its size.
    """
    totals = sum(plan.shards.values()), sum(plan.copies.values())
    counts = {action: plan.count(action) for action in Action}
    lines = [
        f"{plan.source} -> {plan.out}",
        f"  {len(plan.shards)} weight files, {_show_size(totals[0])}: {counts[Action.HALVE]} FP8 weights halved, "
        f"{counts[Action.DOUBLE]} scales doubled, {counts[Action.COPY]} tensors as they are",
        *([f"    {name}  {_show_size(size)}" for name, size in plan.shards.items()] if is_full else []),
        f"  {len(plan.copies)} other files, {_show_size(totals[1])}, "
        + (f"copied; config.json gets {FLAVOR_KEY}" if plan.is_flavored else "copied"),
        *([f"    {path}  {_show_size(size)}" for path, size in plan.copies.items()] if is_full else []),
        *(f"  not converted, though FP8: {path}, which the index does not list" for path in find_unconverted(plan)),
    ]
    return "\n".join(lines)


def _show_size(size_bytes: int) -> str:
    """Return a size for people.

    >>> _show_size(999), _show_size(5_230_000_000)
    ('999 B', '5.2 GB')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size_bytes >= 10**power:
            return f"{size_bytes / 10**power:.1f} {unit}"
    return f"{size_bytes} B"


def describe_result(plan: ConversionPlan, tally: Tally) -> str:
    """Return what was done, and how to serve it, as lines for people."""
    share = tally.rounded / tally.values if tally.values else 0.0
    lines = [
        f"{tally.weights} weights halved, {tally.scales} scales doubled; {tally.rounded} of {tally.values} values "
        f"({share:.2%}) lost their last bit (2^-9 before the scale), the others are exact",
        f"{plan.out}",
    ]
    if not plan.is_flavored:
        lines.append("Serve it with VLLM_SCALE_ADJUSTMENT=0, or vllm-gaudi halves the weights again while loading.")
    return "\n".join(lines)


def dump_result(plan: ConversionPlan, tally: Tally) -> str:
    """Return the same as JSON."""
    env = {} if plan.is_flavored else {"VLLM_SCALE_ADJUSTMENT": "0"}
    return json.dumps({"model": str(plan.out), "env": env, **asdict(tally)}, indent=2)
