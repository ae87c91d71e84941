"""A measurement is one thing: files of another are refused or set aside, whatever command finds them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME
from gaudi_calib.manifest import read_manifest
from gaudi_calib.rankfiles.channel_file import read_channel_ranges
from gaudi_calib.rankfiles.store import read_ranges
from gaudi_calib.runs.calibrate import calibrate
from gaudi_calib.runs.options import RunOptions
from tests.support import paths
from tests.support.files import snapshot, write_prompts
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch

MODEL = paths.GOLDEN / "llama-tiny" / "model"
ONE_OF_TWO = "inc_output_hooks_maxabs_1_2"
PROMPTS = {"a": [[1, 5, 9, 11, 20]], "b": [[3, 250, 77, 41, 8, 100, 2]]}


def run(*words: object) -> int:
    """Run a command in this process and return its exit code."""
    return main([*map(str, words)])


def quantize(out: Path, *words: object) -> int:
    """Run `quantize` on the run of `MODEL` in `out`."""
    return run("quantize", "-m", MODEL, "-o", out, *words)


def serve(root: Path, *words: object) -> int:
    """Run `serve --print` with the Gaudi 3 files of a run of `MODEL`."""
    words = ("--print", "--device", "g3", *words)
    return run("serve", "-m", MODEL, "--quant-config", root / "maxabs_quant_g3.json", *words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one model on other data, `a/model` and `b/model`, for two ranks and for one."""
    directory = tmp_path_factory.mktemp("made")
    for name, prompts in PROMPTS.items():
        dataset = {"dataset": str(write_prompts(directory / f"{name}.jsonl", prompts))}
        options = {"world": 2, "unified_world": 1, "devices": ("g3",), "engine": "torch"}
        calibrate(RunOptions(str(MODEL), directory / name, dataset, **options))
    return directory


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of the two runs, where a test may damage them."""
    for name in PROMPTS:
        shutil.copytree(made / name, tmp_path / name)
        for path in (tmp_path / name / "model").glob("maxabs_*.json"):
            path.write_text(path.read_text().replace(str(made), str(tmp_path)))
    return tmp_path


def test_channel_ranges_that_a_merge_left_out_are_not_used(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """New worlds would lack what the other run measured; merging the whole runs, as the fix says, has it."""
    a, b = runs / "a/model", runs / "b/model"
    assert run("merge", a / "g3", b / "g3", "-o", a / "g3") == 0
    for words in (("quantize", "-m", MODEL, "-o", runs / "a", "-t", 4), ("reshard", a, "-t", 4)):
        before = snapshot(a)
        assert run(*words) == 1
        printed = capsys.readouterr().err
        assert "channel_ranges.safetensors is of another measurement" in printed
        assert f"gaudi-calib merge {a} {b} -o {a}" in printed
        assert snapshot(a, skipped=[MANIFEST_NAME]) == {
            name: content for name, content in before.items() if not name.endswith(MANIFEST_NAME)
        }
    assert run("merge", a, b, "-o", a) == 0
    assert quantize(runs / "a", "-t", 4) == 0
    merged, other = (read_channel_ranges(root / CHANNEL_RANGES_NAME) for root in (a, b))
    for name, node in merged.nodes.items():
        assert (node.inputs[0].values >= other.nodes[name].inputs[0].values).all()
    assert read_ranges(a / "g3/inc_output_hooks_maxabs_3_4.json").nodes


def test_another_checkpoint_of_the_same_name_gets_no_place_in_the_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """OUT/model is one model's: a second `model` from elsewhere is refused before anything is measured."""
    other = make_tiny_model("llama", tmp_path / "elsewhere/model", seed=1)
    before = snapshot(runs / "a")
    words = ("-m", other, "-o", runs / "a", "-d", runs.parent / "nowhere.jsonl", "--device", "g2")
    assert run("calibrate", *words) == 2
    printed = capsys.readouterr().err
    assert "calibration of another checkpoint" in printed and str(MODEL) in printed and "mv " in printed
    assert run("quantize", "-m", other, "-o", runs / "a", "-t", 4, "--device", "g2") == 1
    assert "measured on another checkpoint" in capsys.readouterr().err
    assert snapshot(runs / "a") == before


