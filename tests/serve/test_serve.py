"""`serve`: what is checked before vLLM starts, and the command. No server starts here."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.engines.detect import Platform
from gaudi_calib.errors import CalibrationError, ConfigError, FileError, ModelError, TopologyError, UsageError
from gaudi_calib.models.source import ModelSource, find_model
from gaudi_calib.serve.command import ServeCommand, ServeOptions, plan_serve
from tests.support import paths
from tests.support.calibrated import CPU, HPU2, HPU3, MODEL, Calibrated, calibrate_by_torch
from tests.support.processes import run_cli

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Calibrated:
    return calibrate_by_torch(MODEL, tmp_path_factory.mktemp("out"))


@pytest.fixture
def run(pristine, tmp_path) -> Calibrated:
    """A copy whose configs point to its own files."""
    root = tmp_path / "out" / "model"
    shutil.copytree(pristine.root, root)
    for path in root.glob("maxabs_*.json"):
        path.write_text(path.read_text().replace(str(pristine.root), str(root)))
    return Calibrated(root, MODEL)


@pytest.mark.parametrize(
    ("device", "platform", "world", "flags", "env"),
    [
        ("g3", HPU3, 1, "--quantization inc --kv-cache-dtype fp8_inc --dtype bfloat16 --tensor-parallel-size 1", {}),
        (
            "g2", HPU2, 2, "--quantization inc --kv-cache-dtype fp8_inc --dtype bfloat16 --tensor-parallel-size 2",
            {"PT_HPU_ENABLE_LAZY_COLLECTIVES": "true"},
        ),
        ("g2", Platform("cuda"), 1,
         "--quantization gaudi_fp8 --enforce-eager --dtype bfloat16 --tensor-parallel-size 1", {}),
    ],
    ids=["g3", "g2-tp2", "cuda"],
)  # fmt: skip
def test_the_command(device, platform, world, flags, env, run):
    """INC on a Gaudi, our plugin elsewhere; QUANT_CONFIG and the other variables are set."""
    command = run.plan(device, platform, world=world, port=8001, extra=("--max-model-len", "4096"))
    words = ["vllm", "serve", str(MODEL), *flags.split(), "--port", "8001", "--max-model-len", "4096"]
    assert list(command.argv) == words
    assert command.env == {"QUANT_CONFIG": str(run.config(device)), **env}


def test_sixteen_ranks_span_two_nodes(tmp_path):
    """Beyond one node Ray holds the ranks, and gets the variables that vLLM would not hand on by itself."""
    config = tmp_path / "quant.json"
    config.write_text(json.dumps({"mode": "QUANTIZE", "scale_method": "unit_scale"}))
    command = plan_serve(ServeOptions(str(MODEL), config, world=16), HPU2)
    flags = "--quantization inc --kv-cache-dtype fp8_inc --dtype bfloat16 --tensor-parallel-size 16"
    more = ["--distributed-executor-backend", "ray", "--port", "8000"]
    assert list(command.argv) == ["vllm", "serve", str(MODEL), *flags.split(), *more]
    assert command.env == {
        "QUANT_CONFIG": str(config),
        "PT_HPU_ENABLE_LAZY_COLLECTIVES": "true",
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "QUANT_CONFIG,PT_HPU_ENABLE_LAZY_COLLECTIVES",
    }


def test_elsewhere_it_says_that_it_emulates(run):
    """Nobody takes the emulation's speed for the Gaudi's."""
    note = run.plan("g2", CPU).note
    assert "no Gaudi" in note and "Gaudi 2" in note and "gaudi_fp8" in note


def test_options_become_variables(run):
    """--timeout in seconds and milliseconds, for older and newer vLLM; --skip-warmup."""
    command = run.plan(timeout_s=600, skip_warmup=True)
    assert command.env == {
        "QUANT_CONFIG": str(run.config("g3")),
        "VLLM_SKIP_WARMUP": "true",
        "VLLM_ENGINE_ITERATION_TIMEOUT_S": "600",
        "VLLM_RPC_TIMEOUT": "600000",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "600",
        "VLLM_ENGINE_READY_TIMEOUT_S": "600",
    }


@pytest.mark.vllm
def test_newer_vllm_reads_these_variables():
    """vLLM of today knows two of the four timeouts; the others are those of older releases."""
    envs = pytest.importorskip("vllm.envs")
    assert {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_ENGINE_READY_TIMEOUT_S"} <= set(envs.environment_variables)


def test_blocked_caches_stay_bf16(tmp_path):
    """Without quantized caches fp8_inc would be wrong: it is left out where the blocklist covers them."""
    config = tmp_path / "quant.json"
    config.write_text(json.dumps({"mode": "QUANTIZE", "scale_method": "unit_scale",
                                  "blocklist": {"types": [], "names": ["self_attn"]}}))  # fmt: skip
    argv = plan_serve(ServeOptions(str(MODEL), config), HPU3).argv
    assert "inc" in argv and "fp8_inc" not in argv


def expert_run(make: Callable[[str], Path], checkpoint: str, tmp_path: Path, **changes) -> Calibrated:
    return calibrate_by_torch(make(checkpoint), tmp_path, cold_experts="ignore", **changes)


def test_experts_are_shared_as_the_files_were_made(tiny_model, tmp_path):
    """Expert parallelism is a fact of the files; asking for the other way is refused."""
    made = expert_run(tiny_model, "mixtral", tmp_path, expert_parallel=True)
    assert "--enable-expert-parallel" in made.plan(world=2).argv
    assert "--enable-expert-parallel" not in made.plan(world=1).argv
    assert "fp8_inc" not in made.plan().argv
    with pytest.raises(TopologyError, match="whole experts") as caught:
        made.plan(world=2, expert_parallel=False)
    assert "gaudi-calib reshard" in caught.value.fix and "--no-expert-parallel" in caught.value.fix


def test_patterns_that_match_nothing(tiny_model, tmp_path, capsys):
    """They are reported; one that blocked a module when it was measured is none of them."""
    made = expert_run(tiny_model, "mixtral", tmp_path)
    assert made.plan().warnings == ()
    content = json.loads(made.config("g3").read_text())
    content["blocklist"]["names"] += ["lm_haed", r"layers\.0\..*w2_list"]
    made.config("g3").write_text(json.dumps(content))
    words = ["serve", "-m", str(made.model), "--quant-config", str(made.config("g3")), "--print", "--device", "g3"]
    assert main(words) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning")]
    assert (
        warning == f"Warning: pattern 'lm_haed' matches no node of the model (blocklist.names in {made.config('g3')})"
    )


def remove(pattern: str) -> Callable[[Calibrated], None]:
    def damage(run: Calibrated) -> None:
        for path in (run.root / "g3").glob(pattern):
            path.unlink()

    return damage


def change_ranges(run: Calibrated) -> None:
    source, target = (run.root / "g3" / f"inc_output_hooks_maxabs_{rank}_2.npz" for rank in (0, 1))
    shutil.copy(source, target)


def break_config(run: Calibrated) -> None:
    run.config("g3").write_text("{mode:")


def measuring_config(run: Calibrated) -> None:
    shutil.copy(run.root / "maxabs_measure_g3.json", run.config("g3"))


def change_backoff(run: Calibrated) -> None:
    content = json.loads(run.config("g3").read_text())
    run.config("g3").write_text(json.dumps({**content, "scale_params": {"input_backoff": 0.5}}))


def fail_calibration(run: Calibrated) -> None:
    path = run.root / "g3" / "calibration_manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "status": "failed", "error": "disk full", "last_good": None,
                                "command": ["/usr/bin/gaudi-calib", "calibrate", "-m", "a model"]}))  # fmt: skip


def move_away(run: Calibrated) -> None:
    (run.root / "g3").rename(run.root / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "kind", "what", "fix"),
    [
        (remove("inc_output_hooks_maxabs_1_2.npz"), FileError, "ranges of a rank are missing", "quantize"),
        (remove("*MAXABS_HW_1_2.npz"), FileError, "scales of a rank are missing: .*HW_1_2.npz", "quantize"),
        (remove("*_2.npz"), FileError, "no files for 2 ranks", "quantize .* -t 2 .*serve with -t 1"),
        (remove("*_2.*"), FileError, "no files for 2 ranks", "reshard .*model -t 2 .*serve with -t 1"),
        (change_ranges, FileError, "maxabs_1_2.npz is not the file that the run wrote", "reshard .*model -t 2"),
        (change_backoff, FileError, "stale", "quantize"),
        (break_config, ConfigError, r"not valid JSON \(line 1, column 2\)", "correct that line"),
        (measuring_config, ConfigError, "its mode is MEASURE", "maxabs_quant_"),
        (fail_calibration, FileError, "did not finish", "gaudi-calib calibrate -m 'a model'$"),
        (move_away, FileError, "directory of ranges and scales", "copy g3 beside .*maxabs_quant_g3.json"),
        (lambda run: run.config("g3").unlink(), ConfigError, "cannot read", "QUANT_CONFIG"),
    ],
    ids=["ranges", "scales", "npz", "world", "stale", "settings", "json", "measure", "failed", "moved", "absent"],
)
def test_a_broken_calibration_is_refused(damage, kind, what, fix, run):
    """Each is told before vLLM starts, with what to run."""
    damage(run)
    with pytest.raises(kind, match=what) as caught:
        run.plan(world=2)
    assert re.search(fix, caught.value.fix)


def test_another_number_of_ranks(run, capsys):
    """The fix names `reshard`, and what it prints works."""
    words = ["serve", "-m", str(MODEL), "--quant-config", str(run.config("g3")), "-t", "4", "--print", "--device", "g3"]
    assert main(words) == 1
    fix = capsys.readouterr().err.partition("fix:")[2].partition(";")[0]
    for command in fix.split("&&"):
        assert main(command.split()[1:]) == 0
    capsys.readouterr()
    assert main(words) == 0
    assert "--tensor-parallel-size 4" in capsys.readouterr().out


def test_files_of_the_other_device(run):
    """Gaudi 2 scales do not serve on Gaudi 3, nor where Gaudi 3 is asked for."""
    for plan in (lambda: run.plan("g2", HPU3), lambda: run.plan("g2", CPU, device="g3")):
        with pytest.raises(FileError, match="files are for g2, and g3") as caught:
            plan()
        assert "maxabs_quant_g3.json" in caught.value.fix


def test_another_checkpoint(run, tmp_path):
    """A model of the same shape that was not measured is refused by its fingerprint."""
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2:] = b"\x00\x00"
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="another checkpoint"):
        run.plan(model=str(other))


def test_files_of_the_reference_have_no_manifest(run, caplog):
    """What `calibrate_model.sh` left is served, saying what could not be checked."""
    (run.root / "g3" / "calibration_manifest.json").unlink()
    assert "inc" in run.plan(world=2).argv
    assert "are not checked" in caplog.text


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
    ],
    ids=["awq", "gptq", "compressed-tensors", "fp8"],
)
def test_quantized_checkpoints_keep_their_method(quantization, method, tmp_path):
    """vLLM finds the method in config.json; nothing else is asked for."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    assert find_model(str(tmp_path)).method == method
    command = plan_serve(ServeOptions(str(tmp_path), world=2), HPU3)
    assert list(command.argv) == ["vllm", "serve", str(tmp_path), "--tensor-parallel-size", "2", "--port", "8000"]
    assert command.env == {} and method in command.note


