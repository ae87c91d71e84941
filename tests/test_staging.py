"""Files of a run come into their directory together, or not at all, whoever else is there and whenever it is killed."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.staging import claim_directory, set_aside, stage_files
from tests.support.files import snapshot
from tests.support.paths import ROOT

BEFORE = {"a": b"old", "g3/b": b"old", "g3/stale": b"old", "g3/replaced/stale": b"older"}
AFTER = {"a": b"new", "g3/b": b"new", "g3/c": b"new", "g3/replaced/stale": b"old"}

# Puts AFTER in the place of BEFORE; before one of its renames it kills itself, waits, or does neither.
WRITER = """
import os, signal, sys
from pathlib import Path
from gaudi_calib.staging import set_aside, stage_files
directory, stop_before = Path(sys.argv[1]), int(sys.argv[2])
renamed, rename = 0, os.rename
def count(*paths):
    global renamed
    if renamed == stop_before:
        os.kill(os.getpid(), signal.SIGKILL)
    renamed += 1
    rename(*paths)
with stage_files(directory) as staging:
    for name in ("a", "g3/b", "g3/c"):
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(b"new")
    set_aside(staging, [directory / "g3/stale"])
    if stop_before < 0:
        print("waiting", flush=True)
        sys.stdin.read()
    os.rename = count
