"""The whole run, and what happens when it goes wrong: through the command line, stopped, on a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gaudi_calib.cli.main import main
from gaudi_calib.data.prompts import prepare_prompts
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, ModelError, UsageError
from gaudi_calib.layout import MANIFEST_NAME, parse_rank_file
from gaudi_calib.manifest import read_manifest
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.rankfiles.store import read_ranges, read_scales
from gaudi_calib.runs.calibrate import calibrate, list_files, measure, quantize
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.postprocess import postprocess_dir
from gaudi_calib.runs.unify import unify_dir
from gaudi_calib.serve.command import ServeOptions, plan_on_gaudi
from tests.support import paths
from tests.support.files import snapshot, write_prompts
from tests.support.processes import run_cli, start_cli
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch

GOLDEN = paths.GOLDEN / "llama-tiny"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The prompts and continuations of the golden run, as token ids: no tokenizer is needed."""
    tokens = json.loads((GOLDEN / "tp1" / "tokens.json").read_text())
    pairs = zip(tokens["prompt_token_ids"], tokens["generated_token_ids"], strict=True)
    return write_prompts(tmp_path, ([*ids, *more[:-1]] for ids, more in pairs))


def options(data: Path, **changes) -> RunOptions:
    facts = {"model": str(GOLDEN / "model"), "out": data.parent / "out", "dataset": {"dataset": str(data)}}
    return RunOptions(**{**facts, **changes})


def run(*words: object) -> int:
    """Run a command in this process and return its exit code."""
    return main([*map(str, words)])


def serve(result, *, world: int):
    """The command that serves what a run made, on a Gaudi 3."""
    return plan_on_gaudi(ServeOptions(str(GOLDEN / "model"), result.quant_configs["g3"], world, "g3"))


def snapshot_results(directory: Path) -> dict[str, bytes]:
    """Return the content of every file but the manifests, which tell of each try."""
    return snapshot(directory, skipped=[MANIFEST_NAME])


@pytest.mark.parametrize(("device", "world"), [("g2", 1), ("g3", 1), ("g2", 2)])
def test_run_has_the_structure_of_real_files(device: str, world: int, dataset: Path):
    """Names, order, modules, structure and (but for sampled or decode-only nodes) values are those of a real run."""
    golden = GOLDEN / f"tp{world}" / device
    result = calibrate(options(dataset, world=world, devices=(device,)))
    ours = result.root / device
    for path in golden.iterdir():
        assert (ours / path.name).is_file(), path.name
    for rank in range(world):
        name = f"inc_output_hooks_maxabs_{rank}_{world}"
        for suffix in ("", "_mod_list"):
            written, real = (json.loads((one / f"{name}{suffix}.json").read_text()) for one in (ours, golden))
            if suffix:
                assert written == real
        measured, real = (read_ranges(one / f"{name}.json") for one in (ours, golden))
        assert list(measured.nodes) == list(real.nodes)
        for node, expected in real.nodes.items():
            _compare_ranges(node, measured.nodes[node], expected)
        scales, expected_scales = (
            read_scales(one / f"inc_output_hooks_maxabs_MAXABS_HW_{rank}_{world}.json") for one in (ours, golden)
        )
        assert list(scales.nodes) == list(expected_scales.nodes)


def _compare_ranges(name: str, measured, expected):
    """Same shape everywhere; values within bf16 noise, except that more positions can only be larger."""
    assert len(measured.inputs) == len(expected.inputs)
    assert (measured.outputs is None) == (expected.outputs is None)
    assert measured.outputs is None or len(measured.outputs) == len(expected.outputs)
    if expected.weight is not None:
        assert measured.weight == expected.weight
    sampled = any(part in name for part in ("matmul", "lm_head", "fused_scaled"))
    for ours, theirs in zip(measured.inputs, expected.inputs, strict=True):
        assert ours[0] >= theirs[0] * 0.97, name
        assert sampled or ours[0] == pytest.approx(theirs[0], rel=0.03), name
    if expected.weight is not None and expected.outputs is not None:
        assert measured.outputs[0][0] == pytest.approx(expected.outputs[0][0], rel=0.03), name


