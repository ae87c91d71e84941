"""How the program begins and ends: signals, and any locale."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main, report_errors
from gaudi_calib.engines.vllm_runner.process import list_group
from gaudi_calib.manifest import read_manifest
from tests.support.files import write_prompts
from tests.support.paths import GOLDEN, ROOT
from tests.support.processes import COMMAND, run_cli

MODEL = GOLDEN / "llama-tiny/model"
# No locale, and none of Python's ways around it.
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start_measuring(tmp_path: Path, *before: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start `measure`, and return it when it runs the model, stopped; and its manifest.

    It obeys SIGHUP also where these tests were started with nohup.
    """
    words = ["measure", "-m", MODEL, "-d", write_prompts(tmp_path), "-o", tmp_path / "out", "--device", "g3"]
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    child = subprocess.Popen([*before, *COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGHUP, inherited)
    assert child.stderr is not None
    while b"Step 2" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGSTOP)
    return child, tmp_path / "out/model/g3/calibration_manifest.json"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_that_is_asked_to_end_says_so(number: signal.Signals, tmp_path: Path) -> None:
    """The manifest says `failed` and why, nothing half done is left, and the exit code is the shell's."""
    child, manifest = start_measuring(tmp_path)
    child.send_signal(number)
    child.send_signal(signal.SIGCONT)
    _, err = child.communicate()
    assert child.returncode == 128 + number
    assert f"Error: ended by {number.name}" in err.decode() and "Traceback" not in err.decode()
    told = read_manifest(manifest)
    assert (told.status, told.error) == ("failed", f"Ended: {number.name}")
    assert [path.name for path in manifest.parent.parent.iterdir()] == ["g3"]


def test_nohup_is_obeyed(tmp_path: Path) -> None:
    """A run that was started to outlive its terminal does."""
    child, manifest = start_measuring(tmp_path, "nohup")
    child.send_signal(signal.SIGHUP)
    child.send_signal(signal.SIGCONT)
    _, err = child.communicate()
    assert child.returncode == 0, err
    assert read_manifest(manifest).status == "ok"


def test_a_phase_of_vllm_ends_with_a_run_that_is_asked_to(tmp_path: Path) -> None:
    """Nothing that the phase has started goes on, and the exit code is that of the signal."""
    (tmp_path / "phase.py").write_text(
        "import os, subprocess, time\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "print('group', os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gaudi_calib.cli.main import report_errors\n"
        "from gaudi_calib.engines.vllm_runner import process\n"
        "from gaudi_calib.engines.vllm_runner.phases import Phase\n"
        "from gaudi_calib.engines.vllm_runner.settings import Settings\n"
        "process._CHILD = 'phase'\n"
        "phase = Phase('measure', 'm', Settings({}), [[1]], [1], 1, 'ask')\n"
        "sys.exit(report_errors(lambda: process.run_phase(phase, Path(sys.argv[1]))))\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "logs/measure.log")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    runner = subprocess.Popen(words, env=env, stderr=subprocess.PIPE)
    assert runner.stderr is not None
    group = int(runner.stderr.readline().split()[1])
    assert len(list_group(group)) == 2
    runner.terminate()
    runner.communicate()
    assert runner.returncode == 128 + signal.SIGTERM
    assert list_group(group) == []


def test_the_callers_signals_are_as_they_were() -> None:
    """A program that calls this one keeps its own ways to end."""
    before = signal.getsignal(signal.SIGTERM)
    assert main(["no-such-command"]) == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_names_beyond_ascii_in_any_locale(tmp_path: Path) -> None:
    """A run has the same files, with the same content, and the same lines are printed."""
    shutil.copytree(MODEL, tmp_path / "Modèle-Ö")
    prompts = write_prompts(tmp_path / "données.jsonl")
    printed, configs = [], []
    for env in ({"LC_ALL": "C.UTF-8"}, PLAIN):
        shutil.rmtree(tmp_path / "größe", ignore_errors=True)
        words = ["calibrate", "-m", "Modèle-Ö", "-d", prompts.name, "-o", "größe", "--device", "g3"]
        done = run_cli(*words, cwd=tmp_path, env={**os.environ, **env}, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        configs.append((tmp_path / "größe/modèle-ö/maxabs_quant_g3.json").read_bytes())
        served = run_cli(
            *("serve", "-m", "Modèle-Ö", "--quant-config", "größe/modèle-ö/maxabs_quant_g3.json"),
            *("--device", "g3", "--print"),
            cwd=tmp_path,
            env={**os.environ, **env},
            encoding="utf-8",
        )
        assert served.returncode == 0 and "größe/modèle-ö" in served.stdout, served.stderr
    assert printed[0] == printed[1] and "größe/modèle-ö" in printed[0]
    assert configs[0] == configs[1]
    assert json.loads(configs[0])["dump_stats_path"] == str(tmp_path / "größe/modèle-ö/g3/inc_output")


def test_a_name_that_is_no_text_is_printed_as_its_bytes(tmp_path: Path) -> None:
    """A path that is no UTF-8 can be copied from what is printed."""
    name = b"\xff.json"
    (tmp_path / os.fsdecode(name)).write_text("{}")
    words = [*map(os.fsencode, COMMAND), b"config", b"validate", name]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in every locale but C and C.UTF-8
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.stdout.startswith(name) and b"unexpected" not in done.stderr


def test_half_a_character_is_printed_as_an_escape(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON can hold what no encoding can; an error that quotes it is still told."""

    def fail() -> None:
        raise ValueError("a \ud800 b")

    assert report_errors(fail) == 1
    assert "a \\ud800 b" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_output_that_cannot_be_written_is_an_error() -> None:
    """A full disk behind `> FILE` is told as what it is."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([*COMMAND, "detect"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and "unexpected" not in done.stderr
