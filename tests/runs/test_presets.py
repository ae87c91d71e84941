"""Runs made with `--preset`: what is written, told, kept and served."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.files import read_json
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import read_manifest
from gaudi_calib.runs.calibrate import calibrate
from gaudi_calib.runs.options import RunOptions
from tests.support import paths
from tests.support.files import write_prompts
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch

MODEL = paths.GOLDEN / "mixtral-tiny" / "model"
CONST = {"VLLM_DISABLE_MARK_SCALES_AS_CONST": "true"}
FIELD_TYPES = ["VLLMKVCache", "Matmul", "Softmax"]


def run(*words: object) -> int:
    """Run a command in this process and return its exit code."""
    return main([*map(str, words)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrations of experts for Gaudi 3, by either preset."""
    directory = tmp_path_factory.mktemp("made")
    dataset = {"dataset": str(write_prompts(directory))}
    for preset in ("field", "reference"):
        options = {"devices": ("g3",), "engine": "torch", "name": preset, "preset": preset}
        calibrate(RunOptions(str(MODEL), directory, dataset, **options))
    return directory


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the runs, which a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for name in ("field", "reference"):
        assert run("relocate", tmp_path / name) == 0
    return tmp_path


def quantize(out: Path, name: str, *words: object) -> int:
    """Run `quantize` on one of the runs."""
    return run("quantize", "-m", MODEL, "-o", out, "--name", name, *words)


def measure(out: Path, name: str, *words: object, command: str = "measure") -> int:
    """Measure one of the runs anew."""
    data = ("-d", out / "prompts.jsonl", "--engine", "torch", "--device", "g3")
    return run(command, "-m", MODEL, "-o", out, "--name", name, *data, *words)


def print_serve(config: Path, model: Path, capsys: pytest.CaptureFixture) -> str:
    """Return what `serve --print` prints for a Gaudi 3."""
    capsys.readouterr()
    assert run("serve", "-m", model, "--quant-config", config, "--print", "--device", "g3") == 0
    return capsys.readouterr().out