def test_scales_of_a_run_are_those_of_a_gaudi(dataset: Path):
    """Ranges times a rounded reciprocal; some of them are not what INC on a CPU, which divides, gives."""
    root = calibrate(options(dataset, devices=("g2",), scale_method="maxabs_arbitrary")).root / "g2"
    ranges, scales = (
        read(root / f"inc_output_hooks_maxabs_{tag}0_1.json").nodes
        for read, tag in ((read_ranges, ""), (read_scales, "MAXABS_ARBITRARY_"))
    )
    caches = [name for name in ranges if name.endswith("_cache")]
    measured = np.array([ranges[name].inputs[0][0] for name in caches])
    written = np.array([scales[name].inputs[0] for name in caches], dtype=np.float32)
    np.testing.assert_array_equal(written, round_to_bf16(measured * round_to_bf16(1 / 60)))
    assert (written != round_to_bf16(measured / 60)).any()


def test_one_measurement_serves_both_devices_and_several_worlds(dataset: Path):
    """`-t 2 -r 1` writes two worlds for two devices, fresh, recorded, and nothing else."""
    wanted = options(dataset, world=2, unified_world=1)
    expected = sorted(list_files(wanted))
    result = calibrate(wanted)
    found = sorted(path for path in result.root.rglob("*") if path.is_file())
    assert found == expected
    for device in ("g2", "g3"):
        manifest = read_manifest(result.root / device / "calibration_manifest.json")
        assert (manifest.status, list(manifest.worlds), manifest.dataset.prompts) == ("ok", [1, 2], 3)
        assert list(manifest.timings_s) == ["prepare", "measure_model", "derive_ranks", "quantize"]
        assert CalibrationDir(result.root / device).find_stale() == []
        config = json.loads(result.quant_configs[device].read_text())
        assert config["dump_stats_path"] == str(result.root / device / "inc_output")
    g2, g3 = (
        read_scales(result.root / device / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json").nodes
        for device in ("g2", "g3")
    )
    assert {scale for node in g2.values() for scale in node.inputs} <= {2.0**-8, 2.0**-4, 1.0, 2.0**4}
    assert g2 != g3


def test_the_manifest_names_every_dataset(dataset: Path):
    """Several datasets are recorded with their weights and what each gave, and how many rows were left out."""
    other = write_prompts(dataset.parent / "other.jsonl", [[1, 2, 3], [4, 5], [10**6]])
    given = {"dataset": [f"{dataset}=1", f"{other}=2"], "skip_bad_rows": 1}
    root = measure(options(dataset, dataset=given, devices=("g3",))).root
    facts = read_manifest(root / "g3" / "calibration_manifest.json").dataset
    prompts = prepare_prompts(str(GOLDEN / "model"), **given)
    assert (facts.name, facts.hash, facts.skipped) == (f"{dataset}=1, {other}=2", prompts.sha256, 1)
    assert [(share.name, share.weight, share.prompts) for share in facts.shares] == [
        (str(dataset), 1, 1),
        (str(other), 2, 2),
    ]
    assert facts.tokens == sum(share.tokens for share in facts.shares)
    root = measure(options(dataset, devices=("g3",))).root
    facts = read_manifest(root / "g3" / "calibration_manifest.json").dataset
    assert (facts.name, facts.prompts, facts.shares, facts.skipped) == (str(dataset), 3, [], 0)


def test_a_dry_run_refuses_what_is_no_weight(dataset: Path, capsys: pytest.CaptureFixture):
    """Datasets and weights are checked before anything is read; several datasets change no file name."""
    words = ["calibrate", "-m", GOLDEN / "model", "-o", dataset.parent / "out", "--dry-run", "-d", dataset]
    assert run(*words) == 0
    files = capsys.readouterr().out
    assert run(*words, "-d", "builtin") == 0
    assert capsys.readouterr().out == files
    assert run(*words, "-d", "builtin=none") == 2
    assert "the weight of dataset builtin is 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "hp_dtype"), [(None, None), ("bfloat16", None), ("float16", "FP16"), ("float32", "FP32")]
)
def test_the_served_dtype_reaches_everything(dtype: str | None, hp_dtype: str | None, dataset: Path):
    """Both configs, the manifest, the serve command, and what quantize makes later; bfloat16 is INC's default."""
    result = calibrate(options(dataset, devices=("g3",), dtype=dtype))
    made = (result.root / "maxabs_measure_g3.json", result.quant_configs["g3"])
    assert [json.loads(path.read_text()).get("hp_dtype") for path in made] == [hp_dtype, hp_dtype]
    manifest = read_manifest(result.root / "g3" / MANIFEST_NAME)
    assert manifest.dtype == (dtype or "bfloat16")
    assert {origin.settings["hp_dtype"] for origin in manifest.scales.values()} == {hp_dtype or "BF16"}
    assert any("vllm-gaudi serves every model in bfloat16" in text for text in result.warnings) == bool(hp_dtype)
    later = quantize(options(dataset, devices=("g3",), world=2))
    assert json.loads(later.quant_configs["g3"].read_text()).get("hp_dtype") == hp_dtype
    words = serve(later, world=2).argv
    assert words[words.index("--dtype") + 1] == (dtype or "bfloat16")