print("done", renamed)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run directory that holds BEFORE."""
    for name, content in BEFORE.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run"


def write(directory: Path, stop_before: int, **options: object) -> subprocess.CompletedProcess[str]:
    """Run WRITER to its end."""
    words = [sys.executable, "-c", WRITER, str(directory), str(stop_before)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def live(directory: Path):
    """A process that has staged its files and goes on when its standard input is closed."""
    words = [sys.executable, "-c", WRITER, str(directory), "-1"]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"waiting\n"
        yield child
        child.kill()


def test_files_are_put_in_place(directory: Path) -> None:
    """What is staged replaces what is there, what is set aside is found in `replaced`, and nothing else is left."""
    done = write(directory, 99)
    assert done.returncode == 0, done.stderr
    assert snapshot(directory) == AFTER


@pytest.mark.parametrize("reads", [False, True], ids=["next writer", "next reader"])
@pytest.mark.parametrize("renames", range(7))
def test_killed_between_two_renames_the_old_files_come_back(renames: int, reads: bool, directory: Path) -> None:
    """Whichever rename a process is killed before, the next that writes or reads the directory finds the old files."""
    assert write(directory, renames).returncode == -signal.SIGKILL
    if reads:
        CalibrationDir(directory / "g3")
        left = snapshot(directory)
        if renames:
            assert left == BEFORE
    with claim_directory(directory):
        pass
    assert snapshot(directory) == BEFORE


def test_the_renames_that_a_kill_is_tried_before_are_all(directory: Path) -> None:
    """The test above has one case for each."""
    assert write(directory, 99).stdout == "done 7\n"


def test_a_directory_where_a_file_goes_changes_nothing(directory: Path) -> None:
    """The files that would have come before it stay, too, and the error says where the directory is."""
    (directory / "z").mkdir()
    with (
        pytest.raises(FileError, match="a directory is where the file z goes") as failure,
        stage_files(directory) as new,
    ):
        for name in ("a", "z"):
            (new / name).write_bytes(b"new")
    assert failure.value.where == str(directory / "z")
    assert snapshot(directory) == BEFORE and (directory / "z").is_dir()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_rename_that_fails_undoes_those_before_it(directory: Path) -> None:
    """Files that cannot come into their directory, here of another file system, take all others back with them."""
    if Path("/dev/shm").stat().st_dev == directory.stat().st_dev:
        pytest.skip("needs a second file system")
    elsewhere = Path(f"/dev/shm/gaudi-calib-test-{os.getpid()}")
    elsewhere.mkdir()
    try:
        (directory / "z").symlink_to(elsewhere)
        with pytest.raises(FileError, match="cannot write run"), stage_files(directory) as staging:
            (staging / "z").mkdir()
            for name in ("a", "g3", "z/there"):
                (staging / name).write_bytes(b"new") if name != "g3" else set_aside(staging, [directory / "g3/stale"])
        assert snapshot(directory) == BEFORE and not any(elsewhere.iterdir())
    finally:
        elsewhere.rmdir()


def test_files_of_a_live_process_stay_whatever_its_number(directory: Path, live: subprocess.Popen[bytes]) -> None:
    """A process of another container has a number that means nobody, or somebody else, here; its lock counts."""
    (staged,) = directory.glob(".staging.partial-*-*-*")
    renamed = staged.with_name(staged.name.replace(str(live.pid), "4194305"))  # no process can have that number
    staged.rename(renamed)
    with pytest.raises(FileError, match="another run is writing") as failure, stage_files(directory):
        pass
    assert f"process {live.pid} on " in str(failure.value)
    assert (renamed / "files/a").read_bytes() == b"new"
    renamed.rename(staged)
    assert live.communicate()[0].startswith(b"done") and snapshot(directory) == AFTER


def test_a_claim_ends_with_its_process(directory: Path, live: subprocess.Popen[bytes]) -> None:
    """What a killed process held is free, and what it had not finished is removed."""
    live.kill()
    live.wait()
    assert any(directory.glob(".staging.*"))
    with claim_directory(directory), claim_directory(directory):
        assert [path.name for path in directory.glob(".staging.*")] == [".staging.partial-lock"]
    assert snapshot(directory) == BEFORE


def test_another_name_of_a_directory_is_the_same_claim(directory: Path, live: subprocess.Popen[bytes]) -> None:
    """A link to the directory of a run leads to the run that is there."""
    link = directory.with_name("link")
    link.symlink_to(directory)
    with pytest.raises(FileError, match="another run is writing"), claim_directory(link):
        pass


def test_without_locks_nothing_is_taken_for_abandoned(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that has none, staged files stay, and half a run in place is an error instead of a guess."""
    assert write(directory, 3).returncode == -signal.SIGKILL
    left = snapshot(directory)

    def refuse(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        with pytest.raises(FileError, match="half in place"), claim_directory(directory):
            pass
        assert snapshot(directory, skipped=[".staging.partial-lock"]) == {
            name: content for name, content in left.items() if name != ".staging.partial-lock"
        }
    CalibrationDir(directory / "g3")
    assert snapshot(directory) == BEFORE


@pytest.mark.parametrize(
    "journal",
    ['[["../../victim", "g3/b"]]', '[["g3/b", "/tmp/victim"]]', '[["link/victim", "g3/b"]]', "[1]", '[["a"]]', "{}x"],
)
def test_a_foreign_journal_moves_nothing_out_of_its_directory(journal: str, directory: Path) -> None:
    """A directory somebody else packed may hold any journal; reading it must not rename files elsewhere."""
    (directory / "link").symlink_to(directory.parent)
    (directory / ".staging.partial-1-2-3").mkdir()
    (directory / ".staging.partial-1-2-3/journal.json").write_text(journal)
    before = snapshot(directory.parent)
    with pytest.raises(FileError, match="journal"):
        CalibrationDir(directory / "g3")
    assert snapshot(directory.parent) == before


def test_what_a_killed_process_of_the_same_number_left_is_removed(tmp_path: Path) -> None:
    """In a container process numbers come back; their abandoned files must neither stay nor be in the way."""
    abandoned = tmp_path / f".staging.partial-{os.getpid()}-0000-0"
    abandoned.mkdir()
    (abandoned / "half").write_text("x")
    (tmp_path / f".notes.json.partial-{os.getpid()}-0000-1").write_text("x")
    (tmp_path / ".notes.json.partial-4194305-0000-1").write_text("x")
    with stage_files(tmp_path) as staging:
        (staging / "whole").write_text("y")
        with stage_files(tmp_path) as inner:
            assert staging.is_dir() and inner != staging
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
