"""`quantize DIR` of a run's own directory, and of ranges whose checkpoint is at hand."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError, ModelError, RangeError
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import read_manifest
from gaudi_calib.runs.calibrate import calibrate
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.quantize import Scaling, quantize_dir
from tests.support.calibrated import Calibrated
from tests.support.files import snapshot, write_prompts
from tests.support.fixes import find_advised

pytestmark = pytest.mark.torch


@pytest.fixture
def run(pristine, tmp_path) -> Calibrated:
    """A run of worlds 1 and 2 for both devices, with manifests and configs."""
    root = Path(shutil.copytree(pristine.root, tmp_path / "out" / pristine.root.name))
    assert main(["relocate", str(root)]) == 0
    return Calibrated(root, pristine.model)


def test_a_run_keeps_its_manifest(run: Calibrated):
    """Scales of its own method are the same as the run's, what is recorded of them is right, and it serves."""
    place = run.root / "g3"
    before = snapshot(place, skipped=[MANIFEST_NAME])
    quantize_dir(place)
    assert snapshot(place, skipped=[MANIFEST_NAME]) == before
    manifest = read_manifest(place / MANIFEST_NAME)
    assert manifest.status == "ok" and manifest.dataset and set(manifest.files) == set(before)
    assert CalibrationDir(place).find_stale() == []
    assert run.plan("g3", world=2).argv


def test_stale_scales_of_a_run_are_made_anew(run: Calibrated):
    """A backoff that was edited makes scales stale; the command that computes them names no model."""
    config = run.config("g3")
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "scale_params": {"input_backoff": 1.0, "weight_backoff": 0.5}}))
    with pytest.raises(FileError, match="is stale"):
        run.plan("g3", world=2)
    quantize_dir(run.root / "g3", scaling=Scaling(world=2))
    assert run.plan("g3", world=2).argv
    with pytest.raises(FileError, match="is stale"):
        run.plan("g3", world=1)


def test_elsewhere_inherits_what_is_known(run: Calibrated, tmp_path: Path):
    """Model, data and worlds; a damaged file is refused first."""
    quantize_dir(run.root / "g3", tmp_path / "copy", Scaling(world=2))
    copied = CalibrationDir(tmp_path / "copy")
    assert copied.manifest and copied.manifest.model == read_manifest(run.root / "g3" / MANIFEST_NAME).model
    assert copied.device and copied.device.name == "g3" and list(copied.manifest.worlds) == [2]
    assert copied.find_stale() == []
    (run.root / "g3" / "inc_output_hooks_maxabs_0_2.npz").write_bytes(b"changed")
    with pytest.raises(FileError, match="is not the file that the run wrote"):
        quantize_dir(run.root / "g3", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["maxabs_hw_opt_weight", "act_maxabs_hw_weights_pcs_maxabs_pow2"])
def test_weights_are_sliced_as_in_a_run(
    method: str, family: str, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A checkpoint where the method needs one: the same scales as the run's, for whole experts of older names, too."""
    model, dataset = tiny_model(family), str(write_prompts(tmp_path))
    whole = {"expert_parallel": True, "vllm": "0.20"} if family == "mixtral" else {}
    options = RunOptions(str(model), tmp_path / "out", {"dataset": dataset}, world=2, devices=("g2",), **whole)
    made = calibrate(replace(options, engine="torch", scale_method=method)).root / "g2"
    bare = Path(shutil.copytree(made, tmp_path / "bare" / "g2"))
    for path in [bare / MANIFEST_NAME, *bare.glob(f"*_{method.upper()}_*")]:
        path.unlink()
    words = ["quantize", str(bare), "--scale-method", method]
    assert main(words) == 2 and "takes scales from the weights" in capsys.readouterr().err
    if family == "llama":
        blocked = json.loads((made.parent / "maxabs_quant_g2.json").read_text())["blocklist"]["names"]
        assert blocked == []
    else:
        (bare.parent / "maxabs_quant_g2.json").write_bytes((made.parent / "maxabs_quant_g2.json").read_bytes())
    assert main([*words, "-m", str(model)]) == 0
    assert snapshot(bare) == snapshot(made, skipped=[MANIFEST_NAME])


def test_another_checkpoint_is_refused(run: Calibrated, tiny_model: Callable[[str], Path], tmp_path: Path):
    """As far as a manifest knows what was measured; the weights of a model without the nodes are missed."""
    other = Scaling(method="maxabs_hw_opt_weight", model=str(tiny_model("mixtral")))
    with pytest.raises(ModelError, match="measured on another checkpoint"):
        quantize_dir(run.root / "g3", scaling=other)
    bare = Path(shutil.copytree(run.root / "g3", tmp_path / "bare" / "g3"))
    (bare / MANIFEST_NAME).unlink()
    with pytest.raises(RangeError, match="has no weight to take scales from"):
        quantize_dir(bare, scaling=other)


def test_serving_ranges_without_npz_is_one_command_away(run: Calibrated, capsys: pytest.CaptureFixture[str]):
    """Files of a card that were published as text: what `serve` advises restores what INC reads."""
    for path in [run.root / "channel_ranges.safetensors", *run.root.glob(f"g3/{MANIFEST_NAME}")]:
        path.unlink()
    for path in (run.root / "g3").glob("*_2.npz"):
        path.unlink()
    with pytest.raises(FileError, match="no files for 2 ranks") as caught:
        run.plan("g3", world=2)
    (advised,) = find_advised(f"fix: {caught.value.fix}")
    assert main(shlex.split(advised)[1:]) == 0
    assert run.plan("g3", world=2).argv