def test_an_hp_dtype_that_is_not_kept_is_told(dataset: Path, caplog: pytest.LogCaptureFixture):
    """Ranges of a bfloat16 model give its scales, whatever somebody wrote into the run's config since."""
    path = calibrate(options(dataset, devices=("g3",))).quant_configs["g3"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "hp_dtype": "fp16"}))
    quantize(options(dataset, devices=("g3",)))
    assert f"hp_dtype of {path} becomes BF16" in caplog.text


def test_dtypes_that_contradict_each_other_are_refused(dataset: Path, tmp_path: Path):
    """An option against a user's config of either phase, and against what was measured; both are named."""
    config = tmp_path / "quant.json"
    config.write_text(json.dumps({"mode": "QUANTIZE", "hp_dtype": "fp16", "dump_stats_path": "x/inc"}))
    with pytest.raises(ConfigError, match="hp_dtype is FP16, and the model is served in bfloat16"):
        calibrate(options(dataset, quant_config=config))
    config.write_text(json.dumps({"mode": "MEASURE", "dump_stats_path": "x/inc"}))
    with pytest.raises(ConfigError, match="hp_dtype is BF16, and the model is served in float16"):
        calibrate(options(dataset, measure_config=config, dtype="float16"))
    with pytest.raises(ConfigError, match="maxabs_hw_opt_weight is computed for bfloat16 only"):
        calibrate(options(dataset, scale_method="maxabs_hw_opt_weight", dtype="float16", dataset={}))
    measure(options(dataset, dtype="float16"))
    with pytest.raises(UsageError, match="--dtype bfloat16, and the ranges were measured for float16"):
        quantize(options(dataset, dtype="bfloat16"))


def test_ranges_that_make_bad_scales_are_told_once(dataset: Path, tmp_path: Path):
    """A weight of zeros for both devices alike; a weight beyond the largest free scale for Gaudi 2 alone."""
    model = make_tiny_model("llama", tmp_path / "model", tokenizer=False)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    tensors["lm_head.weight"][0, 0] = 5000.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = calibrate(options(dataset, model=str(model), world=2, unified_world=1))
    zero, saturated = (text for text in result.warnings if text.startswith("ranges "))
    node = "model.layers.1.self_attn.o_proj"
    assert zero.startswith(f"ranges of 0: 2 ({node} outputs[0], {node} weight)")
    assert saturated.startswith("ranges beyond 3840, the most that g2 scales at no cost: 1 (lm_head weight)")


