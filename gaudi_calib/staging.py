"""How the files of a run come into their directory: all together, or none.

    OUT/<model>/
      .staging.partial-lock                        held (flock) by the process that writes here
      .staging.partial-<process>-<random>-<number>/
        files/                                     what the run makes; renamed into OUT/<model>/ at its end
        aside.json                                 files that move to replaced/ when that happens
        before/                                    what was there, until the last file is in place
        journal.json                               [[from, to], ...]; there while files are renamed, and no longer

A failure between two renames undoes those before it. So does, after a kill, the next command that
writes to the directory or reads it as a calibration.

Locks hold between containers and, on NFS, between machines. Where a file system has none, nothing is taken
for abandoned: neither a second run nor what a killed one left can be told from one that is still at work.
"""

import contextlib
import os
import platform
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from gaudi_calib.errors import FileError
from gaudi_calib.files import cannot_write, lock_file, name_temporary, read_json, write_json

# Where files go that something new replaces.
REPLACED_NAME = "replaced"
_PREFIX = ".staging."
_LOCK_NAME = f"{_PREFIX}partial-lock"
_FILES, _ASIDE, _BEFORE, _JOURNAL = "files", "aside.json", "before", "journal.json"
# Directories that threads of this process hold.
_claimed: set[tuple[int, str]] = set()


@contextlib.contextmanager
def claim_directory(directory: Path) -> Iterator[None]:
    """Be the only one that writes to `directory`, which is made if need be; first tidy up after killed processes.

    Within the block the same thread may claim it again.

    Raises:
        FileError: another process writes there, or nobody can.
    """
    key = (threading.get_ident(), os.path.realpath(directory))
    if key in _claimed:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file, is_locked = _open_lock(directory)
    except OSError as error:
        raise cannot_write(directory, error) from error
    with file:
        _claimed.add(key)
        try:
            _tidy(directory, is_locked=is_locked)
            yield
        finally:
            _claimed.remove(key)
            with contextlib.suppress(OSError):
                directory.joinpath(_LOCK_NAME).unlink()


def _open_lock(directory: Path) -> tuple[IO[bytes], bool]:
    """Return the open lock file, and whether it is locked: not so where the file system has no locks."""
    while True:
        descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = open(descriptor, "r+b")  # noqa: SIM115, closed by who claims
        is_locked = lock_file(file)
        if is_locked is False:
            with file:
                holder = file.read(200).decode(errors="replace")
            raise FileError(
                "another run is writing to this directory",
                where=directory,
                why=f"{holder or 'it'} holds {_LOCK_NAME}",
                fix="wait until it has ended, or choose another -o",
            )
        if os.fstat(file.fileno()).st_nlink == 0:  # its holder ended between our opening and our locking it
            file.close()
            continue
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
        return file, bool(is_locked)


@contextlib.contextmanager
def scratch_directory(directory: Path) -> Iterator[Path]:
    """Claim `directory` and yield an empty hidden directory in it, which is removed at the end.

    Raises:
        FileError: the disk is full, `directory` cannot be written, or another process writes there.
    """
    with claim_directory(directory):
        scratch = directory / f"{_PREFIX}{name_temporary()}"
        try:
            scratch.mkdir()
        except OSError as error:
            raise cannot_write(directory, error) from error
        try:
            yield scratch
        finally:
            _discard(scratch)


@contextlib.contextmanager
def stage_files(directory: Path) -> Iterator[Path]:
    """Yield an empty directory; when the block succeeds, rename its files into `directory`, all or none.

    Nested directories are kept. When the block or a rename fails, every file in `directory` is as it was.

    Raises:
        FileError: the disk is full, `directory` cannot be written, another process writes there, or a
            directory is where a file goes.
    """
    with scratch_directory(directory) as scratch:
        staging = scratch / _FILES
        try:
            staging.mkdir()
        except OSError as error:
            raise cannot_write(directory, error) from error
        yield staging
        try:
            _put_in_place(scratch)
        except OSError as error:
            raise cannot_write(directory, error) from error


