"""calibration_manifest.json: always there, never lost, without secrets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gaudi_calib.errors import FileError, ModelError
from gaudi_calib.manifest import (
    DatasetFacts,
    ModelFacts,
    ScaleOrigin,
    Topology,
    check_scales_fresh,
    finish_manifest,
    hash_files,
    read_manifest,
    read_versions,
    record_run,
    start_manifest,
)
from gaudi_calib.models.fingerprint import fingerprint_model
from gaudi_calib.redaction import redact_command, redact_environment
from tests.support import paths


@pytest.fixture
def path(tmp_path):
    return tmp_path / "g2" / "calibration_manifest.json"


def test_a_run_is_recorded_from_start_to_end(path):
    """Running before anything else, ok after everything else, with all facts in between."""
    model = ModelFacts(name="models/tiny", fingerprint="sha256:0", model_type="llama")
    with record_run(path, command=["gaudi-calib", "calibrate"], model=model, device="g2") as record:
        assert read_manifest(path).status == "running"
        with record.time("measure"):
            pass
        record.update(dataset=DatasetFacts(name="builtin", prompts=256, tokens=9000), notes={"bounded_worlds": [16]})
        record.update(topology=Topology(measured_world=1, worlds=[1, 2]), notes={"more": True})
    manifest = read_manifest(path)
    assert manifest.status == "ok"
    assert manifest.model == model
    assert manifest.dataset and manifest.dataset.tokens == 9000
    assert manifest.notes == {"bounded_worlds": [16], "more": True}
    assert list(manifest.timings_s) == ["measure"]
    assert manifest.finished_at and manifest.started_at <= manifest.finished_at
    assert manifest.versions["python"].startswith("3.")
    assert manifest.good == manifest


@pytest.mark.parametrize("error", [ValueError("no such node"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_failed_run_says_so_and_fails_on(error, path):
    """Any exception, Ctrl-C included, is recorded and raised again."""
    with pytest.raises(type(error)), record_run(path):
        raise error
    manifest = read_manifest(path)
    assert manifest.status == "failed"
    assert manifest.error and manifest.error.startswith(type(error).__name__)
    assert manifest.good is None


def test_the_last_good_manifest_survives_failures(path):
    """Two failed runs later, the files in place are still explained; the next good run replaces them."""
    with record_run(path, device="g2") as record:
        record.update(files={"a.npz": "sha256:1"})
    for _ in range(2):
        with pytest.raises(RuntimeError), record_run(path) as record:
            record.update(files={"a.npz": "sha256:2"})
            raise RuntimeError
        good = read_manifest(path).good
        assert good and good.files == {"a.npz": "sha256:1"}
    with record_run(path):
        pass
    assert read_manifest(path).last_good is None


def test_a_killed_run_stays_running_and_keeps_the_last_good(path):
    """SIGKILL leaves `running`, and the manifest of the files in place."""
    with record_run(path, notes={"first": True}):
        pass
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom gaudi_calib.manifest import record_run\n"
        f"with record_run(Path({str(path)!r})):\n    print('started', flush=True)\n    time.sleep(60)\n"
    )
    root = paths.ROOT
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout and process.stdout.readline() == b"started\n"
        process.send_signal(signal.SIGKILL)
    manifest = read_manifest(path)
    assert manifest.status == "running"
    assert manifest.good and manifest.good.notes == {"first": True}


def test_a_later_step_keeps_the_facts_of_the_earlier_one(path):
    """Quantize after measure knows the dataset; a fresh measurement forgets everything."""
    with record_run(path, command=["measure"], dataset=DatasetFacts(name="builtin")) as record:
        record.update(config={"measure": {"mode": "MEASURE"}})
    with record_run(path, fresh=False, command=["quantize"]) as record:
        record.update(config={"quantize": {"mode": "QUANTIZE"}})
    manifest = read_manifest(path)
    assert manifest.dataset == DatasetFacts(name="builtin")
    assert list(manifest.config) == ["measure", "quantize"]
    assert [step.command for step in manifest.history] == [["measure"]]
    assert manifest.command == ["quantize"]
    with record_run(path, command=["measure"]):
        pass
    manifest = read_manifest(path)
    assert (manifest.dataset, manifest.history, manifest.config) == (None, [], {})


def test_a_full_disk_does_not_hide_the_error(path, monkeypatch):
    """When even `failed` cannot be written, the reason of the failure still surfaces."""

    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError), record_run(path):
        monkeypatch.setattr(os, "replace", fail)
        raise ZeroDivisionError
    assert read_manifest(path).status == "running"


@pytest.mark.parametrize("text", ["", "[]", '{"status": "done"}', '{"format": 2}', '{"colour": 1}'])
def test_a_broken_manifest_is_an_error_to_readers_and_none_to_writers(text, path):
    """Reading it fails with its path; a new run replaces it."""
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(FileError) as error:
        read_manifest(path)
    assert str(path) in str(error.value.where)
    finish_manifest(path, start_manifest(path))
    assert read_manifest(path).status == "ok"


def test_versions_are_read_without_importing():
    """Looking up the versions loads none of the heavy libraries."""
    code = (
        "import sys\nfrom gaudi_calib.manifest import read_versions\nprint(read_versions()['gaudi_calib'])\n"
        "assert not {'torch', 'transformers', 'vllm', 'neural_compressor'} & set(sys.modules)"
    )
    root = paths.ROOT
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == read_versions()["gaudi_calib"]


def test_secrets_are_redacted(path, monkeypatch):
    """Neither the environment nor the command line of a manifest tells a secret."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret1")
    monkeypatch.setenv("VLLM_API_KEY", "secret2")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret3@mirror.example/hub?token=secret4&x=1")
    monkeypatch.setenv("PT_HPU_WEIGHT_SHARING", "0")
    monkeypatch.setenv("BANK_ACCOUNT", "secret5")
    command = [
        "measure",
        "--hf-token",
        "secret6",
        "--api-key=secret7",
        "-m",
        "hf_" + "secret8" * 4,
        "--max-tokens",
        "64",
    ]
    with record_run(path, command=command):
        pass
    assert "secret" not in path.read_text()
    manifest = read_manifest(path)
    assert manifest.environment["HF_TOKEN"] == "[redacted]"
    assert manifest.environment["HF_ENDPOINT"] == "https://[redacted]@mirror.example/hub?token=[redacted]&x=1"
    assert manifest.environment["PT_HPU_WEIGHT_SHARING"] == "0"
    assert manifest.command[-2:] == ["--max-tokens", "64"]


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("TOKENIZERS_PARALLELISM", "false", True),
        ("VLLM_MAX_TOKENS", "128", True),
        ("HF_TOKENS", "abc", False),
        ("VLLM_S3_SECRET", "abc", False),
        ("RAY_PASSWORD", "1234", False),
        ("HF_CREDENTIALS_FILE", "/x", False),
        ("HF_HUB_OFFLINE", "1", True),
        ("QUANT_CONFIG", "/data/q.json", True),
    ],
)
def test_what_counts_as_a_secret(name, value, kept):
    """Counts and switches stay readable, anything named like a secret does not."""
    assert redact_environment({name: value}) == {name: value if kept else "[redacted]"}


