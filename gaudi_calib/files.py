"""The only writer of single files, which appear complete or not at all; `staging` writes many together."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from gaudi_calib.errors import FileError, UsageError

# Characters of a path that cannot be, in its error.
_SHOWN = 80
# Tell temporary files apart: of processes (a number may come back after a kill), and of one process.
_TOKEN = os.urandom(4).hex()
_numbers = itertools.count()
# A compressed file may unpack to so many bytes, or to so many times its size where that is more.
_LEAST_UNPACKED_BYTES, _MOST_COMPRESSION = 1 << 28, 50


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return the path a user means: with a home in the place of `~` or `~user`, where there is one.

    Raises:
        UsageError: no file can be there.

    >>> expand_path("~/out") == Path.home() / "out", expand_path("~nobody-is-called-so/out").as_posix()
    (True, '~nobody-is-called-so/out')
    """
    text = os.path.expanduser(path)
    why = explain_impossible(text)
    if why is not None:
        shown = ascii(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!a}... ({len(text)} characters)"
        raise UsageError(f"no file can be at {shown}: {why}", fix="give another path")
    return Path(text)


def explain_impossible(path: str) -> str | None:
    """Return why no file can be at `path`, None where there is or could be one.

    >>> explain_impossible("a\\0b"), explain_impossible("a/b")
    ('embedded null byte', None)
    """
    try:
        os.stat(path)
    except ValueError as error:  # NUL, or half a character
        return str(error)
    except OSError as error:
        return error.strerror if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
    return None


def make_directory(path: Path) -> None:
    """Make a directory and those it is in, where they are missing.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except RecursionError as error:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically (temporary file, fsync, rename).

    Raises:
        FileError: the disk is full or the directory cannot be written; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{name_temporary()}")
    try:
        make_directory(path.parent)
        with temporary.open("xb") as file:
            lock_file(file)  # not abandoned, see `staging`
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """Return the JSON value in `text`.

    Args:
        hooks: as for `json.loads`.

    Raises:
        ValueError: it is no JSON, or nested deeper than anybody does.
    """
    try:
        return json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the JSON value in `path`.

    Args:
        object_hook: as for `json.loads`.

    Raises:
        FileError: the file is missing, unreadable or not JSON; names line and column.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), object_hook=object_hook)
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


def name_temporary() -> str:
    """Return the end of a name that no other process and no other call has."""
    return f"partial-{os.getpid()}-{_TOKEN}-{next(_numbers)}"


def is_temporary(name: str) -> bool:
    """Whether a file or directory of that name is one that is not finished.

    >>> is_temporary(".staging.partial-7-0a1b2c3d-0")
    True
    """
    return name.startswith(".") and ".partial-" in name


def lock_file(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed: True. False where another has locked it, None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def hash_file(path: Path) -> str:
    """Return `sha256:<hex digest>` of the file's content."""
    import hashlib

    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def hash_bytes(content: bytes) -> str:
    """Return `sha256:<hex digest>` of `content`."""
    import hashlib

    return "sha256:" + hashlib.sha256(content).hexdigest()


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


def cannot_write(path: Path, error: OSError) -> FileError:
    """Return what to raise where the disk is full or `path` cannot be written."""
    kept = "choose another -o; nothing that was there before has changed"
    what, fix = f"cannot write {path.name}", f"free disk space, or {kept}"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return FileError(what, where=path, why="a file is where a directory goes", fix=f"move it away, or {kept}")
    if isinstance(error, IsADirectoryError):
        return FileError(what, where=path, why="a directory is where a file goes", fix=f"move it away, or {kept}")
    return FileError(what, where=path, why=error.strerror or str(error), fix=fix)


def show_size(size_bytes: int) -> str:
    """Return a size for people.

    >>> show_size(999), show_size(5_230_000_000)
    ('999 B', '5.2 GB')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size_bytes >= 10**power:
            return f"{size_bytes / 10**power:.1f} {unit}"
    return f"{size_bytes} B"
