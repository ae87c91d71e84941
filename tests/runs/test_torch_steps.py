"""What a MEASURE config may ask of the torch engine: outputs, too, or tensors in place of ranges."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, UsageError
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import read_manifest
from gaudi_calib.runs.calibrate import calibrate, measure
from gaudi_calib.runs.options import RunOptions
from tests.support import paths
from tests.support.files import snapshot, write_prompts

pytestmark = pytest.mark.torch

GOLDEN = paths.GOLDEN / "llama-tiny"
WITH_OUTPUTS = paths.ROOT / "quantization_config/maxabs_measure_include_outputs.json"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A few prompts, as token ids."""
    return write_prompts(tmp_path, [[5, 9, 200, 31, 7], [1, 2, 3], [17] * 11])


def options(data: Path, **changes) -> RunOptions:
    facts = {"model": str(GOLDEN / "model"), "out": data.parent / "out", "dataset": {"dataset": str(data)}}
    return RunOptions(**{**facts, "engine": "torch", **changes})


def run(*words: object) -> int:
    """Run a command in this process and return its exit code."""
    return main([*map(str, words)])


def snapshot_results(directory: Path) -> dict[str, bytes]:
    """Return the content of every file but the manifests, which tell of each try."""
    return snapshot(directory, skipped=[MANIFEST_NAME])


def write_config(directory: Path, **content: object) -> Path:
    """Write a MEASURE config."""
    path = directory / "measure.json"
    path.write_text(json.dumps({"mode": "MEASURE", "dump_stats_path": "x/inc_output", **content}))
    return path


def test_outputs_are_measured_where_the_config_asks(dataset: Path, tmp_path: Path):
    """The template gives every node outputs, at every world, and the same scales; else nothing differs."""
    plain = calibrate(options(dataset, world=2, unified_world=1)).root
    full = calibrate(
        options(dataset, out=tmp_path / "full", world=2, unified_world=1, measure_config=WITH_OUTPUTS)
    ).root
    for device, world in itertools.product(("g2", "g3"), (1, 2)):
        pairs = zip(*(CalibrationDir(root / device).read_world(world) for root in (plain, full)), strict=True)
        for before, after in pairs:
            assert before.modules == after.modules and list(before.nodes) == list(after.nodes)
            for name, node in after.nodes.items():
                assert node.outputs
                assert repr(replace(node, outputs=None)) == repr(replace(before.nodes[name], outputs=None))
                assert before.nodes[name].outputs in (None, node.outputs)
        for path in (plain / device).glob("*MAXABS_HW*.json"):
            assert path.read_bytes() == (full / device / path.name).read_bytes()


def test_outputs_stay_when_ranks_are_joined_and_split(dataset: Path, tmp_path: Path):
    """unify, expand, merge and reshard keep them; an exact slice is never above what expand bounds it by."""
    root = calibrate(options(dataset, world=2, measure_config=WITH_OUTPUTS, devices=("g3",))).root
    assert run("unify", root / "g3", "-r", 1, "-o", tmp_path / "one") == 0
    assert run("expand", tmp_path / "one", "-w", 4, "-o", tmp_path / "four") == 0
    assert run("merge", root, root, "-o", tmp_path / "merged") == 0
    assert run("reshard", tmp_path / "merged", "-t", 4, "--device", "g3") == 0
    ranks = CalibrationDir(root / "g3").read_world(2)
    bounds, exact = (CalibrationDir(path).read_world(4) for path in (tmp_path / "four", tmp_path / "merged/g3"))
    for rank in range(4):
        for name, node in exact[rank].nodes.items():
            largest = np.maximum.reduce([one.nodes[name].outputs for one in ranks])
            assert np.array_equal(bounds[rank].nodes[name].outputs, largest)
            assert len(node.outputs) == len(largest)
            if len(node.outputs) == 1:
                assert node.outputs[0] <= largest[0]


def test_outputs_that_were_not_measured_are_asked_for_in_vain(dataset: Path, capsys: pytest.CaptureFixture):
    """The error of reshard and quantize names the command that measures them."""
    root = calibrate(options(dataset, devices=("g3",))).root
    config = json.loads((root / "maxabs_measure_g3.json").read_text())
    (root / "maxabs_measure_g3.json").write_text(json.dumps({**config, "measure_exclude": "NONE"}))
    before = snapshot_results(root)
    assert run("reshard", root, "-t", 2) == 1
    assert run("quantize", "-m", GOLDEN / "model", "-o", root.parent, "-t", 2, "--device", "g3") == 1
    said = capsys.readouterr().err
    command = f"gaudi-calib measure -m {GOLDEN / 'model'} -o {root.parent} -d {dataset} -t 2 --device g3"
    assert said.count(f"measure again: {command}; or leave measure_exclude out") == 2
    assert snapshot_results(root) == before
    assert run(*command.split()[1:]) == 0
    assert run("reshard", root, "-t", 4) == 0