def test_flags_without_values_are_kept():
    """An option that follows a secret option is not taken for its value's redaction to spread."""
    assert redact_command(["x", "--token", "a", "b"]) == ["x", "--token", "[redacted]", "b"]


RANGES = ("inc_output_hooks_maxabs_0_1.npz", "inc_output_hooks_maxabs_0_1.json")
SCALES = "inc_output_hooks_maxabs_MAXABS_HW_0_1.npz"


@pytest.fixture
def run(path):
    """A finished run with ranges and scales computed from them."""
    path.parent.mkdir()
    for name in (*RANGES, SCALES):
        (path.parent / name).write_text(f"content of {name}")
    with record_run(path) as record:
        origin = ScaleOrigin(ranges=hash_files(path.parent, RANGES), settings={"device": "g2"})
        record.update(scales={SCALES: origin}, files=hash_files(path.parent))
    return path


def stale(path, **arguments):
    return [(file.name, file.why) for file in check_scales_fresh(read_manifest(path), path.parent, **arguments)]


def test_fresh_scales_are_accepted(run):
    """Nothing is stale right after a run, also when ranges are copied over themselves."""
    assert set(read_manifest(run).files) == {*RANGES, SCALES}
    shutil.copy(run.parent / RANGES[0], run.parent / "copy")
    os.replace(run.parent / "copy", run.parent / RANGES[0])
    assert stale(run, settings={"device": "g2"}) == []


