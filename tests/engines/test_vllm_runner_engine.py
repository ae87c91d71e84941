"""The vllm engine of `measure` and `calibrate` with real engines on CPU: what it leaves, and what a crash leaves."""

import os
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.engines.vllm_runner.process import list_group
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import read_manifest
from gaudi_calib.rankfiles.store import read_ranges
from gaudi_calib.serve.command import ServeOptions, plan_serve
from tests.support.calibrated import HPU3, MODEL, calibrate_by_torch
from tests.support.files import snapshot, write_prompts
from tests.support.processes import run_cli, start_cli

pytest.importorskip("vllm")
psutil = pytest.importorskip("psutil")

pytestmark = [pytest.mark.torch, pytest.mark.vllm]


def words(out: Path, *more: object) -> list[object]:
    dataset = write_prompts(out)
    return ["calibrate", "-m", MODEL, "-d", dataset, "-o", out, "--device", "g3", "-t", 2, "--engine", "vllm", *more]


def test_two_ranks_measured_by_vllm(tmp_path):
    """Every rank's own files, one rank unified from them, scales, and a manifest that says how."""
    more = ("-r", 1, "-b", 4, "--max-new-tokens", 3, "--env", "VLLM_LOGGING_LEVEL=WARNING")
    done = run_cli(*words(tmp_path, *more), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    root = tmp_path / "model"
    ranks, (whole,) = CalibrationDir(root / "g3").read_world(2), CalibrationDir(root / "g3").read_world(1)
    assert [CalibrationDir(root / "g3").list_methods(world) for world in (1, 2)] == [["MAXABS_HW"]] * 2
    for name, node in whole.nodes.items():
        parts = [rank.nodes[name].inputs for rank in ranks]
        assert all(np.array_equal(values, np.maximum(*pair)) for values, pair in zip(node.inputs, zip(*parts)))
    assert ranks[0].nodes["lm_head"].weight != ranks[1].nodes["lm_head"].weight
    assert "model.layers.0.self_attn.attn.impl.matmul_qk" in whole.nodes
    manifest = read_manifest(root / "g3" / "calibration_manifest.json")
    assert (manifest.status, manifest.engine, manifest.platform) == ("ok", "vllm", "cpu")
    assert (manifest.measured_world, list(manifest.worlds)) == (2, [1, 2])
    assert CalibrationDir(root / "g3").find_stale() == []
    log = (root / "g3" / "logs" / "measure.log").read_text()
    assert "8 of 8 prompts" in log and "8 of 8 prompts" in done.stderr
    assert str(root / "g3" / "inc_output") in (root / "maxabs_quant_g3.json").read_text()
    assert not list(root.glob(".staging*"))
    for world in (1, 2):
        plan_serve(ServeOptions(str(MODEL), root / "maxabs_quant_g3.json", world), HPU3)


def test_a_worker_dies_in_the_middle(tmp_path):
    """Exit code 1, an error with the log's last lines, no process left, and the earlier calibration as it was."""
    before = calibrate_by_torch(MODEL, tmp_path).root
    files = snapshot(before, skipped=[MANIFEST_NAME])
    output: list[str] = []
    given = words(tmp_path, "-b", 1, "--max-new-tokens", 900)
    run = start_cli(*given, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    reader = threading.Thread(target=lambda: output.extend(run.stderr), daemon=True)
    reader.start()
    deadline = time.monotonic() + 300
    while not any("1 of 8 prompts" in line for line in output):
        assert run.poll() is None and time.monotonic() < deadline, "".join(output[-20:])
        time.sleep(0.1)
    started = psutil.Process(run.pid).children(recursive=True)
    group = psutil.Process(run.pid).children()[0].pid
    victim = max(started, key=lambda process: len(process.parents()))
    os.kill(victim.pid, 9)
    assert run.wait(120) == 1
    reader.join(10)
    text = "".join(output)
    error = text[text.index("Error: the measure phase failed") :]
    log = before / "g3" / "logs" / "measure.log"
    assert "died unexpectedly" in error.splitlines()[2]  # vLLM does not always know the exit code
    assert f"where: {log}" in error and "its log ends with:" in error and "fix:" in error
    assert log.read_text().splitlines()[-1].strip() in error
    assert list_group(group) == []
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    after = {name: content for name, content in snapshot(before, skipped=[MANIFEST_NAME]).items() if "logs" not in name}
    assert after == files
    assert read_manifest(before / "g3" / "calibration_manifest.json").good is not None
    plan_serve(ServeOptions(str(MODEL), before / "maxabs_quant_g3.json", 2), HPU3)
    assert read_ranges(before / "g3" / "inc_output_hooks_maxabs_0_2.json").nodes
