"""A run that was copied or mounted elsewhere is served from where it is."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

import gaudi_calib
from gaudi_calib.cli.main import main
from gaudi_calib.errors import FileError
from tests.support.calibrated import MODEL, Calibrated

pytestmark = pytest.mark.torch


@pytest.fixture
def moved(pristine, tmp_path) -> Calibrated:
    """A copy, while the old run is still there."""
    return Calibrated(Path(shutil.copytree(pristine.root, tmp_path / "new" / "model")), MODEL)


def read_served(command) -> dict:
    return json.loads(Path(command.env["QUANT_CONFIG"]).read_text())


def test_the_run_beside_the_config_is_served(moved, pristine):
    """Through a copy of the config that differs in nothing else; there is one, however often it is served."""
    command = moved.plan(world=2)
    content = json.loads(moved.config("g3").read_text())
    assert read_served(command) == {**content, "dump_stats_path": f"{moved.root}/g3/inc_output"}
    assert list(read_served(command)) == list(content)
    assert str(pristine.root) in command.note and f"gaudi-calib relocate {moved.root}" in command.note
    files = sorted(moved.root.iterdir())
    assert moved.plan().env["QUANT_CONFIG"] == command.env["QUANT_CONFIG"]
    assert sorted(moved.root.iterdir()) == files
    assert json.loads(moved.config("g3").read_text()) == content


def test_files_that_are_missing_there_are_missed(moved):
    """Those of the old place are not taken for them."""
    for path in (moved.root / "g3").glob("*_1_2.*"):
        path.unlink()
    with pytest.raises(FileError, match="ranges of a rank are missing"):
        moved.plan(world=2)


def test_a_copy_that_was_damaged_is_written_again(moved):
    """A half-written or foreign file in its place is not trusted."""
    path = Path(moved.plan().env["QUANT_CONFIG"])
    path.write_text("{")
    assert read_served(moved.plan())["dump_stats_path"] == f"{moved.root}/g3/inc_output"


def test_after_relocate_the_config_itself_is_served(moved):
    """And the note says no more."""
    assert main(["relocate", str(moved.root)]) == 0
    command = moved.plan()
    assert command.env["QUANT_CONFIG"] == str(moved.config("g3")) and "gaudi-calib" not in command.note


def test_a_config_elsewhere_means_the_path_it_names(pristine, tmp_path):
    """A config that lies beside no run, a symlink to the run, and a symlink to its config."""
    config = tmp_path / "x.json"
    shutil.copy(pristine.config("g3"), config)
    assert pristine.plan(quant_config=config).env["QUANT_CONFIG"] == str(config)
    (tmp_path / "link").symlink_to(pristine.root)
    (tmp_path / "current.json").symlink_to(pristine.config("g3"))
    for path in (tmp_path / "link" / "maxabs_quant_g3.json", tmp_path / "current.json"):
        assert pristine.plan(quant_config=path).env["QUANT_CONFIG"] == str(pristine.config("g3"))


def test_a_directory_of_symlinks_is_a_run(pristine, tmp_path):
    """As a cache of the hub, or a mounted volume, has it: the place of the links counts."""
    shutil.copytree(pristine.root, tmp_path / "blobs")
    for path in (tmp_path / "blobs").rglob("*"):
        link = tmp_path / "snapshot" / path.relative_to(tmp_path / "blobs")
        link.mkdir(parents=True) if path.is_dir() else (link.parent.mkdir(exist_ok=True), link.symlink_to(path))
    snapshot = Calibrated(tmp_path / "snapshot", MODEL)
    assert read_served(snapshot.plan())["dump_stats_path"] == f"{snapshot.root}/g3/inc_output"


def test_a_config_among_the_rank_files(moved):
    """A side config may lie in the directory that it means."""
    side = moved.root / "g3" / "mine.json"
    shutil.copy(moved.config("g3"), side)
    assert read_served(moved.plan(quant_config=side))["dump_stats_path"] == f"{moved.root}/g3/inc_output"


def test_a_relative_path_counts_from_where_one_stands(moved, monkeypatch):
    """From the right directory it leads there; from another one the run beside the config is meant."""
    content = json.loads(moved.config("g3").read_text())
    moved.config("g3").write_text(json.dumps({**content, "dump_stats_path": "g3/inc_output"}))
    monkeypatch.chdir(moved.root)
    assert moved.plan().env["QUANT_CONFIG"] == str(moved.config("g3"))
    monkeypatch.chdir("/")
    assert read_served(moved.plan())["dump_stats_path"] == f"{moved.root}/g3/inc_output"


def test_where_nothing_can_be_written_beside_the_config(moved, tmp_path, monkeypatch):
    """The copy goes to the user's cache; where that cannot be written, it is said what would help."""
    copy = Path(moved.plan().env["QUANT_CONFIG"])
    copy.unlink()
    copy.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = moved.plan()
    assert Path(command.env["QUANT_CONFIG"]).parent == tmp_path / "cache" / "gaudi-calib"
    assert read_served(command)["dump_stats_path"] == f"{moved.root}/g3/inc_output"
    assert moved.plan() == command
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FileError, match="no copy of its config can be written") as caught:
        moved.plan()
    assert "XDG_CACHE_HOME" in caught.value.fix and f"gaudi-calib relocate {moved.root}" in caught.value.fix


def test_what_serve_prints_is_run_as_printed(moved, capsys):
    """Also for a run that has moved: the config that is named is there."""
    config = str(moved.config("g2"))
    assert main(["serve", "-m", str(MODEL), "--quant-config", config, "--print", "--device", "g2"]) == 0
    named = shlex.split(capsys.readouterr().out)[0].removeprefix("QUANT_CONFIG=")
    assert json.loads(Path(named).read_text())["dump_stats_path"] == f"{moved.root}/g2/inc_output"


def test_open_llm_takes_it_too(moved):
    """The files that are missed are those beside the config; no engine starts."""
    with (
        pytest.raises(FileError, match="no files for 4 ranks") as caught,
        gaudi_calib.open_llm(MODEL, quant_config=moved.config("g3"), tensor_parallel_size=4),
    ):
        pass
    assert caught.value.where == str(moved.root / "g3" / "inc_output_hooks_maxabs_0_4.npz")
