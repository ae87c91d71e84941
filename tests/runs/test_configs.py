"""A QUANT_CONFIG in place belongs to the user: later runs keep what it says, and what they replace is kept beside."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.config.check import parse_quant_config
from gaudi_calib.errors import ConfigError
from gaudi_calib.files import read_json
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.rankfiles.store import read_ranges, read_scales
from gaudi_calib.runs.calibrate import calibrate
from gaudi_calib.runs.configs import require_observable
from gaudi_calib.runs.options import RunOptions
from tests.support import paths
from tests.support.files import snapshot, write_prompts

pytestmark = pytest.mark.torch

MODEL = paths.GOLDEN / "llama-tiny" / "model"
EXPERTS = paths.GOLDEN / "mixtral-tiny" / "model"
EDITS = {"blocklist": {"types": [], "names": ["lm_head"]}, "scale_format": "CONST"}


def run(*words: object) -> int:
    """Run a command in this process and return its exit code."""
    return main([*map(str, words)])


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of a config, in a layout that is not the program's, and return its content."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content, indent=7))
    return content


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrations of a dense model for both devices, and of experts for Gaudi 3."""
    directory = tmp_path_factory.mktemp("made")
    dataset = {"dataset": str(write_prompts(directory))}
    calibrate(RunOptions(str(MODEL), directory, dataset, world=2, engine="torch", name="dense"))
    options = {"devices": ("g3",), "engine": "torch", "name": "experts"}
    calibrate(RunOptions(str(EXPERTS), directory, dataset, **options))
    return directory


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the runs, which a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for root in (tmp_path / "dense", tmp_path / "experts"):
        assert run("relocate", root) == 0
    return tmp_path


def quantize(out: Path, *words: object) -> int:
    """Run `quantize` on the dense run."""
    return run("quantize", "-m", MODEL, "-o", out, "--name", "dense", *words)


def serve(config: Path, *words: object, model: Path = MODEL) -> int:
    """Run `serve --print` with the Gaudi 3 files."""
    return run("serve", "-m", model, "--quant-config", config, "--print", "--device", "g3", *words)


@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_what_the_user_wrote_stays(command: str, out: Path) -> None:
    """Method, lists and other keys of the config in place are used, and its bytes stay as they are."""
    config = out / "dense/maxabs_quant_g3.json"
    edit(config, **EDITS, scale_method="maxabs_pow2")
    before = config.read_bytes()
    words = ("-m", MODEL, "-o", out, "--name", "dense", "-t", 4, "--device", "g3")
    data = ("-d", out / "prompts.jsonl", "--engine", "torch") if command == "calibrate" else ()
    assert run(command, *words, *data) == 0
    assert config.read_bytes() == before
    scales = read_scales(out / "dense/g3/inc_output_hooks_maxabs_MAXABS_POW2_3_4.json")
    assert scales.nodes and "lm_head" not in scales.nodes
    assert serve(config, "-t", 4) == 0


def test_an_option_changes_what_it_names_alone(out: Path) -> None:
    """Another method keeps lists and keys; what the config said before is in `replaced`."""
    config = out / "dense/maxabs_quant_g3.json"
    before = edit(config, **EDITS)
    assert quantize(out, "-t", 2, "--scale-method", "maxabs_pow2") == 0
    assert read_json(config) == {**before, "scale_method": "maxabs_pow2"}
    assert read_json(out / "dense/replaced" / config.name) == before
    assert quantize(out, "-t", 2, "--scale-method", "maxabs_pcs_pow2") == 0
    after = read_json(config)
    assert (after["dynamic_quantization"], after["scale_format"]) == (True, "CONST")
    assert after["blocklist"]["names"] == ["lm_head"] and "Matmul" in after["blocklist"]["types"]
    assert quantize(out, "-t", 2, "--scale-method", "maxabs_hw") == 0
    assert "dynamic_quantization" not in read_json(config)
    assert read_json(config)["blocklist"] == before["blocklist"]