@pytest.mark.parametrize(
    ("quantization", "env"),
    [
        ({"quant_method": "fp8"}, {"VLLM_SCALE_ADJUSTMENT": "0"}),
        ({"quant_method": "compressed-tensors", "fp8_dtype_flavor": "float8_e4m3fnuz"}, {}),
    ],
    ids=["fp8", "flavored"],
)
def test_weights_that_were_halved_for_gaudi_2_stay(quantization, env, tmp_path):
    """`convert-weights` left its record; vllm-gaudi would halve them again where config.json cannot say so."""
    config = {"model_type": "llama", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_serve(ServeOptions(str(tmp_path)), HPU2).env == {}
    (tmp_path / "gaudi2_conversion.json").write_text("{}")
    assert plan_serve(ServeOptions(str(tmp_path)), HPU2).env == env
    assert "VLLM_SCALE_ADJUSTMENT" not in plan_serve(ServeOptions(str(tmp_path)), CPU).env


def test_what_quant_config_cannot_quantize(run, tmp_path):
    """AWQ weights are not quantized again; FP8 weights are, by INC alone, without `--quantization inc`."""
    model = ModelSource("m", None, {"quantization_config": {"quant_method": "awq"}})
    assert not model.can_requantize
    config = json.loads((MODEL / "config.json").read_text())
    unit = tmp_path / "unit.json"
    unit.write_text(json.dumps({"mode": "QUANTIZE", "scale_method": "unit_scale"}))
    for method in ("awq", "fp8"):
        directory = tmp_path / method
        directory.mkdir()
        blocks = {"quant_method": method, "weight_block_size": [128, 128]}
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": blocks}))
    with pytest.raises(ModelError, match="quantized with awq"):
        plan_serve(ServeOptions(str(tmp_path / "awq"), unit), HPU3)
    command = plan_serve(ServeOptions(str(tmp_path / "fp8"), unit), HPU3)
    assert "--quantization" not in command.argv and "fp8_inc" in command.argv
    assert command.env["VLLM_HPU_FORCE_CHANNEL_FP8"] == "0"
    with pytest.raises(ModelError, match="cannot be emulated"):
        plan_serve(ServeOptions(str(tmp_path / "fp8"), unit), CPU)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"quant_config": None}, "no --quant-config"),
        ({"extra": ("--tensor-parallel-size=4",)}, "--tensor-parallel-size 4 contradicts"),
        ({"extra": ("--quantization", "fp8")}, "--quantization fp8 contradicts .* is inc"),
    ],
    ids=["nothing", "world", "method"],
)
def test_contradictions(changes, what, run):
    """Options that would undo what was checked are refused."""
    with pytest.raises(UsageError, match=what):
        run.plan(**changes)


