"""What a directory of rank files tells about itself, with and without a manifest."""

import json
import os
import shutil

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.manifest import ScaleOrigin, read_manifest, record_run
from tests.support import paths

LLAMA = paths.GOLDEN / "llama-tiny"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "g2" / "calibration_manifest.json"


def test_a_directory_of_inc_tells_what_its_names_tell(tmp_path):
    """Without manifest: device from the directory, worlds and methods from file names, no config."""
    shutil.copytree(LLAMA / "tp2" / "g2", tmp_path / "g2")
    placed = CalibrationDir(tmp_path / "g2")
    assert (placed.manifest, placed.device, placed.quant_config, placed.measure_config) == (None, GAUDI2, None, None)
    assert {world: sorted(ranks) for world, ranks in placed.worlds.items()} == {2: [0, 1]}
    assert placed.list_methods(2) == ["MAXABS_HW"] and placed.list_methods(1) == []
    assert placed.list_missing(2) == [] and len(placed.list_missing(4, method="MAXABS_HW")) == 4
    assert len(placed.read_world(2)) == 2
    (tmp_path / "g2").rename(tmp_path / "somewhere")
    placed = CalibrationDir(tmp_path / "somewhere")
    assert (placed.device, placed.layout) == (None, None)
    assert placed.settle_device("g3") == GAUDI3


def test_a_device_that_contradicts_the_directory_is_refused(tmp_path):
    """--device may fill in what is not known, not overrule it."""
    shutil.copytree(LLAMA / "tp2" / "g2", tmp_path / "g2")
    with pytest.raises(UsageError, match="contradicts the directory, which is of g2"):
        CalibrationDir(tmp_path / "g2").settle_device("g3")


def test_the_config_is_that_of_the_run(tmp_path):
    """QUANTIZE and MEASURE config lie beside the directory; the manifest stands in for a lost MEASURE config."""
    shutil.copytree(LLAMA / "tp1" / "g3", tmp_path / "g3")
    run = tmp_path
    for phase, mode in (("measure", "MEASURE"), ("quant", "QUANTIZE")):
        content = {"mode": mode, "dump_stats_path": str(run / "g3" / "inc_output")}
        (run / f"maxabs_{phase}_g3.json").write_text(json.dumps(content))
    placed = CalibrationDir(run / "g3")
    assert placed.quant_config.mode == "QUANTIZE" and placed.measure_config.mode == "MEASURE"
    recorded = {"mode": "MEASURE", "blocklist": {"names": ["lm_head"]}, "dump_stats_path": "x/inc_output"}
    with record_run(run / "g3" / "calibration_manifest.json", config={"measure": recorded}, device="g3"):
        pass
    (run / "maxabs_measure_g3.json").unlink()
    assert CalibrationDir(run / "g3").measure_config.blocklist.names == ["lm_head"]


def test_two_measurements_in_one_directory_are_told_apart_or_refused(tmp_path):
    """Files of two dump names for the same rank: an error, unless the dump name is given."""
    shutil.copytree(LLAMA / "tp2" / "g2", tmp_path / "g2")
    name = "inc_output_hooks_maxabs_1_2.json"
    shutil.copy(tmp_path / "g2" / name, tmp_path / "g2" / name.replace("inc_output", "other"))
    with pytest.raises(FileError, match="two files are ranges of rank 1 of 2"):
        _ = CalibrationDir(tmp_path / "g2").worlds
    assert list(CalibrationDir(tmp_path / "g2", dump="other").worlds[2]) == [1]
    with pytest.raises(FileError, match="no ranges of rank 0 of 2"):
        CalibrationDir(tmp_path / "g2", dump="other").read_world(2)


RANGES = ("inc_output_hooks_maxabs_0_1.npz", "inc_output_hooks_maxabs_0_1.json")
SCALES = "inc_output_hooks_maxabs_MAXABS_HW_0_1.npz"


@pytest.fixture
def run(path):
    """A finished run with ranges and scales computed from them."""
    path.parent.mkdir()
    for name in (*RANGES, SCALES):
        (path.parent / name).write_text(f"content of {name}")
    with record_run(path) as record:
        hashes = CalibrationDir(path.parent).hash_files()
        origin = ScaleOrigin(ranges={name: hashes[name] for name in RANGES}, settings={"device": "g2"})
        record.update(scales={SCALES: origin}, files=hashes)
    return path


def find_stale(path, **arguments):
    return [(stale.path.name, stale.why) for stale in CalibrationDir(path.parent).find_stale(**arguments)]


def test_fresh_scales_are_accepted(run):
    """Nothing is stale right after a run, also when ranges are copied over themselves."""
    assert set(read_manifest(run).files) == {*RANGES, SCALES}
    shutil.copy(run.parent / RANGES[0], run.parent / "copy")
    os.replace(run.parent / "copy", run.parent / RANGES[0])
    assert find_stale(run, settings={"device": "g2"}) == []


def test_scales_of_other_ranges_or_settings_are_find_stale(run):
    """Changed, vanished and unrecorded origins, and other settings, are each told."""
    assert find_stale(run, settings={"device": "g3"}) == [(SCALES, "it was computed with other settings: device")]
    (run.parent / RANGES[0]).write_text("measured again")
    assert find_stale(run) == [(SCALES, f"its ranges {RANGES[0]} have changed since")]
    (run.parent / RANGES[0]).unlink()
    assert find_stale(run) == [(SCALES, f"its ranges {RANGES[0]} are gone")]
    other = SCALES.replace("_0_1", "_0_2")
    shutil.copy(run.parent / SCALES, run.parent / other)
    assert [name for name, _ in find_stale(run)] == [SCALES, other]


def test_scales_are_judged_by_the_last_good_run(run):
    """A failed attempt does not make good scales stale."""
    with pytest.raises(RuntimeError), record_run(run):
        raise RuntimeError
    assert find_stale(run) == []


@pytest.mark.parametrize("command", ["unify -r 1", "expand -w 4 --from-world 2", "postprocess"])
def test_a_run_in_the_place_of_its_device_directory_is_told_so(command, tmp_path, capsys):
    """One message, whichever command reads the ranges; what its fix says then works."""
    shutil.copytree(LLAMA / "tp2" / "g2", tmp_path / "run" / "g2")
    name, *options = command.split()
    assert main([name, str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert "no ranges in the directory" in error and f"give {tmp_path / 'run' / 'g2'}\n" in error
    assert main([name, str(tmp_path / "run" / "g2"), *options, "-o", str(tmp_path / "out")]) == 0
