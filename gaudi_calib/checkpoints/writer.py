"""Writing the conversion of a checkpoint: planned, streamed, compared, put in place, continued after a kill.

A `Converter` says what becomes of each tensor; here are the files. The result has the
source's weight files, one for one: a header, then the tensors one after the other, made
a megabyte at a time. Files are written beside their place, read again and compared with the
source tensor by tensor, and renamed; a record in the output says which are done, so that a
second call goes on where the first was stopped. All other files travel along. The source is
only read.
"""

import contextlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from safetensors import safe_open

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.files import expand_path, is_temporary, read_json, show_size, write_json
from gaudi_calib.models.headers import Header, Span, read_header
from gaudi_calib.staging import stage_files

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
# Of the downloading tools, not of the model.
_NOT_OF_THE_MODEL = {".git", ".cache"}


class Converter(Protocol):
    """What a conversion makes of a checkpoint.

    Attributes:
        record_name: name of the file in the result that says what is done.
    """

    record_name: ClassVar[str]

    def plan_header(self, header: Header) -> Header:
        """Return the header of the converted weight file: tensors may change type and size, and new ones appear."""
        ...

    def convert(self, source: Path, span: Span, counts: Counter[str]) -> Iterator[bytes | bytearray]:
        """Yield the bytes of the tensor `span` of the planned header, and add to the `counts` of what was done.

        Args:
            source: the weight file that is converted.

        Raises:
            ModelError: a tensor cannot be converted; nothing of its file is put in place.
        """
        ...

    def is_converted(self, name: str, old: torch.Tensor | None, new: torch.Tensor) -> bool:
        """Whether `new` is what it should be, `old` being the source's tensor of that name, if there is one."""
        ...

    def change_file(self, path: Path) -> Any | None:
        """Return the content that the JSON file `path` (inside the checkpoint) gets, None to copy it as any other."""
        ...


C = TypeVar("C", bound=Converter)
C_co = TypeVar("C_co", bound=Converter, covariant=True)


@dataclass(frozen=True)
class ConversionPlan(Generic[C_co]):
    """A conversion that can be run.

    Attributes:
        source: directory of the checkpoint.
        out: directory of the result.
        converter: what becomes of the tensors.
        shards: header of each converted weight file, by the name that it has in both.
        copies: size in bytes of each other file, by its path inside the directory.
    """

    source: Path
    out: Path
    converter: C_co
    shards: dict[str, Header]
    copies: dict[Path, int]

    @property
    def record(self) -> Path:
        """Path of the file that says what is done."""
        return self.out / self.converter.record_name


def plan_conversion(checkpoint: Checkpoint, out: Path, converter: C) -> ConversionPlan[C]:
    """Decide what happens to every file of `checkpoint`; nothing is written.

    Raises:
        UsageError: `out` is the checkpoint or inside it.
        FileError: `out` holds something else, or the disk is too small.
    """
    source, out = checkpoint.directory.resolve(), expand_path(out).resolve()
    if out == source or source in out.parents:
        raise UsageError(
            "the output is inside the checkpoint",
            where=out,
            why="the source is never changed",
            fix="choose a directory outside of it for -o",
        )
    shards = {name: converter.plan_header(header) for name, header in checkpoint.headers.items()}
    copies = dict(_list_others(source, {*shards, converter.record_name}))
    plan = ConversionPlan(source, out, converter, shards, copies)
    _check_output(plan)
    _check_space(plan)
    return plan


def _list_others(source: Path, known: set[str]) -> Iterator[tuple[Path, int]]:
    """Yield the path inside `source` and the size of every file that is not `known`, links followed."""
    for directory, names, files in os.walk(source, followlinks=True):
        names[:] = sorted(set(names) - _NOT_OF_THE_MODEL)
        for path in (Path(directory, file) for file in sorted(files)):
            if path.relative_to(source).as_posix() not in known:
                yield path.relative_to(source), path.stat().st_size


def _check_output(plan: ConversionPlan[Converter]) -> None:
    if plan.record.is_file():
        if read_json(plan.record).get("source") != str(plan.source):
            raise FileError(
                "the output holds the conversion of another checkpoint",
                where=plan.record,
                why=f"not of {plan.source}",
                fix="choose another -o",
            )
    elif plan.out.exists() and any(not is_temporary(path.name) for path in plan.out.iterdir()):
        raise FileError(
            "the output directory is not empty",
            where=plan.out,
            why=f"and it has no {plan.record.name}, so it is no conversion that could go on",
            fix="choose an empty or a new directory for -o",
        )


def _check_space(plan: ConversionPlan[Converter]) -> None:
    existing = next(path for path in (plan.out, *plan.out.parents) if path.exists())
    present = sum(path.stat().st_size for path in plan.out.rglob("*") if path.is_file())
    needed, free = sum(_count_bytes(plan)) - present, shutil.disk_usage(existing).free
    if needed > free:
        raise FileError(
            "the disk is too small for the converted checkpoint",
            where=plan.out,
            why=f"it needs {show_size(needed)} more, {show_size(free)} are free",
            fix="free space, or choose an -o on another disk",
        )