def test_quantize_adds_worlds_and_methods_later(dataset: Path):
    """A world that was not written is derived from the channel ranges; earlier files stay."""
    root = measure(options(dataset, world=2)).root
    assert CalibrationDir(root / "g3").worlds == {
        2: {rank: root / f"g3/inc_output_hooks_maxabs_{rank}_2.json" for rank in (0, 1)}
    }
    before = snapshot_results(root)
    method = "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2"
    result = quantize(options(dataset, world=4, scale_method=method.lower()))
    assert before.items() <= snapshot_results(root).items()
    assert serve(result, world=4).env["RUNTIME_SCALE_PATCHING"] == "0"
    assert len(CalibrationDir(root / "g3").list_scales(4, method)) == 4 * 2
    weight = (
        read_scales(root / f"g3/inc_output_hooks_maxabs_{method}_1_4.json").nodes["model.layers.0.mlp.down_proj"].weight
    )
    assert weight.out_channels.shape == (256,) and weight.in_channels.shape == (128,)
    assert read_manifest(root / "g3/calibration_manifest.json").history[0].command


def test_scales_are_not_computed_for_another_checkpoint(dataset: Path, tmp_path: Path):
    """Weights that changed since the measurement, under the same path, are noticed; the files stay."""
    directory = make_tiny_model("llama", tmp_path / "model")
    root = measure(options(dataset, model=str(directory), devices=("g3",))).root
    before = snapshot_results(root)
    make_tiny_model("llama", tmp_path / "other", seed=1)
    os.replace(tmp_path / "other/model.safetensors", directory / "model.safetensors")
    with pytest.raises(ModelError, match="measured on another checkpoint"):
        quantize(options(dataset, model=str(directory), devices=("g3",)))
    assert snapshot_results(root) == before


@pytest.mark.parametrize("method", ["unit_scale", "maxabs_pcs_pow2"])
def test_methods_without_measurement_need_no_data(method: str, dataset: Path):
    """Fixed and dynamic scales get a QUANT_CONFIG only; the dataset is not even read."""
    result = calibrate(options(dataset, scale_method=method, dataset={"dataset": "missing.jsonl"}))
    config = json.loads(result.quant_configs["g3"].read_text())
    assert config["scale_method"] == method
    assert config.get("dynamic_quantization", False) == (method == "maxabs_pcs_pow2")
    assert not list(result.root.rglob("*_hooks_*"))


def test_blocklist_of_a_custom_config_is_obeyed(dataset: Path, tmp_path: Path):
    """Blocked nodes are in neither ranges, module list nor scales; a pattern that matches nothing is reported."""
    config = tmp_path / "measure.json"
    lists = {"blocklist": {"types": [], "names": ["self_attn", "no_such"]}, "dump_stats_path": "x/inc"}
    config.write_text(json.dumps({"mode": "MEASURE", "observer": "maxabs", **lists}))
    result = measure(options(dataset, measure_config=config, devices=("g2",)))
    (ranges,) = CalibrationDir(result.root / "g2").read_world(1)
    assert sorted({name.split(".")[3] for name in ranges.modules if "layers" in name}) == ["mlp"]
    assert list(ranges.nodes) == list(ranges.modules)
    assert any("'no_such' matches no node" in warning for warning in result.warnings)


def test_postprocess_is_idempotent_and_equals_the_reference(tmp_path: Path):
    """Cache ranges reach the attention matmuls, in place or elsewhere, once or twice."""
    out = tmp_path / "once"
    postprocess_dir(GOLDEN / "tp1/g2", out)
    ours, reference = (
        read_ranges(path / "inc_output_hooks_maxabs_0_1.json") for path in (out, GOLDEN / "postprocessed")
    )
    assert repr(ours.nodes) == repr(dict(reference.nodes))
    before = snapshot_results(out)
    postprocess_dir(out, out)
    assert snapshot_results(out) == before


