"""The commands that `serve` prints as a fix are run as printed, and then it serves."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.errors import FileError, TopologyError
from tests.support.calibrated import HPU2, HPU3, MODEL, Calibrated, calibrate_by_torch
from tests.support.files import write_prompts
from tests.support.fixes import find_advised
from tests.support.paths import GOLDEN

pytestmark = pytest.mark.torch

TP2 = GOLDEN / "llama-tiny" / "tp2"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Calibrated:
    return calibrate_by_torch(MODEL, tmp_path_factory.mktemp("it's out"))


@pytest.fixture
def run(pristine, tmp_path) -> Calibrated:
    """A copy, in a place with a blank, for a model of another name than the run has."""
    root = Path(shutil.copytree(pristine.root, tmp_path / "the runs" / "Model-V2"))
    assert main(["relocate", str(root)]) == 0
    model = Path(shutil.copytree(MODEL, tmp_path / "a checkpoint"))
    return Calibrated(root, model)


def follow(fix: str) -> None:
    """Run the commands that a fix gives, the first of several ways."""
    for command in find_advised(fix)[0].split(" && "):
        words = shlex.split(command)
        assert words[0] == "gaudi-calib" and main(words[1:]) == 0, command


def remove(pattern: str) -> Callable[[Calibrated], None]:
    def damage(run: Calibrated) -> None:
        for path in (run.root / "g3").glob(pattern):
            path.unlink()

    return damage


def lose_channels(run: Calibrated) -> None:
    (run.root / "channel_ranges.safetensors").unlink()
    remove("*_[01]_2.*")(run)


def lose_world_one(run: Calibrated) -> None:
    (run.root / "channel_ranges.safetensors").unlink()
    remove("*_0_1.*")(run)


def change_ranges(run: Calibrated) -> None:
    source, target = (run.root / "g3" / f"inc_output_hooks_maxabs_{rank}_2" for rank in (0, 1))
    for extension in ("json", "npz"):
        shutil.copy(source.with_suffix(f".{extension}"), target.with_suffix(f".{extension}"))


@pytest.mark.parametrize(
    ("damage", "world"),
    [
        (remove("*_2.npz"), 2),
        (remove("inc_output_hooks_maxabs_1_2.npz"), 2),
        (remove("*MAXABS_HW_1_2.*"), 2),
        (remove("*MAXABS_HW_1_2.npz"), 2),
        (change_ranges, 2),
        (lambda run: None, 4),
        (lose_channels, 2),
        (lose_world_one, 1),
    ],
    ids=["world", "npz", "scales", "scales-npz", "stale", "other-world", "no-channels", "unify"],
)
def test_what_is_printed_mends_it(damage, world, run):
    """Although the model is not called as the run, and names need quoting; nothing of another run appears."""
    damage(run)
    with pytest.raises(FileError) as caught:
        run.plan(world=world)
    follow(caught.value.fix)
    assert run.plan(world=world).argv
    assert [path.name for path in run.root.parent.iterdir() if not path.name.startswith(".")] == ["Model-V2"]


def test_a_side_config_gets_its_own_scales(run):
    """The command names the config, wherever it is: that of the run is another one."""
    content = json.loads(run.config("g3").read_text())
    side = run.root / "edited.json"
    side.write_text(json.dumps({**content, "scale_method": "maxabs_pow2"}))
    with pytest.raises(FileError, match="scales of a rank are missing") as caught:
        run.plan(quant_config=side, world=2)
    assert f"--config-quant '{side}'" in caught.value.fix


def test_files_of_the_other_device(run, pristine):
    """The run's own config for it; where there is none, what makes it; `run` has no g3."""
    with pytest.raises(FileError, match="files are for g2, and g3") as caught:
        run.plan("g2", HPU3)
    assert caught.value.fix == f"give --quant-config '{run.config('g3')}'"
    run.config("g3").unlink()
    shutil.rmtree(run.root / "g3")
    with pytest.raises(FileError, match="files are for g2, and g3") as caught:
        run.plan("g2", HPU3, world=2)
    assert "quantize" in caught.value.fix
    follow(caught.value.fix)
    assert run.plan(world=2).argv


def test_files_that_a_gaudi_left(tmp_path):
    """A run of the reference has no channel ranges: only measuring makes files for the other device."""
    root = tmp_path / "out" / "model"
    shutil.copytree(TP2 / "g2", root / "g2")
    config = root / "maxabs_quant_g2.json"
    config.write_text(json.dumps({"mode": "QUANTIZE", "dump_stats_path": str(root / "g2" / "inc_output")}))
    foreign = Calibrated(root, MODEL)
    with pytest.raises(FileError, match="files are for g2, and g3") as caught:
        foreign.plan("g2", HPU3)
    assert "measure for g3" in caught.value.fix
    follow(f"{caught.value.fix} -l 4 --max-tokens 64")  # fewer and shorter prompts, for time
    assert foreign.plan("g3", HPU3, world=1).argv
    assert foreign.plan("g2", HPU2, world=2).argv


def test_whole_experts_of_a_dense_model(run, caplog):
    """-u has no effect, as when it was calibrated, and that is said."""
    assert "--enable-expert-parallel" not in run.plan(world=2, expert_parallel=True).argv
    assert "-u/--expert-parallel has no effect" in caplog.text


def test_experts_can_be_shared_otherwise(tiny_model, tmp_path):
    """The files that are asked for are made."""
    made = calibrate_by_torch(tiny_model("mixtral"), tmp_path, cold_experts="ignore", expert_parallel=True)
    with pytest.raises(TopologyError, match="whole experts") as caught:
        made.plan(world=2, expert_parallel=False)
    follow(caught.value.fix)
    assert "--enable-expert-parallel" not in made.plan(world=2, expert_parallel=False).argv


def test_a_run_may_have_a_name(tmp_path):
    """`--name` is the run's directory, in whatever case; a path is not."""
    run = ["calibrate", "-m", str(MODEL), "-o", str(tmp_path / "out"), "-d", str(write_prompts(tmp_path))]
    assert main([*run, "--engine", "torch", "--device", "g3", "--name", "Monday"]) == 0
    assert (tmp_path / "out" / "Monday" / "maxabs_quant_g3.json").is_file()
    for name in ("a/b", "..", "", "."):
        assert main([*run, "--name", name]) == 2