def test_what_is_written_and_served(out: Path, capsys: pytest.CaptureFixture) -> None:
    """The field's lists, attention measured as far as it is quantized, and its variable wherever vLLM is told."""
    blocked = read_json(out / "field" / "maxabs_quant_g3.json")["blocklist"]
    assert blocked["types"] == FIELD_TYPES and "self_attn" not in blocked["names"]
    ranges = read_json(out / "field" / "g3" / "inc_output_hooks_maxabs_0_1.json")["Nodes"]
    scales = read_json(out / "field" / "g3" / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json")["Nodes"]
    assert "model.layers.0.self_attn.qkv_proj" in ranges.keys() & scales.keys()
    assert "model.layers.0.self_attn.attn.impl.k_cache" in ranges.keys() - scales.keys()
    assert read_manifest(out / "field" / "g3" / MANIFEST_NAME).preset.env == CONST
    served = print_serve(out / "field" / "maxabs_quant_g3.json", MODEL, capsys)
    assert "VLLM_DISABLE_MARK_SCALES_AS_CONST=true" in served and "fp8_inc" not in served
    assert "VLLM_DISABLE" not in print_serve(out / "reference" / "maxabs_quant_g3.json", MODEL, capsys)


def test_patterns_of_the_preset_need_not_match(out: Path, capfd: pytest.CaptureFixture) -> None:
    """The field blocks routers by a name that some models do not have; a pattern of the user's is told as ever."""
    assert quantize(out, "field") == 0
    print_serve(out / "field" / "maxabs_quant_g3.json", MODEL, capfd)
    assert quantize(out, "field") == 0
    assert "matches no node" not in capfd.readouterr().err
    config = read_json(out / "field" / "maxabs_quant_g3.json")
    config["blocklist"]["names"].append("lm_hed")
    (out / "field" / "maxabs_quant_g3.json").write_text(json.dumps(config))
    assert quantize(out, "field") == 0
    assert "'lm_hed' matches no node" in capfd.readouterr().err


def test_later_commands_keep_the_preset(out: Path, capsys: pytest.CaptureFixture) -> None:
    """`quantize`, with another method, too, `calibrate` and results elsewhere stay as the run was made."""
    before = read_json(out / "field" / "maxabs_quant_g3.json")
    assert quantize(out, "field", "-t", 2, "--scale-method", "maxabs_pow2") == 0
    assert read_json(out / "field" / "maxabs_quant_g3.json") == {**before, "scale_method": "maxabs_pow2"}
    assert measure(out, "field", command="calibrate") == 0
    assert run("reshard", out / "field", "-t", 2, "-o", out / "elsewhere") == 0
    shutil.copytree(out / "field", out / "copy")
    assert run("merge", out / "field", out / "copy", "-o", out / "merged") == 0
    for place in ("field", "elsewhere", "merged"):
        preset = read_manifest(out / place / "g3" / MANIFEST_NAME).preset
        assert (preset.name, preset.env) == ("field", CONST)


def test_another_preset_replaces_the_configs(out: Path, capsys: pytest.CaptureFixture) -> None:
    """They are kept beside; the same preset once more leaves what the user wrote."""
    config = out / "reference" / "maxabs_quant_g3.json"
    before = {name: (out / "reference" / name).read_bytes() for name in (config.name, "maxabs_measure_g3.json")}
    assert measure(out, "reference", "--preset", "field", command="calibrate") == 0
    assert "VLLM_DISABLE_MARK_SCALES_AS_CONST=true vllm serve" in capsys.readouterr().out
    assert read_json(config)["blocklist"]["types"] == FIELD_TYPES
    assert {name: (out / "reference" / "replaced" / name).read_bytes() for name in before} == before
    edited = {**read_json(config), "blocklist": {"types": [], "names": ["self_attn", "lm_head", "gate"]}}
    config.write_text(json.dumps(edited))
    assert measure(out, "reference", "--preset", "field", command="calibrate") == 0
    assert read_json(config) == edited
    assert measure(out, "reference", "--preset", "reference", command="calibrate") == 0
    assert {name: (out / "reference" / name).read_bytes() for name in before} == before
    assert read_manifest(out / "reference" / "g3" / MANIFEST_NAME).preset.env == {}


def test_measuring_for_another_preset_leaves_no_config_of_the_old(out: Path) -> None:
    """The QUANTIZE config of the other preset is put aside, so that `quantize` writes the right one."""
    assert measure(out, "reference", "--preset", "field") == 0
    assert not (out / "reference" / "maxabs_quant_g3.json").exists()
    assert (out / "reference" / "replaced" / "maxabs_quant_g3.json").is_file()
    assert quantize(out, "reference") == 0
    assert read_json(out / "reference" / "maxabs_quant_g3.json")["blocklist"]["types"] == FIELD_TYPES


def test_what_the_other_preset_did_not_measure(out: Path, capsys: pytest.CaptureFixture) -> None:
    """The reference does not measure Mixtral's attention: the error has the command that does, which then works."""
    assert quantize(out, "reference", "--preset", "field") == 1
    fix = capsys.readouterr().err.partition("fix:   measure again: ")[2].splitlines()[0]
    assert fix.startswith("gaudi-calib calibrate ") and fix.endswith("--preset field")
    good = read_manifest(out / "reference" / "g3" / MANIFEST_NAME).good
    assert good is not None and good.preset.name == "reference"
    assert run(*fix.split()[1:]) == 0
    assert quantize(out, "reference", "--preset", "field") == 0


def test_configs_and_methods_that_are_given_win(out: Path, capsys: pytest.CaptureFixture) -> None:
    """--config-quant and --scale-method say what is written; the variables are still the preset's."""
    mine = out / "mine.json"
    mine.write_text(json.dumps({**read_json(out / "field" / "maxabs_quant_g3.json"), "scale_format": "scalar"}))
    words = ("--preset", "field", "--config-quant", mine)
    assert measure(out, "given", *words, command="calibrate") == 0
    assert read_json(out / "given" / "maxabs_quant_g3.json")["scale_format"] == "scalar"
    assert "VLLM_DISABLE_MARK_SCALES_AS_CONST=true vllm serve" in capsys.readouterr().out


def test_measuring_in_vain_is_told(out: Path, capfd: pytest.CaptureFixture) -> None:
    """Where the config that serves takes no ranges, `measure` says so; else not."""
    assert measure(out, "field") == 0
    assert "will need no ranges" not in capfd.readouterr().err
    assert quantize(out, "field", "--scale-method", "unit_scale") == 0
    assert measure(out, "field") == 0
    assert "maxabs_quant_g3.json will need no ranges" in capfd.readouterr().err


def test_a_directory_has_no_preset(out: Path, capsys: pytest.CaptureFixture) -> None:
    """`quantize DIR` goes by the config in place, and says so."""
    assert run("quantize", out / "field" / "g3", "--preset", "field") == 2
    assert "--preset goes with a run" in capsys.readouterr().err


def test_a_known_failure_is_told_once(tiny_model: Any, out: Path, capfd: pytest.CaptureFixture) -> None:
    """By the reference's settings: what happens, where that was reported, what to give; by the field's: nothing."""
    words = ("-m", tiny_model("qwen3"), "-o", out, "-d", out / "prompts.jsonl", "--engine", "torch")
    for command, more in (("calibrate", ()), ("measure", ()), ("calibrate", ("--dry-run",))):
        assert run(command, *words, *more) == 0
        told = [line for line in capfd.readouterr().err.splitlines() if "vllm-hpu-extension#357" in line]
        assert len(told) == 1 and "in FP8" in told[0] and "--preset field" in told[0]
    assert run("quantize", "-m", tiny_model("qwen3"), "-o", out) == 0
    assert "vllm-hpu-extension#357" in capfd.readouterr().err
    assert run("calibrate", *words, "--preset", "field") == 0
    assert measure(out, "reference") == 0
    assert "vllm-hpu-extension" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the facts of Qwen2-7B, and little more."""
    facts = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2}
    return make_tiny_model("qwen2", tmp_path_factory.mktemp("biased") / "model", **facts, **heads)


def test_unit_scales_need_no_measurement(biased: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Nothing is measured and that is said; the variable is served, from another place, too."""
    words = ("-m", biased, "-o", tmp_path / "out", "-d", tmp_path / "none.jsonl", "--engine", "torch", "--device", "g3")
    assert run("calibrate", *words, "--preset", "field") == 0
    printed = capfd.readouterr()
    assert "needs no measurement" in printed.err and "VLLM_FP32_SOFTMAX=true vllm serve" in printed.out
    (tmp_path / "out").rename(tmp_path / "moved")
    config = tmp_path / "moved" / "model" / "maxabs_quant_g3.json"
    assert read_json(config)["scale_method"] == "unit_scale"
    served = print_serve(config, biased, capfd)
    assert "VLLM_FP32_SOFTMAX=true" in served and f"QUANT_CONFIG={config}" in served
    shutil.rmtree(config.parent / "g3")
    assert "VLLM_FP32_SOFTMAX" not in print_serve(config, biased, capfd)