def test_online_fp8(run):
    """A BF16 checkpoint is served with a method of vLLM's when that is asked for."""
    argv = run.plan(quant_config=None, extra=("--quantization", "fp8")).argv
    assert argv[-2:] == ("--quantization", "fp8") and "inc" not in argv


def test_no_such_model():
    """A path that is not there is no hub name."""
    with pytest.raises(ModelError, match="no model directory"):
        find_model("./no/such/model")


def test_a_hub_model_that_is_not_downloaded(tiny_model, tmp_path, monkeypatch, caplog):
    """Its config.json says how to serve it; where not even that can be had, the manifest does, and it is said."""
    made = expert_run(tiny_model, "granitemoehybrid", tmp_path)
    environment = {"QUANT_CONFIG": str(made.config("g3")), "VLLM_CONTIGUOUS_PA": "false"}
    assert made.plan(model="nobody/has-this").env == environment
    assert "config.json of nobody/has-this could not be downloaded" in caplog.text
    assert "is not downloaded: whether it is the model that was measured is not checked" in caplog.text
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(made.model / "config.json"))
    assert find_model("nobody/has-this").directory == made.model


def test_a_port_in_use(run):
    """Told before vLLM loads a model, with exit code 1."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_cli("serve", "-m", MODEL, "--quant-config", run.config("g3"), "--port", port, timeout=60)
    assert done.returncode == 1
    assert f"Error: port {port} cannot be used" in done.stderr and "--port" in done.stderr


def test_print_is_what_a_shell_runs(run, capsys, monkeypatch):
    """One line with everything quoted; nothing is started, and no port is needed."""
    config = run.root / "a config.json"
    shutil.copy(run.config("g2"), config)
    words = [
        "-m",
        str(MODEL),
        "--quant-config",
        str(config),
        "--device",
        "g2",
        "-t",
        "2",
        "--print",
        "--",
        "--foo",
        "a b",
    ]
    assert main(["serve", *words]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"QUANT_CONFIG='{config}' PT_HPU_ENABLE_LAZY_COLLECTIVES=true vllm serve ")
    assert line.endswith("--foo 'a b'") and "\n" not in line


def test_vllm_is_not_installed(run, monkeypatch):
    """The error says what to install."""
    from gaudi_calib.serve import command

    monkeypatch.setattr(command.shutil, "which", lambda *_, **__: None)
    with pytest.raises(CalibrationError, match="vLLM is not installed"):
        command.run_serve(ServeCommand(("vllm",), {}, ""), 0)


def test_importing_the_package_loads_nothing():
    """`import gaudi_calib` is instant; `open_llm` is found when it is used, and other names are not."""
    script = (
        "import sys, gaudi_calib\n"
        "heavy = {'torch', 'vllm', 'numpy', 'pydantic', 'click', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert callable(gaudi_calib.open_llm)\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(gaudi_calib, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_showing_a_command_loads_no_torch(run):
    """The modules of the model are planned from names and headers; no weight is read."""
    words = ["serve", "-m", str(MODEL), "--quant-config", str(run.config("g3")), "--print"]
    script = (
        "import sys\n"
        "from gaudi_calib.cli.main import main\n"
        f"assert main({words!r}) == 0\n"
        "assert 'gaudi_calib.checkpoints.plan' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=paths.ROOT)