def test_a_config_in_the_run_is_one_of_its_own(out: Path, capsys: pytest.CaptureFixture) -> None:
    """Scales are computed for it, it is served, and the run's own config says what it said."""
    root = out / "dense"
    side = root / "edited.json"
    shutil.copy(root / "maxabs_quant_g3.json", side)
    edit(side, scale_method="maxabs_arbitrary")
    own = snapshot(root, skipped=[MANIFEST_NAME, side.name])
    assert serve(side, "-t", 2) == 1
    printed = capsys.readouterr().err
    assert f"--config-quant {side}" in printed
    assert quantize(out, "-t", 2, "--config-quant", side) == 0
    assert {name: (root / name).read_bytes() for name in own} == own
    assert (root / "g3/inc_output_hooks_maxabs_MAXABS_ARBITRARY_1_2.npz").is_file()
    assert not list((root / "g2").glob("*ARBITRARY*"))
    assert serve(side, "-t", 2) == 0 and serve(root / "maxabs_quant_g3.json", "-t", 2) == 0
    assert quantize(out, "-t", 2, "--config-quant", side, "--device", "g2") == 2
    assert "is for g3" in capsys.readouterr().err


def test_new_worlds_obey_the_measure_config_of_the_run(out: Path) -> None:
    """Not the preset: what was not measured by the user's config is in no later world either."""
    for config in ("maxabs_measure_g3.json", "maxabs_quant_g3.json"):
        edit(out / "dense" / config, blocklist={"types": [], "names": ["down_proj"]})
    assert quantize(out, "-t", 4, "--device", "g3") == 0
    nodes = read_ranges(out / "dense/g3/inc_output_hooks_maxabs_0_4.json").nodes
    assert nodes and not any("down_proj" in name for name in nodes)


def test_quantize_takes_the_devices_of_the_run(out: Path) -> None:
    """No files appear for a device that was never asked for."""
    assert run("quantize", "-m", EXPERTS, "-o", out, "--name", "experts", "--scale-method", "maxabs_pow2") == 0
    assert not (out / "experts/g2").exists() and not (out / "experts/maxabs_quant_g2.json").exists()


def test_a_quantize_that_cannot_start_leaves_nothing(out: Path, capsys: pytest.CaptureFixture) -> None:
    """Without ranges, and nothing to derive them from, no manifest says that anything ran."""
    (out / "experts/channel_ranges.safetensors").unlink()
    before = snapshot(out)
    words = ("quantize", "-m", EXPERTS, "-o", out, "--name", "experts", "--device", "g2")
    assert run(*words) == 1
    assert "no ranges for 1 ranks on g2" in capsys.readouterr().err
    assert snapshot(out) == before


def test_ranges_that_lost_their_npz_get_it_again(out: Path, capsys: pytest.CaptureFixture) -> None:
    """INC reads nothing else; the json beside it holds the same numbers."""
    npz = out / "dense/g3/inc_output_hooks_maxabs_1_2.npz"
    content = npz.read_bytes()
    npz.unlink()
    assert quantize(out, "-t", 2, "--device", "g3") == 0
    assert npz.read_bytes() == content
    assert "was missing; it is written from the .json beside it" in capsys.readouterr().err
    assert serve(out / "dense/maxabs_quant_g3.json", "-t", 2) == 0


def test_modules_without_ranges_must_be_blocked(out: Path, capsys: pytest.CaptureFixture) -> None:
    """A blocklist that was emptied asks INC for attention nobody measured; both ways out work."""
    root = out / "experts"
    config, measuring = root / "maxabs_quant_g3.json", root / "maxabs_measure_g3.json"
    blocked = read_json(config)["blocklist"]
    edit(config, blocklist={"types": [], "names": []})
    words = ("quantize", "-m", EXPERTS, "-o", out, "--name", "experts")
    for refused in (lambda: serve(config, model=EXPERTS), lambda: run(*words)):
        assert refused() == 1
        printed = capsys.readouterr().err
        assert "is not blocked and has no ranges" in printed and "self_attn" in printed
        assert str(config) in printed and f"gaudi-calib reshard {root} -t 1" in printed
    edit(measuring, blocklist={"types": [], "names": []})
    assert run("reshard", root, "-t", 1) == 0
    assert run(*words) == 0
    assert serve(config, model=EXPERTS) == 0
    edit(config, blocklist=blocked)
    assert serve(config, model=EXPERTS) == 0


