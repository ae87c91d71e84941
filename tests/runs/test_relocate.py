"""`relocate`: the configs of a run that was moved name the place where it is now."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.manifest import read_manifest
from gaudi_calib.runs.relocate import relocate_run
from tests.support.calibrated import MODEL
from tests.support.files import snapshot

pytestmark = pytest.mark.torch


@pytest.fixture
def copy(pristine, tmp_path) -> Path:
    """The run in another place, while the old one is still there."""
    return Path(shutil.copytree(pristine.root, tmp_path / "new" / "model"))


def read_place(path: Path) -> str:
    return json.loads(path.read_text())["dump_stats_path"]


def test_every_config_names_the_new_place(copy, pristine, capsys):
    """Those of both phases and devices, side configs, and what manifests quote; nothing else changes."""
    side = copy / "edited.json"
    keys = {"scale_method": "unit_scale", "mode": "QUANTIZE", "dump_stats_path": f"{pristine.root}/g2/inc_output"}
    side.write_text(json.dumps({**keys, "blocklist": {"names": ["lm_head"], "types": []}}))
    before = snapshot(copy)
    assert main(["relocate", str(copy)]) == 0
    printed = {Path(line).relative_to(copy).as_posix() for line in capsys.readouterr().out.splitlines()}
    configs = {f"maxabs_{phase}_{device}.json" for phase in ("measure", "quant") for device in ("g2", "g3")}
    assert printed == configs | {"edited.json"} | {f"{device}/calibration_manifest.json" for device in ("g2", "g3")}
    after = snapshot(copy)
    old, new = str(pristine.root), str(copy)
    assert {name: after[name].decode() for name in printed - {"edited.json"}} == {
        name: before[name].decode().replace(f'"{old}/g', f'"{new}/g') for name in printed - {"edited.json"}
    }
    assert {name: after[name] for name in after.keys() - printed} == {
        name: before[name] for name in before.keys() - printed
    }
    assert list(json.loads(side.read_text())) == [*keys, "blocklist"] and read_place(side) == f"{copy}/g2/inc_output"
    assert (
        read_manifest(copy / "g3" / "calibration_manifest.json").config["quantize"]["dump_stats_path"].startswith(new)
    )
    assert CalibrationDir(copy / "g3").find_stale() == []
    assert relocate_run(copy) == [] and snapshot(copy) == after
    assert main(["relocate", str(copy / "g3")]) == 0 and capsys.readouterr().out == ""


def test_the_last_good_manifest_is_relocated_too(copy):
    """What a failed run left behind quotes the configs of the files in place."""
    path = copy / "g3" / "calibration_manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "status": "failed", "last_good": good}))
    relocate_run(copy)
    assert read_manifest(path).good.config["measure"]["dump_stats_path"] == f"{copy}/g3/inc_output"


def test_the_same_place_by_another_name_stays(pristine, tmp_path):
    """A symlink to the run, or on the way to it, is no move."""
    (tmp_path / "link").symlink_to(pristine.root)
    assert relocate_run(tmp_path / "link") == []


def test_what_is_no_run_is_refused(tmp_path, copy):
    """Neither an empty directory, nor a directory of JSON that is no config, however hostile."""
    (tmp_path / "a.json").write_text("[" * 100_000)
    (tmp_path / "b.json").write_bytes(b"\xff")
    (tmp_path / "c.json").write_text('{"dump_stats_path": 7}')
    (tmp_path / "d.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "e.json")
    for directory in (tmp_path, copy.parent):
        with pytest.raises(FileError, match="no run in the directory"):
            relocate_run(directory)


def test_a_config_whose_directory_did_not_travel_is_told(copy, caplog):
    """It is left alone: nothing beside it could be meant."""
    shutil.rmtree(copy / "g2")
    config = copy / "maxabs_quant_g2.json"
    config.write_text(config.read_text().replace("/g2/", "/gone/"))
    before = config.read_bytes()
    relocate_run(copy)
    assert config.read_bytes() == before
    assert re.search("maxabs_quant_g2.json names .*/gone, which is not there", caplog.text)


def test_a_run_that_cannot_be_written_is_refused(copy):
    """With what to do instead; here a name leaves no room for that of a temporary file."""
    shutil.copy(copy / "maxabs_quant_g3.json", copy / f"{'a' * 245}.json")
    before = snapshot(copy)
    with pytest.raises(FileError, match="cannot write") as caught:
        relocate_run(copy)
    assert "serve" in caught.value.fix and snapshot(copy) == before


@pytest.mark.parametrize(
    "words",
    [
        ["unify", "{run}/g3", "-r", "1"],
        ["expand", "{run}/g3", "-w", "2"],
        ["postprocess", "{run}/g3"],
        ["reshard", "{run}", "-t", "4"],
        ["merge", "{run}", "{old}", "-o", "{run}/../merged"],
        ["quantize", "-m", str(MODEL), "-o", "{run}/.."],
    ],
    ids=lambda words: words[0],
)
def test_every_command_over_a_moved_run_notices(words, copy, pristine, capsys):
    """And names the command that mends it, which does."""
    words = [word.format(run=copy, old=pristine.root) for word in words]
    assert main(words) == 0
    (fix,) = re.findall(r"has moved: .* name another place; run `gaudi-calib (.*)`", capsys.readouterr().err)
    assert main(shlex.split(fix)) == 0
    assert main(words) == 0
    assert "has moved" not in capsys.readouterr().err
