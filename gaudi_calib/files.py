"""The only writer. Files appear complete or not at all.

A run's files are prepared in a hidden directory beside their destination and
renamed in together, so that a failed or killed run leaves the last good ones.
"""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gaudi_calib.errors import FileError

# Where files go that something new replaces.
REPLACED_NAME = "replaced"
# Tell temporary files apart: of processes (a number may come back after a kill), and of one process.
_TOKEN = os.urandom(4).hex()
_numbers = itertools.count()
# A compressed file may unpack to so many bytes, or to so many times its size where that is more.
_LEAST_UNPACKED_BYTES, _MOST_COMPRESSION = 1 << 28, 50


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically (temporary file, fsync, rename).

    Raises:
        FileError: the disk is full or the directory cannot be written; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{_name_temporary()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the JSON value in `path`.

    Args:
        object_hook: what to take in the place of each object, as for `json.loads`.

    Raises:
        FileError: the file is missing, unreadable or not JSON; names line and column.
    """
    try:
        return json.loads(path.read_text(), object_hook=object_hook)
    except OSError as error:
        raise FileError(
            f"cannot read {path.name}",
            where=path,
            why=error.strerror or str(error),
            fix="check that the path exists and that you may read it",
        ) from error
    except ValueError as error:
        raise FileError(
            f"{path.name} is not valid JSON", where=path, why=str(error), fix="restore the file or make it again"
        ) from error


@contextlib.contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty hidden directory in `directory`; it is removed at the end, or after a kill by the next call.

    Raises:
        FileError: the disk is full or `directory` cannot be written.
    """
    scratch = directory / f".staging.{_name_temporary()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        scratch.mkdir()
    except OSError as error:
        raise _cannot_write(directory, error) from error
    try:
        yield scratch
    finally:
        _remove_tree(scratch)


@contextlib.contextmanager
def stage_files(directory: Path) -> Iterator[Path]:
    """Yield an empty directory; when the block succeeds, rename its files into `directory`.

    Nested directories are kept. When the block fails, nothing in `directory` changes.

    Raises:
        FileError: the disk is full or `directory` cannot be written.
    """
    with scratch_directory(directory) as staging:
        yield staging
        try:
            for source in sorted(path for path in staging.rglob("*") if path.is_file()):
                target = directory / source.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
        except OSError as error:
            raise _cannot_write(directory, error) from error


def _name_temporary() -> str:
    return f"partial-{os.getpid()}-{_TOKEN}-{next(_numbers)}"


def is_temporary(name: str) -> bool:
    """Whether a file or directory of that name is one that is not finished.

    >>> is_temporary(".staging.partial-7-0a1b2c3d-0")
    True
    """
    return name.startswith(".") and ".partial-" in name


def _remove_abandoned(directory: Path) -> None:
    """Delete what processes that were killed had not finished."""
    for path in directory.glob(".*.partial-*-*-*"):
        process, token = path.name.rpartition(".partial-")[2].split("-")[:2]
        if process == str(os.getpid()) and token != _TOKEN:
            _remove_tree(path)
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            _remove_tree(path)
        except (PermissionError, ValueError):
            continue  # alive, and somebody else's


def _remove_tree(path: Path) -> None:
    with contextlib.suppress(OSError):  # empty after success: no need to load shutil
        path.rmdir() if path.is_dir() else path.unlink()
        return
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def set_aside(paths: Iterable[Path]) -> None:
    """Move files into a directory `replaced` beside each, over what is there of the same name.

    Raises:
        FileError: a directory cannot be written.
    """
    for path in paths:
        try:
            path.parent.joinpath(REPLACED_NAME).mkdir(exist_ok=True)
            path.replace(path.parent / REPLACED_NAME / path.name)
        except OSError as error:
            raise _cannot_write(path, error) from error


def hash_file(path: Path) -> str:
    """Return `sha256:<hex digest>` of the file's content."""
    import hashlib

    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def unpack(compressed: IO[bytes], path: Path) -> io.BytesIO:
    """Return what `compressed` unpacks to.

    Args:
        compressed: a part of `path`, or all of it, opened for unpacking.

    Raises:
        FileError: it unpacks to far more than data of the size of `path` do.
    """
    most_bytes = max(_LEAST_UNPACKED_BYTES, _MOST_COMPRESSION * path.stat().st_size)
    unpacked = io.BytesIO()
    while chunk := compressed.read(1 << 20):
        unpacked.write(chunk)
        if unpacked.tell() > most_bytes:
            raise FileError(
                f"{path.name} unpacks to more than {most_bytes} bytes",
                where=path,
                why=f"that is far more than data compressed to {path.stat().st_size} bytes hold",
                fix="get it again from a source you trust; if it is right, store it without compression",
            )
    unpacked.seek(0)
    return unpacked


def _cannot_write(path: Path, error: OSError) -> FileError:
    return FileError(
        f"cannot write {path.name}",
        where=path,
        why=error.strerror or str(error),
        fix="free disk space or choose another -o; nothing that was there before has changed",
    )
