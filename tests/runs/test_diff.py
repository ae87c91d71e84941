"""`diff`: what changed between two calibrations, on files of real Gaudis and on a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.files import write_json
from gaudi_calib.layout import MANIFEST_NAME
from tests.support import paths

REAL = paths.GOLDEN / "real"
LLAMA = REAL / "llama-3.1-70b"
FIRST = "inc_output_hooks_maxabs_0_8.json"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A copy of the excerpt of a real Llama, in a directory that tells the device."""
    return Path(shutil.copytree(LLAMA, tmp_path / "g3"))


def diff(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, Any]:
    """Run `diff --json` and return its exit code and what it prints for the only device."""
    code = main(["diff", *map(str, words), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out)[0] if out else None


def change_range(path: Path, factor: float, suffix: str = "o_proj") -> str:
    """Multiply the input range of the first node called so, and return its name."""
    content = json.loads(path.read_text())
    name = next(name for name in content["Nodes"] if name.endswith(suffix))
    content["Nodes"][name]["inputs"][0][0][0] *= factor
    write_json(path, content)
    return name


def without_scales(directory: Path) -> Path:
    for path in directory.glob("*_MAXABS_*"):
        path.unlink()
    return directory


def test_a_calibration_does_not_differ_from_itself(capsys: pytest.CaptureFixture):
    """Exit code 0, at the largest world there is."""
    code, found = diff(capsys, LLAMA, LLAMA, "--device", "g3", "--fail-on", "ranges")
    assert (code, found["world"]) == (0, 8)
    assert sum(change["differing"] for change in found["ranges"] + found["scales"]) == 0
    assert found["methods"] == ["maxabs_hw, stored", "maxabs_hw, stored"]


def test_scales_that_are_npz_alone_are_stored(capsys: pytest.CaptureFixture):
    """INC reads nothing else, so a directory may hold nothing else."""
    place = REAL / "mixtral-8x7b"
    assert diff(capsys, place, place, "--device", "g3")[1]["methods"] == ["maxabs_hw, stored"] * 2


def test_one_of_several_measurements_is_asked_for(capsys: pytest.CaptureFixture):
    """The option that the error names is taken."""
    place = str(REAL / "llama-4-maverick-ep8")
    assert main(["diff", str(REAL / "llama-4-maverick"), place]) == 1
    assert "--dump inc_measure_output" in capsys.readouterr().err
    assert main(["diff", str(REAL / "llama-4-maverick"), place, "--dump", "inc_measure_output"]) == 1
    assert "no ranges of rank 2 of 8" in capsys.readouterr().err
    assert diff(capsys, place, place, "-u", "--dump", "inc_measure_output")[0] == 0


def test_worlds_are_brought_to_the_coarser_one(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Eight ranks against one: the eight are unified, the medians are those of two runs of one model."""
    for world in (1, 8):
        (tmp_path / f"w{world}").mkdir()
        for path in LLAMA.glob(f"*_{world}.json"):
            shutil.copy(path, tmp_path / f"w{world}")
    code, found = diff(capsys, tmp_path / "w8", tmp_path / "w1", "--device", "g3", "--fail-on", "ranges")
    assert (code, found["worlds"], found["world"]) == (1, [8, 1], 1)
    assert found["methods"] == ["maxabs_hw, computed", "maxabs_hw, stored"]
    weights = [change for change in found["ranges"] if change["part"] == "weight"]
    assert weights and all(change["differing"] == 0 for change in weights)
    assert all(0.5 < change["median"] < 2 for change in found["ranges"])


def test_a_changed_range_is_found_and_its_scale_computed_anew(other: Path, capsys: pytest.CaptureFixture):
    """Twice the range is twice the scale; what is served differs, so the exit code is 1."""
    without_scales(other)
    change_range(other / FIRST, 2.0)
    code, found = diff(capsys, LLAMA, other, "-t", 8, "--device", "g3")
    (ranges,) = [change for change in found["ranges"] if change["differing"]]
    scales = [change for change in found["scales"] if change["differing"]]
    assert code == 1
    assert (ranges["kind"], ranges["part"], ranges["most"]) == ("o_proj", "inputs[0]", 2.0)
    assert [(change["kind"], change["part"], change["most"]) for change in scales] == [
        ("o_proj", "inputs[0]", 2.0), ("o_proj", "outputs[0]", 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "code"), [("ranges", 1), ("scales", 0), ("clipped", 0), ("nothing", 0)])
def test_what_fails_is_asked_for(other: Path, capsys: pytest.CaptureFixture, kind: str, code: int):
    """A range that moved within one scale changes nothing that is served."""
    without_scales(other)
    change_range(other / FIRST, 1.01)
    assert diff(capsys, LLAMA, other, "-t", 8, "--device", "g3", "--fail-on", kind)[0] == code


def test_what_the_old_scales_would_clip_is_named(other: Path, capsys: pytest.CaptureFixture):
    """A hundred times the range is beyond the room that a backoff of 0.25 leaves."""
    name = change_range(other / FIRST, 100.0)
    code, found = diff(capsys, LLAMA, other, "-t", 8, "--device", "g3", "--fail-on", "clipped")
    assert code == 1
    assert [(clip["name"], clip["part"]) for clip in found["clipped"]] == [(name, "inputs[0]")]
    assert found["clipped"][0]["range"] > found["clipped"][0]["limit"]
    assert diff(capsys, other, LLAMA, "-t", 8, "--device", "g3", "--fail-on", "clipped")[0] == 0


def test_a_node_of_one_side_is_a_difference(other: Path, capsys: pytest.CaptureFixture):
    """It is served otherwise, or not at all."""
    path = other / FIRST.replace("_8", "_1")
    content = json.loads(path.read_text())
    name = next(iter(content["Nodes"]))
    del content["Nodes"][name]
    write_json(path, content)
    code, found = diff(capsys, LLAMA, without_scales(other), "-t", 1, "--device", "g3")
    assert (code, found["nodes"]) == (1, {"left": [name], "right": []})


def test_without_a_device_ranges_are_compared(capsys: pytest.CaptureFixture):
    """Nothing tells which FP8 the scales are for."""
    code, found = diff(capsys, LLAMA, LLAMA)
    assert (code, found["scales"]) == (0, None)
    assert "--device" in found["uncompared"]


def test_two_models_are_no_two_calibrations(capsys: pytest.CaptureFixture):
    """They have no node in common, in one of these pairs; the error names both."""
    code = main(["diff", str(LLAMA), str(REAL / "llama-4-maverick-ep8"), "-u"])
    assert code == 1
    assert "no node in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ((LLAMA, LLAMA, "-t", 3), 1, "cannot be compared at 3 ranks"),
        ((LLAMA, REAL), 1, "no ranges in the directory"),
        ((LLAMA, LLAMA / FIRST), 1, "Error"),
        ((LLAMA,), 2, "B"),
        ((LLAMA, REAL / "nowhere"), 2, "does not exist"),
    ],
    ids=["world", "no ranges", "no config", "one side", "missing"],
)
def test_bad_input_is_told(words: tuple, code: int, what: str, capsys: pytest.CaptureFixture):
    """What, where and a fix; nothing on stdout."""
    assert main(["diff", *map(str, words)]) == code
    printed = capsys.readouterr()
    assert what in printed.err and "unexpected" not in printed.err and not printed.out


def test_the_table_shows_what_differs(other: Path, capsys: pytest.CaptureFixture):
    """Counts, kinds with differences, and the two sides."""
    change_range(other / FIRST, 100.0)
    assert main(["diff", str(LLAMA), str(other), "-t", "8", "--device", "g3"]) == 0
    out = capsys.readouterr().out
    assert f"A  {LLAMA}" in out and "o_proj" in out and "qkv_proj " not in out
    assert "Ranges of B that A's scales clip: 1" in out
    assert "Scales, B / A (maxabs_hw, stored against maxabs_hw, stored): 0 of" in out


@pytest.mark.torch
def test_runs_and_configs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Every device of a run; a config stands for its directory; settings and data are told apart."""
    from tests.support.calibrated import MODEL, calibrate_by_torch

    (tmp_path / "out").mkdir()
    calibrated = calibrate_by_torch(MODEL, tmp_path / "out")
    again = Path(shutil.copytree(calibrated.root, tmp_path / "again"))
    manifest = json.loads((again / "g3" / MANIFEST_NAME).read_text())
    manifest["dataset"]["prompts"] = 99
    write_json(again / "g3" / MANIFEST_NAME, manifest)
    config = json.loads((again / "maxabs_quant_g3.json").read_text())
    config["blocklist"]["names"] = ["lm_head"]
    write_json(again / "maxabs_quant_g3.json", config)

    assert main(["diff", str(calibrated.root), str(again), "--json"]) == 1
    both = json.loads(capsys.readouterr().out)
    assert [Path(found["left"]).name for found in both] == ["g2", "g3"]
    code, found = diff(capsys, calibrated.config("g3"), again / "maxabs_quant_g3.json")
    assert code == 1
    assert [setting["name"] for setting in found["settings"]] == ["blocklist"]
    assert [setting["name"] for setting in found["origin"]] == ["dataset.prompts"]
    assert diff(capsys, calibrated.root / "g2", again, "--device", "g2")[0] == 0