def set_aside(staging: Path, paths: Iterable[Path]) -> None:
    """Note files that move into a directory `replaced` beside each when what is in `staging` is put in place.

    Args:
        staging: what `stage_files` yielded.
        paths: files in the directory it is for; what `replaced` has of the same name is overwritten.
    """
    noted = staging.parent / _ASIDE
    before = read_json(noted) if noted.is_file() else []
    write_json(noted, [*before, *(str(path.relative_to(staging.parent.parent)) for path in paths)])


def _put_in_place(scratch: Path) -> None:
    directory, before = scratch.parent, scratch / _BEFORE
    before.mkdir()
    moves: list[tuple[Path, Path]] = []
    for source, target in _list_moves(scratch):
        if target.is_dir():
            raise FileError(
                f"a directory is where the file {target.name} goes",
                where=target,
                why="nothing that was there before has changed",
                fix="move the directory away, or choose another -o",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            moves.append((target, before / str(len(moves))))
        moves.append((source, target))
    journal = scratch / _JOURNAL
    write_json(journal, [[str(path.relative_to(directory)) for path in move] for move in moves], indent=None)
    try:
        for source, target in moves:
            os.rename(source, target)
        journal.unlink()
    except BaseException:
        _move_back(moves, journal)
        raise


def _list_moves(scratch: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where each file is, and where it goes."""
    noted, staging = scratch / _ASIDE, scratch / _FILES
    for path in (scratch.parent / name for name in (read_json(noted) if noted.is_file() else [])):
        yield path, path.parent / REPLACED_NAME / path.name
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        yield path, scratch.parent / path.relative_to(staging)


def undo_unfinished(directory: Path) -> None:
    """Undo the renames of a process that was killed while it put its files into `directory`.

    Raises:
        FileError: that cannot be done, because nobody may write there, or another process does.
    """
    if any(directory.glob(f"{_PREFIX}*/{_JOURNAL}")):
        with claim_directory(directory):
            pass


def _tidy(directory: Path, *, is_locked: bool) -> None:
    """Remove what processes that were killed had not finished."""
    if is_locked:
        for path in directory.glob(f"{_PREFIX}partial-*-*-*"):
            _discard(path)
        for path in directory.glob(".*.partial-*-*-*"):
            with contextlib.suppress(OSError), path.open("ab") as file:
                if lock_file(file):
                    path.unlink()
        return
    unfinished = next(directory.glob(f"{_PREFIX}*/{_JOURNAL}"), None)
    if unfinished is not None:
        raise FileError(
            "the files of a run are half in place",
            where=unfinished,
            why="the file system has no locks: that run may be at work, or may have been killed",
            fix="run this again when it has ended; if it was killed, calibrate again into another -o",
        )


def _discard(scratch: Path) -> None:
    """Undo what is unfinished of the renames, then remove the directory.

    Raises:
        FileError: a file cannot be moved back; all that is needed for it stays.
    """
    journal = scratch / _JOURNAL
    if journal.is_file():
        _move_back(_parse_journal(scratch.parent, read_json(journal)), journal)
    _remove_tree(scratch)


def _move_back(moves: list[tuple[Path, Path]], journal: Path) -> None:
    try:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.rename(target, source)
        journal.unlink()  # before anything is removed: what is not there would count as moved
    except OSError as error:
        raise FileError(
            "the files of a run are half in place, and those before it cannot be moved back",
            where=journal,
            why=error.strerror or str(error),
            fix="make the directory writable; the next command that uses it moves them back",
        ) from error


def _parse_journal(directory: Path, content: Any) -> list[tuple[Path, Path]]:
    """Return the moves of a journal in `directory`, none of which leads out of it."""
    inside = directory.resolve()
    with contextlib.suppress(TypeError, ValueError):
        moves = [(directory / source, directory / target) for source, target in content]
        if all(path.parent.resolve().is_relative_to(inside) for move in moves for path in move):
            return moves
    raise FileError(
        "the files of a run are half in place, and its journal is not followed",
        where=directory,
        why=f"{_JOURNAL} in {_PREFIX}* names files outside of the directory (by a link or ..), or is malformed",
        fix=f"delete {_PREFIX}* and calibrate again; if others made the directory, get it from who you trust",
    )


def _remove_tree(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
