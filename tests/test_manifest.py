"""calibration_manifest.json: always there, never lost, without secrets."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gaudi_calib.errors import FileError
from gaudi_calib.manifest import (
    DatasetFacts,
    DatasetShare,
    Manifest,
    ModelFacts,
    WorldFacts,
    read_manifest,
    read_versions,
    record_run,
)
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
        record.update(dataset=DatasetFacts(name="builtin", prompts=256, tokens=9000), worlds={1: WorldFacts()})
        record.update(measured_world=1, worlds={16: WorldFacts(is_bounded=True)}, timings_s={"measure": 1.5})
        record.update(timings_s={"quantize": 0.5})
    manifest = read_manifest(path)
    assert manifest.status == "ok"
    assert manifest.model == model
    assert manifest.dataset and manifest.dataset.tokens == 9000
    assert manifest.worlds == {1: WorldFacts(), 16: WorldFacts(is_bounded=True)}
    assert manifest.timings_s == {"measure": 1.5, "quantize": 0.5}
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
    with record_run(path, vllm="0.23"):
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
    assert manifest.good and manifest.good.vllm == "0.23"


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


@pytest.mark.parametrize("text", ["", "[]", '{"status": "done"}', '{"format": 1}', '{"colour": 1}'])
def test_a_broken_manifest_is_an_error_to_readers_and_none_to_writers(text, path):
    """Reading it fails with its path; a new run replaces it."""
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(FileError) as error:
        read_manifest(path)
    assert str(path) in str(error.value.where)
    with record_run(path):
        pass
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


@pytest.mark.parametrize(
    ("worlds", "default", "expected"),
    [({}, True, True), ({2: WorldFacts(expert_parallel=False)}, True, False), ({2: WorldFacts()}, True, True)],
    ids=["unknown world", "told", "not told"],
)
def test_sharing_is_that_of_the_world_else_of_the_run(worlds, default, expected, path):
    """Each world knows how its experts are shared; others follow the run."""
    with record_run(path, worlds=worlds, expert_parallel=default):
        pass
    assert read_manifest(path).shares_experts(2) is expected


def test_manifest_is_plain_json(path):
    """Other tools read it without this package."""
    with record_run(path, model=ModelFacts(name="m")):
        pass
    content = json.loads(path.read_text())
    assert content["model"]["name"] == "m"
    assert content["status"] == "ok"
    assert time.strptime(content["started_at"][:19], "%Y-%m-%dT%H:%M:%S")


def test_what_was_measured_on_can_be_given_to_d_again() -> None:
    """Shares with their weights; of merged runs each dataset once, whose weights are not of one measurement."""
    shares = [DatasetShare(name="/a.jsonl", weight=2, prompts=1, tokens=9), DatasetShare(name="b", prompts=1, tokens=9)]
    both, one = DatasetFacts(name="/a.jsonl=2, b", shares=shares), DatasetFacts(name="b")
    assert Manifest(dataset=both).list_datasets() == ("/a.jsonl=2", "b")
    assert Manifest(dataset=one).list_datasets() == ("b",)
    assert Manifest(merged_datasets=[one, both]).list_datasets() == ("b", "/a.jsonl")
    assert Manifest().list_datasets() == ("builtin",)