def test_tensors_are_saved_in_place_of_ranges(dataset: Path, capsys: pytest.CaptureFixture):
    """`measure` leaves them with the config, and a manifest that says so; `quantize` tells how to get ranges."""
    config = write_config(dataset.parent, observer="save")
    root = measure(options(dataset, measure_config=config, devices=("g3",))).root
    tensors = sorted((root / "g3/tensors").iterdir())
    assert len(tensors) == 4 * (4 * 3 + 4 + 2 * 3) + 3 + 1  # inputs, weights and needed outputs; lm_head
    assert sorted(path.name for path in root.rglob("*") if path.is_file() and path not in tensors) == [
        "calibration_manifest.json",
        "maxabs_measure_g3.json",
    ]
    manifest = read_manifest(root / "g3/calibration_manifest.json")
    assert (manifest.status, manifest.config["measure"]["observer"]) == ("ok", "save")
    words = ("-m", GOLDEN / "model", "-o", root.parent, "--device", "g3")
    assert run("quantize", *words) == 1
    said = capsys.readouterr().err
    assert "observer save left tensors only" in said
    command = f"gaudi-calib measure -m {GOLDEN / 'model'} -o {root.parent} -d {dataset} -t 1 --device g3"
    assert f"use observer maxabs in {root / 'maxabs_measure_g3.json'}, then run: {command}" in said
    write_config(root, observer="maxabs").rename(root / "maxabs_measure_g3.json")
    assert run(*command.split()[1:]) == 0
    assert run("quantize", *words) == 0


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"devices": ("g2", "g3")}, "for one device at a time", "--device g2"),
        ({"world": 2}, "for one rank, and -t is 2", "leave -t and -r out"),
        ({}, "there are results already", "--name model-tensors"),
    ],
    ids=["devices", "ranks", "results"],
)
def test_tensors_that_could_not_be_told_apart_are_refused(
    changes: dict[str, object], message: str, fix: str, dataset: Path, tmp_path: Path
):
    """Before anything is written; what is there stays as it is."""
    root = measure(options(dataset, devices=("g3",))).root
    before = snapshot(root)
    config = write_config(tmp_path, observer="save")
    with pytest.raises(UsageError, match=message) as caught:
        measure(options(dataset, **{"measure_config": config, "devices": ("g3",), **changes}))
    assert fix in caught.value.fix
    assert snapshot(root) == before


def test_tensors_that_do_not_fit_on_the_disk_are_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With what they would take, and how many prompts would fit; nothing is left behind."""
    free = shutil.disk_usage(tmp_path)._replace(free=5_300_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    config = write_config(tmp_path, observer="save", measure_exclude="NONE")
    with pytest.raises(FileError, match=r"take about 5.\d MB, of which weights 4.9 MB, and 5.3 MB are") as caught:
        measure(options(dataset, measure_config=config, devices=("g3",)))
    fitting = int(re.search(r"-l (\d+)", caught.value.fix)[1])
    given = {"dataset": str(dataset), "limit": fitting}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != MANIFEST_NAME and path.is_file()]
    assert measure(options(dataset, measure_config=config, devices=("g3",), dataset=given)).files


@pytest.mark.parametrize("observer", ["shape", "maxabs_per_channel"])
def test_observers_that_give_no_ranges_are_refused(observer: str, dataset: Path, tmp_path: Path):
    """Ranges are never written in their name."""
    config = write_config(tmp_path, observer=observer)
    for command in (calibrate, measure):
        with pytest.raises(ConfigError, match=f"observer {observer} is not possible here") as caught:
            command(options(dataset, measure_config=config))
        assert "observer maxabs" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_scales_are_not_computed_from_tensors(dataset: Path, tmp_path: Path):
    """`calibrate` needs ranges, unless the scale method needs none."""
    config = write_config(tmp_path, observer="save")
    with pytest.raises(ConfigError, match="no ranges to compute scales from"):
        calibrate(options(dataset, measure_config=config))
    assert calibrate(options(dataset, measure_config=config, scale_method="unit_scale")).quant_configs