def test_what_was_not_measured_is_not_taken_for_measured(out: Path, capsys: pytest.CaptureFixture) -> None:
    """Unblocking a module in both configs measures nothing: the manifest knows what was left out."""
    root = out / "experts"
    for name in ("maxabs_quant_g3.json", "maxabs_measure_g3.json"):
        edit(root / name, blocklist={"types": [], "names": []})
    words = ("quantize", "-m", EXPERTS, "-o", out, "--name", "experts")
    for refused in (lambda: run(*words), lambda: serve(root / "maxabs_quant_g3.json", model=EXPERTS)):
        assert refused() == 1
        assert "is not blocked and has no ranges" in capsys.readouterr().err


def test_nothing_is_measured_for_configs_that_do_not_go_together(out: Path, capsys: pytest.CaptureFixture) -> None:
    """That the one blocks what the other quantizes is told before any work."""
    config = out / "empty.json"
    content = read_json(out / "experts/maxabs_quant_g3.json")
    config.write_text(json.dumps({**content, "blocklist": {"types": [], "names": ["lm_head"]}}))
    words = ("calibrate", "-m", EXPERTS, "-d", out / "no-such-data.jsonl", "-o", out / "new", "--config-quant", config)
    assert run(*words) == 1
    printed = capsys.readouterr().err
    assert "is not blocked and has no ranges" in printed and str(config) in printed


def test_scales_of_a_longer_blocklist_do_not_serve_a_shorter_one(out: Path, capsys: pytest.CaptureFixture) -> None:
    """A config that quantizes more than the scales were computed for is told so, with what computes them."""
    config = out / "dense/maxabs_quant_g3.json"
    edit(config, blocklist={"types": [], "names": ["down_proj"]})
    assert quantize(out, "-t", 2, "--device", "g3") == 0
    edit(config, blocklist={"types": [], "names": []})
    assert serve(config, "-t", 2) == 1
    printed = capsys.readouterr().err
    assert "down_proj is not blocked and has no scales" in printed and "gaudi-calib quantize" in printed
    assert quantize(out, "-t", 2, "--device", "g3") == 0
    assert serve(config, "-t", 2) == 0


def test_patterns_that_match_nothing_are_told_by_serve(out: Path, capsys: pytest.CaptureFixture) -> None:
    """A typing error in the blocklist leaves a module in FP8 that was meant to stay out."""
    config = out / "dense/maxabs_quant_g3.json"
    edit(config, blocklist={"types": [], "names": ["lm_haed"]})
    assert serve(config, "-t", 2) == 0
    assert "pattern 'lm_haed' matches no node" in capsys.readouterr().err


def test_a_config_that_leaves_nothing_to_quantize_is_told(out: Path, capsys: pytest.CaptureFixture) -> None:
    """It serves, but not in FP8."""
    config = out / "dense/maxabs_quant_g3.json"
    edit(config, blocklist={"types": [], "names": ["."]})
    assert serve(config, "-t", 2) == 0
    assert "leave no module to quantize: all is served in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "engine", "platform", "fix"),
    [
        ({"observer": "save"}, "vllm", "hpu", "--engine torch"),
        ({"observer": "save"}, "vllm", "cpu", "--engine torch"),
        ({"observer": "shape"}, "vllm", "hpu", "observer maxabs"),
        ({"observer": "maxabs_per_channel"}, "torch", "cpu", "observer maxabs"),
        ({"measure_exclude": "NONE"}, "vllm", "cpu", "--engine torch"),
        ({"measure_exclude": "PARAMS"}, "vllm", "cpu", "leave measure_exclude out"),
        ({"measure_exclude": "NONE"}, "vllm", "hpu", None),
        ({"measure_exclude": "NONE"}, "torch", "cpu", None),
        ({"measure_exclude": "ALL"}, "vllm", "cpu", None),
        ({"observer": "save"}, "torch", "cpu", None),
    ],
)
def test_what_an_engine_does_not_observe_is_refused(
    content: dict[str, str], engine: str, platform: str, fix: str | None
) -> None:
    """Before it starts; INC on a Gaudi measures outputs itself."""
    config = parse_quant_config({"mode": "MEASURE", "dump_stats_path": "x/inc_output", **content})
    options = RunOptions("model", Path("out"), engine=engine, platform=platform)
    if fix is None:
        require_observable(config, options, Path("measure.json"), scales=False)
        return
    with pytest.raises(ConfigError, match="is not possible here") as caught:
        require_observable(config, options, Path("measure.json"), scales=False)
    assert fix in str(caught.value.fix)