def test_unify_takes_the_maximum_over_ranks(tmp_path: Path):
    """Two ranks into one: elementwise maximum, and a module list so that it can be unified again."""
    written = unify_dir(GOLDEN / "tp2/g2", 1, tmp_path)
    assert sorted(path.name for path in written) == sorted(
        f"inc_output_hooks_maxabs_{end}"
        for end in ("0_1.json", "0_1.npz", "0_1_mod_list.json", "MAXABS_HW_0_1.json", "MAXABS_HW_0_1.npz")
    )
    first, second = CalibrationDir(GOLDEN / "tp2/g2").read_world(2)
    (merged,) = CalibrationDir(tmp_path).read_world(1)
    assert merged.modules == first.modules
    for name, node in merged.nodes.items():
        pairs = zip(node.inputs, first.nodes[name].inputs, second.nodes[name].inputs, strict=True)
        assert all(one == np.maximum(left, right) for one, left, right in pairs)


def test_expand_is_undone_by_unify(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Every rank gets the whole's ranges, and their maximum is the whole's again; the files keep their name."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (GOLDEN / "tp1/g3").glob("inc_output_hooks_maxabs_0_1*"):
        (source / path.name.replace("inc_output", "mine")).write_bytes(path.read_bytes())
    assert run("expand", "-m", source, "-w", 4, "-o", tmp_path / "four") == 0
    assert run("unify", "-m", tmp_path / "four", "-r", 1, "-o", tmp_path / "one") == 0
    before, after = (read_ranges(one / "mine_hooks_maxabs_0_1.json") for one in (source, tmp_path / "one"))
    assert repr(after) == repr(before)
    assert run("expand", "-m", tmp_path / "four", "-w", 8) == 1
    assert "no ranges of rank 0 of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "inc_output_hooks_maxabs_1_2.json").unlink(), "no ranges of rank 1 of 2"),
        (lambda d: _change(d, lambda nodes: nodes.popitem()), "has no node 'lm_head'"),
        (
            lambda d: _change(d, lambda nodes: nodes["lm_head"].update(inputs=[[[float("nan")]]])),
            "not finite on rank 1",
        ),
        (lambda d: _change(d, lambda nodes: nodes["lm_head"]["inputs"].append([[1.0]])), "different number of inputs"),
    ],
    ids=["missing rank", "missing node", "nan", "another shape"],
)
def test_unify_refuses_ranks_that_do_not_fit(damage, message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A gap on any rank is an error that names it, and nothing is written."""
    source = tmp_path / "in"
    source.mkdir()
    for path in (GOLDEN / "tp2/g2").glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    damage(source)
    assert run("unify", "-m", source, "-r", 1, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and "fix:" in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def _change(directory: Path, change: Callable):
    path = directory / "inc_output_hooks_maxabs_1_2.json"
    value = json.loads(path.read_text())
    change(value["Nodes"])
    path.write_text(json.dumps(value))


def _bad_inputs(dataset: Path) -> dict[str, tuple[Sequence[object], int, str]]:
    """Words that replace the good ones, the exit code and what the message says."""
    tmp = dataset.parent
    lines = dataset.read_text().splitlines()
    write_prompts(tmp / "long.jsonl", [[1] * 3000])
    (tmp / "columns.jsonl").write_text('{"question_text": "why?"}\n')
    (tmp / "empty.jsonl").write_text("")
    (tmp / "broken.jsonl").write_text(lines[0] + "\n{\n")
    (tmp / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    (tmp / "nothing").mkdir()
    alien = make_tiny_model("llama", tmp / "alien")
    (alien / "config.json").write_text((alien / "config.json").read_text().replace('"llama"', '"mamba9"'))
    return {
        "misspelt flag": (["--divice", "g2"], 2, "--device"),
        "misspelt scale method": (["--scale-method", "maxabs_hv"], 1, "maxabs_hw"),
        "missing model": (["-m", tmp / "nowhere"], 1, "no model directory"),
        "model without safetensors": (["-m", tmp / "nothing"], 1, "no config.json"),
        "unknown family": (["-m", alien], 1, "families.py"),
        "malicious pickle": (["-d", tmp / "evil.pkl"], 1, "system"),
        "missing dataset": (["-d", tmp / "nowhere.jsonl"], 1, "nowhere.jsonl"),
        "dataset without the columns": (["-d", tmp / "columns.jsonl"], 1, "question_text"),
        "empty dataset": (["-d", tmp / "empty.jsonl"], 1, "empty"),
        "malformed line": (["-d", tmp / "broken.jsonl"], 1, "line 2"),
        "prompt longer than the context": (["-d", tmp / "long.jsonl"], 1, "3000"),
        "world that does not divide": (["-t", 3], 1, "does not divide over 3"),
        "unify that does not divide": (["-t", 4, "-r", 3], 2, "cannot unify"),
    }


def test_bad_input_is_refused_and_the_last_result_kept(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Every mistake ends with its exit code, a message and a fix, without a traceback, and changes no file."""
    calibrate(options(dataset))
    monkeypatch.chdir(dataset.parent)
    out = dataset.parent / "out"
    good, before = ["-m", GOLDEN / "model", "-d", dataset, "-o", out], snapshot_results(out)
    for mistake, (words, exit_code, message) in _bad_inputs(dataset).items():
        code, error = run("calibrate", *good, *words), capsys.readouterr().err
        assert code == exit_code, (mistake, error)
        assert message in error, (mistake, error)
        assert "unexpected" not in error and ("fix:" in error or exit_code == 2), (mistake, error)
        assert snapshot_results(out) == before, mistake
    assert not (dataset.parent / "evil").exists()


@pytest.mark.parametrize("flag", ["-m", "-d", "-o"])
def test_each_required_flag_is_asked_for(flag: str, dataset: Path, capsys: pytest.CaptureFixture):
    """Leaving out one required flag is a usage error that names it."""
    words = {"-m": GOLDEN / "model", "-d": dataset, "-o": dataset.parent / "out"}
    del words[flag]
    assert run("calibrate", *(word for pair in words.items() for word in pair)) == 2
    assert f"'{flag}'" in capsys.readouterr().err


def test_a_dry_run_prints_json(dataset: Path, capsys: pytest.CaptureFixture[str]):
    """What programs read is what people read, and nothing is written."""
    words = [
        "calibrate",
        "-m",
        str(GOLDEN / "model"),
        "-d",
        str(dataset),
        "-o",
        str(dataset.parent / "out"),
        "--dry-run",
    ]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": lines} and len(lines) > 10
    assert not (dataset.parent / "out").exists()


def test_full_disk_keeps_the_last_result(dataset: Path):
    """A file that cannot be written to its end is an error; the result of the run before is untouched."""
    import resource

    calibrate(options(dataset))
    out = dataset.parent / "out"
    before = snapshot_results(out)

    def limit_files():
        # The kernel answers a write past the limit like a full disk: the write fails.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run_cli("calibrate", "-m", GOLDEN / "model", "-d", dataset, "-o", out, "-t", 2, preexec_fn=limit_files)
    assert done.returncode == 1 and "cannot write" in done.stderr and "fix:" in done.stderr, done.stderr
    assert snapshot_results(out) == before
    assert read_manifest(out / "model/g3/calibration_manifest.json").status in ("failed", "running")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=lambda one: one.name)