def test_scales_of_other_ranges_or_settings_are_stale(run):
    """Changed, vanished and unrecorded origins, and other settings, are each told."""
    assert stale(run, settings={"device": "g3"}) == [(SCALES, "it was computed with other settings: device")]
    (run.parent / RANGES[0]).write_text("measured again")
    assert stale(run) == [(SCALES, f"its ranges {RANGES[0]} have changed since")]
    (run.parent / RANGES[0]).unlink()
    assert stale(run) == [(SCALES, f"its ranges {RANGES[0]} are gone")]
    other = SCALES.replace("_0_1", "_0_2")
    shutil.copy(run.parent / SCALES, run.parent / other)
    assert [name for name, _ in stale(run)] == [SCALES, other]


def test_scales_are_judged_by_the_last_good_run(run):
    """A failed attempt does not make good scales stale."""
    with pytest.raises(RuntimeError), record_run(run):
        raise RuntimeError
    assert stale(run) == []


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of two files, one tensor larger than all samples of it."""
    np = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"big": np.zeros(50_000, np.float32), "a": np.zeros(10, np.float32)}, directory / "model-1.safetensors")
    save_file({"b": np.zeros(10, np.float32)}, directory / "model-2.safetensors")
    return directory


def test_fingerprint_does_not_depend_on_the_place(checkpoint, tmp_path):
    """A copy is the same model, whatever else lies beside it."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("hello")
    assert fingerprint_model(tmp_path / "copy") == fingerprint_model(checkpoint)


@pytest.mark.parametrize("tensor", ["big", "a", "b"])
@pytest.mark.parametrize("index", [0, -1])
def test_fingerprint_sees_a_change_of_any_tensor(tensor, index, checkpoint):
    """One changed value at the start or end of any tensor, in any file, changes it."""
    from safetensors.numpy import load_file, save_file

    before = fingerprint_model(checkpoint)
    path = checkpoint / ("model-2.safetensors" if tensor == "b" else "model-1.safetensors")
    tensors = load_file(path)
    tensors[tensor][index] = 1
    save_file(tensors, path)
    assert fingerprint_model(checkpoint) != before


def test_fingerprint_sees_config_names_and_given_hashes(checkpoint):
    """config.json, the name of a file, and hashes of whole tensors all count."""
    seen = {fingerprint_model(checkpoint), fingerprint_model(checkpoint, tensor_hashes={"a": "1", "b": "2"})}
    seen.add(fingerprint_model(checkpoint, tensor_hashes={"a": "1", "b": "3"}))
    (checkpoint / "model-2.safetensors").rename(checkpoint / "model-3.safetensors")
    seen.add(fingerprint_model(checkpoint))
    (checkpoint / "config.json").write_text("{}")
    seen.add(fingerprint_model(checkpoint))
    assert len(seen) == 5


def test_fingerprint_of_other_formats_and_broken_files(tmp_path):
    """A file that is no safetensors is sampled as a whole; no config.json is an error."""
    with pytest.raises(ModelError, match=r"no config\.json"):
        fingerprint_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    prints = []
    for content in (b"", b"short", b"\x05" + bytes(7) + b"[1,2]", bytes(100_000), bytes(99_999) + b"x"):
        (tmp_path / "model.safetensors").write_bytes(content)
        prints.append(fingerprint_model(tmp_path))
    assert len(set(prints)) == len(prints)


def test_manifest_is_plain_json(path):
    """Other tools read it without this package."""
    with record_run(path, model=ModelFacts(name="m")):
        pass
    content = json.loads(path.read_text())
    assert content["model"]["name"] == "m"
    assert content["status"] == "ok"
    assert time.strptime(content["started_at"][:19], "%Y-%m-%dT%H:%M:%S")