def _count_bytes(plan: ConversionPlan[Converter]) -> tuple[int, int]:
    """Return the size of the converted weight files and of the others."""
    return sum(header.file_bytes for header in plan.shards.values()), sum(plan.copies.values())


def run_conversion(
    plan: ConversionPlan[Converter], *, on_file: Callable[[str], None] = lambda name: None
) -> Counter[str]:
    """Run `plan` and return the converter's counts, of this call and of those that it continues.

    Args:
        on_file: called with the name of every file that is done.

    Raises:
        ModelError: a tensor cannot be converted.
        FileError: the disk is full, or a written file differs from what it should be.
    """
    record: dict[str, Any] = {"source": str(plan.source), "shards": {}}
    record |= read_json(plan.record) if plan.record.is_file() else {}
    write_json(plan.record, record | {"status": "running"})
    total: Counter[str] = Counter()
    for shard in plan.shards:
        done = record["shards"].get(shard)
        if done is None or done["files"] != _stamp(plan, shard):
            counts = _write_shard(plan, shard)
            done = record["shards"][shard] = {"files": _stamp(plan, shard), **counts}
            write_json(plan.record, record | {"status": "running"})
        total.update({name: count for name, count in done.items() if name != "files"})
        on_file(shard)
    for path in plan.copies:
        _copy_file(plan, path)
        on_file(str(path))
    write_json(plan.record, record | {"status": "ok"})
    return total


def _stamp(plan: ConversionPlan[Converter], shard: str) -> list[list[int]]:
    """Return size and time of change of a shard and of its conversion, or nothing where one is missing."""
    with contextlib.suppress(FileNotFoundError):
        stats = [(directory / shard).stat() for directory in (plan.source, plan.out)]
        return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    return []


def _write_shard(plan: ConversionPlan[Converter], shard: str) -> Counter[str]:
    """Write, compare and put in place one weight file."""
    header, counts = plan.shards[shard], Counter[str]()
    with _explained(plan.out / shard), stage_files(plan.out) as staging:
        written = staging / shard
        written.parent.mkdir(parents=True, exist_ok=True)
        with written.open("wb") as file:
            file.write(header.prefix)
            for span in header.spans:
                file.writelines(plan.converter.convert(plan.source / shard, span, counts))
            file.flush()
            os.fsync(file.fileno())
        compare_shard(plan, shard, written)
    _log.debug("%s: %s", shard, dict(counts))
    return counts


def compare_shard(plan: ConversionPlan[Converter], shard: str, written: Path) -> None:
    """Open a weight file and its conversion `written` anew and compare every tensor.

    Raises:
        FileError: the header is not as planned, or a tensor not as the converter wants it.
    """
    if read_header(written) != plan.shards[shard]:
        raise _differs(written, "the header")
    with safe_open(plan.source / shard, framework="pt") as before, safe_open(written, framework="pt") as after:
        known = set(before.keys())
        for name in after.keys():
            old = before.get_tensor(name) if name in known else None
            if not plan.converter.is_converted(name, old, after.get_tensor(name)):
                raise _differs(written, repr(name))


def _differs(path: Path, what: str) -> FileError:
    return FileError(
        f"{what} of {path.name} is not what was written",
        where=path,
        why="it was read again and compared with the source",
        fix="check the disk, and that nobody changes the checkpoint; then run the same command again",
    )


def _copy_file(plan: ConversionPlan[Converter], path: Path) -> None:
    """Copy a file as it is, unless it is there already, or write what the converter makes of it."""
    source, target = plan.source / path, plan.out / path
    changed = plan.converter.change_file(path)
    if changed is not None:
        write_json(target, changed)
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


def read_chunks(path: Path, span: Span) -> Iterator[bytearray]:
    """Yield the bytes of a tensor, a megabyte at a time."""
    with path.open("rb") as file:
        file.seek(span.start)
        for start in range(span.start, span.stop, CHUNK_BYTES):
            yield bytearray(file.read(min(CHUNK_BYTES, span.stop - start)))


def split_bytes(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the bytes of a tensor, uint8, a megabyte each."""
    return tensor.reshape(-1).view(torch.uint8).split(CHUNK_BYTES)


def describe_plan(plan: ConversionPlan[Converter], *, tensors: str, others: str, is_full: bool) -> str:
    """Return the plan as lines for people.

    Args:
        tensors, others: what is done to the tensors, and to the other files.
        is_full: also every file with its size.
    """
    sizes = [show_size(size) for size in _count_bytes(plan)]
    shards = [f"    {name}  {show_size(header.file_bytes)}" for name, header in plan.shards.items()]
    copies = [f"    {path}  {show_size(size)}" for path, size in plan.copies.items()]
    lines = [
        f"{plan.source} -> {plan.out}",
        f"  {len(shards)} weight files, {sizes[0]}: {tensors}",
        *(shards if is_full else []),
        f"  {len(copies)} other files, {sizes[1]}, {others}",
        *(copies if is_full else []),
    ]
    return "\n".join(lines)