def test_a_killed_run_keeps_the_last_result(stop: signal.Signals, dataset: Path):
    """A run that is killed while it measures leaves the files of the run before; the next run succeeds."""
    calibrate(options(dataset))
    out = dataset.parent / "out"
    before = snapshot_results(out)
    words = ["calibrate", "-m", GOLDEN / "model", "-d", dataset, "-o", out, "-t", 2]
    child = start_cli(*words, stderr=subprocess.PIPE)
    while b"Step 2" not in child.stderr.readline():
        assert child.poll() is None
    time.sleep(0.2)
    child.send_signal(stop)
    child.communicate()
    assert child.returncode != 0
    after = {name: content for name, content in snapshot_results(out).items() if ".staging." not in name}
    assert after == before
    manifest = read_manifest(out / "model/g3/calibration_manifest.json")
    assert manifest.status == ("running" if stop == signal.SIGKILL else "failed") and manifest.good.status == "ok"
    calibrate(options(dataset))
    assert not list(out.rglob(".staging.*"))


def test_a_directory_where_a_file_goes_keeps_the_last_result(dataset: Path):
    """The files that come first in the alphabet are not replaced either, and nothing is set aside."""
    calibrate(options(dataset))
    root = dataset.parent / "out/model"
    (root / "maxabs_quant_g3.json").unlink()
    (root / "maxabs_quant_g3.json").mkdir()
    before = snapshot_results(root)
    with pytest.raises(FileError, match=r"cannot write maxabs_quant_g3\.json"):
        calibrate(options(dataset, world=2))
    assert snapshot_results(root) == before
    for device in ("g2", "g3"):
        manifest = read_manifest(root / device / MANIFEST_NAME)
        assert manifest.status == "failed" and manifest.good.worlds.keys() == {1}