def test_a_model_that_was_trained_on_replaces_its_calibration(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same path is the same model: its files are replaced, and those of the device left out are named."""
    model, data = make_tiny_model("llama", tmp_path / "model"), write_prompts(tmp_path / "data.jsonl", PROMPTS["a"])
    words = ("calibrate", "-m", model, "-d", data, "-o", tmp_path / "out", "--engine", "torch")
    assert run(*words) == 0
    make_tiny_model("llama", tmp_path / "new", seed=1)
    os.replace(tmp_path / "new/model.safetensors", model / "model.safetensors")
    capsys.readouterr()
    assert run(*words, "--device", "g2") == 0
    assert "the files for g3 stay those of the checkpoint as it was before" in capsys.readouterr().err
    assert run("quantize", "-m", model, "-o", tmp_path / "out", "-t", 4, "--device", "g3") == 1
    assert "measured on another checkpoint" in capsys.readouterr().err


def test_a_device_added_later_knows_its_measurement(runs: Path) -> None:
    """Its ranges come from the channel ranges of the run, and so do model, data and measurement in its manifest."""
    assert quantize(runs / "a", "-t", 2, "--device", "g2") == 0
    old, new = (read_manifest(runs / "a/model" / device / MANIFEST_NAME) for device in ("g3", "g2"))
    assert new.device == "g2" and new.measurement == old.measurement
    assert new.dataset == old.dataset and new.engine == old.engine == "torch"


@pytest.mark.parametrize("suffixes", [(".npz",), (".json", ".npz")], ids=["npz", "pair"])
def test_a_rank_of_another_run_is_refused(suffixes: tuple[str, ...], runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Whoever reads ranges checks that they are the run's own; resharding makes them anew."""
    root = runs / "a/model"
    for suffix in suffixes:
        shutil.copy(runs / f"b/model/g3/{ONE_OF_TWO}{suffix}", root / f"g3/{ONE_OF_TWO}{suffix}")
    commands = [
        ("unify", root / "g3", "-r", 1),
        ("expand", root / "g3", "-w", 4, "--from-world", 2),
        ("quantize", "-m", MODEL, "-o", runs / "a", "-t", 2),
        ("postprocess", root / "g3"),
        ("merge", root / "g3", runs / "b/model/g3", "-o", runs / "merged"),
        ("serve", "-m", MODEL, "--quant-config", root / "maxabs_quant_g3.json", "-t", 2, "--print", "--device", "g3"),
    ]
    for words in commands:
        assert run(*words) == 1, words
        printed = capsys.readouterr().err
        assert f"{ONE_OF_TWO}" in printed and "is not the file that the run wrote" in printed, words
    assert f"gaudi-calib reshard {root} -t 2" in printed
    assert run("reshard", root, "-t", 2) == 0
    assert quantize(runs / "a", "-t", 2) == 0
    assert serve(root, "-t", 2) == 0


def truncate(root: Path, name: str) -> None:
    path = root / "g3" / f"{name}_1_2.npz"
    path.write_bytes(path.read_bytes()[:-40])


def empty(root: Path, name: str) -> None:
    (root / "g3" / f"{name}_1_2.npz").write_bytes(b"")


def swap(root: Path, name: str) -> None:
    first, second = (root / "g3" / f"{name}_{rank}_2.npz" for rank in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def hold_no_nodes(root: Path, name: str) -> None:
    np.savez(root / "g3" / f"{name}_1_2.npz", np.array({"Nodes": {}}, dtype=object))


@pytest.mark.parametrize("damage", [truncate, empty, swap, hold_no_nodes])
def test_damaged_scales_do_not_serve(
    damage: Callable[[Path, str], None], runs: Path, capsys: pytest.CaptureFixture
) -> None:
    """INC would use, or fail on, what is in the npz; computing them anew, as the fix says, mends it."""
    root = runs / "a/model"
    assert serve(root, "-t", 2) == 0
    damage(root, "inc_output_hooks_maxabs_MAXABS_HW")
    assert serve(root, "-t", 2) == 1
    printed = capsys.readouterr().err
    assert "is not the file that the run wrote" in printed
    assert f"gaudi-calib quantize -m {MODEL} -o {root.parent} -t 2 --device g3" in printed


def test_a_manifest_without_checksums_vouches_for_nothing(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Then what INC reads is looked at, the npz, not the json beside it."""
    path = runs / "a/model/g3" / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    hold_no_nodes(runs / "a/model", "inc_output_hooks_maxabs_MAXABS_HW")
    assert serve(runs / "a/model", "-t", 2) == 1
    assert "is not blocked and has no scales (nor have" in capsys.readouterr().err


def test_unify_after_another_method_leaves_fresh_scales(runs: Path) -> None:
    """Both methods are computed anew for the unified ranks, with the settings that each is served with."""
    root = runs / "a/model"
    assert quantize(runs / "a", "-t", 4) == 0
    assert quantize(runs / "a", "-t", 4, "--scale-method", "maxabs_pow2") == 0
    assert run("unify", root / "g3", "-r", 2, "--from-world", 4) == 0
    assert serve(root, "-t", 2) == 0
    config = json.loads((root / "maxabs_quant_g3.json").read_text())
    (root / "maxabs_quant_g3.json").write_text(json.dumps(config | {"scale_method": "maxabs_hw"}))
    assert serve(root, "-t", 2) == 0


def test_a_directory_takes_no_ranges_of_another_measurement(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """`-o` of unify, expand or reshard into another run would leave two measurements in one directory."""
    before = snapshot(runs / "b")
    for words in (("unify", runs / "a/model/g3", "-r", 1), ("expand", runs / "a/model/g3", "-w", 2)):
        assert run(*words, "-o", runs / "b/model/g3") == 1
        assert "holds another measurement" in capsys.readouterr().err
    assert run("reshard", runs / "a/model", "-t", 4, "-o", runs / "b/model") == 1
    assert snapshot(runs / "b") == before


def test_what_somebody_put_beside_a_run_is_not_taken_for_its_own(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """A later command records what it wrote, and does not vouch for files it only found."""
    root = runs / "a/model"
    for suffix in (".json", ".npz"):
        shutil.copy(runs / f"b/model/g3/{ONE_OF_TWO}{suffix}", root / f"g3/{ONE_OF_TWO}{suffix}")
    assert run("reshard", root, "-t", 4) == 0
    assert run("unify", root / "g3", "-r", 1, "--from-world", 2) == 1
    assert "is not the file that the run wrote" in capsys.readouterr().err


def age(directory: Path) -> None:
    """Have a manifest say what the releases before said, which did not tell the measurement."""
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "measurement": None}))


def test_a_run_of_an_earlier_release_goes_on(runs: Path) -> None:
    """Its manifest names no measurement; that its ranges follow from its channel ranges tells as much."""
    root = runs / "a/model"
    age(root / "g3")
    assert run("reshard", root, "-t", 4) == 0
    assert quantize(runs / "a", "-t", 4, "--device", "all") == 0
    assert serve(root, "-t", 4) == 0
    assert read_manifest(root / "g3" / MANIFEST_NAME).measurement is not None
    age(root / "g3")
    assert run("merge", root, runs / "b/model", "-o", runs / "merged") == 0


def test_a_run_of_an_earlier_release_takes_no_ranges_of_another(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a measurement in the manifests, other channel ranges and directories are told apart all the same."""
    a, b = runs / "a/model", runs / "b/model"
    for root in (a, b):
        age(root / "g3")
    assert run("unify", a / "g3", "-r", 1, "-o", b / "g3") == 1
    assert "holds another measurement" in capsys.readouterr().err
    shutil.copy(b / CHANNEL_RANGES_NAME, a)
    assert run("reshard", a, "-t", 4) == 1
    assert "the ranges do not follow from it" in capsys.readouterr().err
    assert quantize(runs / "a", "-t", 1, "--device", "g2") == 1
    assert "is of another measurement than g2/" in capsys.readouterr().err