def test_a_run_killed_while_it_puts_its_files_in_place_is_undone(dataset: Path):
    """The files, configs and manifests that the next command finds are those of the run before, and fit together."""
    calibrate(options(dataset))
    root = dataset.parent / "out/model"
    before = snapshot_results(root)
    script = (
        "import os, signal, sys\n"
        "from gaudi_calib.cli.main import main\n"
        "rename, left = os.rename, [None] * 20\n"
        "def count(*paths):\n"
        "    left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(*paths)\n"
        "os.rename = count\n"
        "main(sys.argv[1:])\n"
    )
    words = ["calibrate", "-m", GOLDEN / "model", "-d", dataset, "-o", root.parent, "-t", 2]
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], check=False)
    assert done.returncode == -signal.SIGKILL
    for device in ("g2", "g3"):
        place = CalibrationDir(root / device)
        assert place.newest_manifest.status == "running" and place.manifest.worlds.keys() == {1}
        assert place.manifest.files == place.hash_files() and place.find_stale() == []
    left = {name: content for name, content in snapshot_results(root).items() if ".staging." not in name}
    assert left == before


def test_a_second_run_into_the_same_directory_is_refused(dataset: Path):
    """It fails at once, with who is there, and the first one's manifests and files are its own."""
    out = dataset.parent / "out"
    words = ["calibrate", "-m", GOLDEN / "model", "-d", dataset, "-o", out, "-t", 2]
    child = start_cli(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while b"Step 2" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGSTOP)
    manifest = (out / "model/g3" / MANIFEST_NAME).read_bytes()
    try:
        for devices in (("g2", "g3"), ("g3",)):
            with pytest.raises(FileError, match=f"another run is writing .*\n.*\n.*process {child.pid} "):
                calibrate(options(dataset, devices=devices))
        assert (out / "model/g3" / MANIFEST_NAME).read_bytes() == manifest
    finally:
        child.send_signal(signal.SIGCONT)
        child.communicate()
    assert child.returncode == 0
    assert read_manifest(out / "model/g3" / MANIFEST_NAME).worlds.keys() == {2}
    assert not list(out.rglob(".staging.*"))


def test_paths_count_from_the_callers_directory(dataset: Path):
    """Relative -m, -d and -o are taken from where the command is run."""
    os.symlink(GOLDEN / "model", dataset.parent / "Llama-Tiny")
    done = run_cli("measure", "-m", "Llama-Tiny", "-d", dataset.name, "-o", "here", "--json", cwd=dataset.parent)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["root"] == str(dataset.parent.resolve() / "here/llama-tiny")
    assert all(Path(path).is_file() for path in result["files"])
    assert sum(parse_rank_file(Path(path).name) is not None for path in result["files"]) == 6
