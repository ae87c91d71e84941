"""Paths as users give them: `~` where the shell leaves it, names that cannot be, and things of another kind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.runs.expand import expand_dir
from gaudi_calib.runs.merge import merge_dirs
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.postprocess import postprocess_dir
from gaudi_calib.runs.unify import unify_dir
from tests.support.files import snapshot, write_prompts
from tests.support.paths import GOLDEN, ROOT

MODEL = GOLDEN / "llama-tiny/model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model, prompts and ranges of one rank; the caller is elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    shutil.copytree(MODEL, home / "model")
    shutil.copytree(GOLDEN / "llama-tiny/tp1/g2", home / "one/g2")
    write_prompts(home)
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    return home


NESTED = 100_000 * "["


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("config validate nested.json", "nested.json is not valid JSON"),
        ("prepare -m {model} -d cells.csv -o x.jsonl", "column 'prompt_token_ids'"),
        ("postprocess g2", "inc_output_hooks_maxabs_0_1.json is not valid JSON"),
        ("convert-weights -m checkpoint -o x", "its header is not one of safetensors"),
        ("reshard run -t 2", "channel_ranges.safetensors is damaged"),
    ],
)
def test_json_that_is_nested_without_end(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Python's parser gives up with an error of another kind; each file is named as for any other damage."""
    monkeypatch.chdir(tmp_path)
    Path("nested.json").write_text(NESTED)
    Path("cells.csv").write_text(f"prompt_token_ids\n{NESTED}\n")
    shutil.copytree(GOLDEN / "llama-tiny/tp1/g2", "g2")
    shutil.copy("nested.json", "g2/inc_output_hooks_maxabs_0_1.json")
    shutil.copytree(GOLDEN / "deepseek-v3-fp8-tiny/model", "checkpoint")
    Path("checkpoint/model.safetensors").write_bytes(len(NESTED).to_bytes(8, "little") + NESTED.encode())
    Path("run").mkdir()
    header = json.dumps({"__metadata__": {"channel_ranges": NESTED}}).encode()
    Path("run/channel_ranges.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert main(words.format(model=MODEL).split()) == 1
    printed = "".join(capsys.readouterr())
    assert told in printed and "unexpected" not in printed


def test_a_run_in_the_home(home: Path) -> None:
    """`--option=~/x`, which no shell expands, and `-o '~/x'` mean the home for all a run is given."""
    (home / "template.jinja").write_text("{{ messages }}")
    assert main(["config", "show", "-m", "~/model", "--device", "g3"]) == 0
    words = ["--model=~/model", "--dataset=~/prompts.jsonl", "--chat-template=~/template.jinja", "-o", "~/out"]
    assert main(["calibrate", *words, "--device", "g3"]) == 0
    config = home / "out/model/maxabs_quant_g3.json"
    assert json.loads(config.read_text())["dump_stats_path"] == str(home / "out/model/g3/inc_output")
    quantize = ["quantize", "-m", "~/model", "-o", "~/out", "--device", "g3"]
    assert main([*quantize, "--config-quant=~/out/model/maxabs_quant_g3.json"]) == 0
    serve = ["serve", "-m", "~/model", "--quant-config=~/out/model/maxabs_quant_g3.json", "--device", "g3", "--print"]
    assert main(serve) == 0
    assert main(["reshard", "~/out/model", "-t", "2", "-o", "~/other"]) == 0
    shutil.copytree(home / "other/g3", home / "copy/g3")
    assert main(["merge", "~/other/g3", "~/copy/g3", "-o", "~/merged/g3"]) == 0
    assert main(["prepare", "-m", "~/model", "-d", "~/prompts.jsonl", "-o", "~/prepared.jsonl"]) == 0
    assert list(Path.cwd().iterdir()) == []


def test_python_calls_know_a_home(home: Path) -> None:
    """The calls behind the commands take `~` as well."""
    assert expand_dir(Path("~/one/g2"), 2, Path("~/two/g2"))[0].parent == home / "two/g2"
    assert unify_dir(Path("~/two/g2"), 1, Path("~/again"))[0].parent == home / "again"
    assert postprocess_dir(Path("~/two/g2"), Path("~/three/g2"))[0].parent == home / "three/g2"
    assert merge_dirs([Path("~/two/g2"), Path("~/three/g2")], Path("~/four/g2"))[0].parent == home / "four/g2"
    options = RunOptions("~/model", Path("~/out"), quant_config=Path("~/q.json"))
    assert (options.model, options.out, options.quant_config) == (f"{home}/model", home / "out", home / "q.json")
    assert list(Path.cwd().iterdir()) == []


def test_scripts_know_a_home(home: Path) -> None:
    """So do the steps, QUANT_CONFIG included."""
    config = {"mode": "MEASURE", "observer": "maxabs", "dump_stats_path": str(home / "run/model/g3/inc_output")}
    (home / "measure.json").write_text(json.dumps(config))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "QUANT_CONFIG": "~/measure.json"}
    steps = {
        "1-prepare-calibration-dataset": ["-m", "~/model", "-d", "~/prompts.jsonl", "-o", "~/made"],
        "2-measure-scales": ["-m", "~/model", "-d", "~/made-calibration-dataset.pkl"],
        "3-postprocess-measure": ["-m", "~/run/model/g3", "-o", "~/three"],
        "6-expand-measurements": ["-m", "~/one/g2", "-w", "2", "-o", "~/six"],
        "5-unify_measurements": ["-m", "~/six", "-r", "1", "-o", "~/five"],
    }
    for name, words in steps.items():
        command = [sys.executable, str(ROOT / f"scripts/step-{name}.py"), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (home / "six/inc_output_hooks_maxabs_1_2.npz").is_file() and list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("option", ["-m", "-d", "-o", "--config-quant"])
def test_the_home_of_nobody_is_an_error(option: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`~name` where nobody is called so is a relative path, which is not there."""
    given = {"-m": str(MODEL), "-d": str(home / "prompts.jsonl"), "-o": "out"} | {option: "~nobody-is-called-so/x"}
    words = [word for pair in given.items() for word in pair]
    assert main(["calibrate", *words, "--dry-run"]) == (0 if option in ("-o", "-d") else 2 if "config" in option else 1)
    assert "unexpected" not in capsys.readouterr().err
    if option == "-d":
        assert main(["calibrate", *words]) == 1
        assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["a\0b", "x" * 5000, "x/" * 2500, "new\nline", "file", "file/below"], ids=lambda value: ascii(value)[:12]
)
@pytest.mark.parametrize("option", ["-m", "-d", "-o", "--config-quant", "--config-measure", "--chat-template"])
def test_paths_that_cannot_be_are_clear_errors(
    option: str, value: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the path and whichever option has it, the error says what is wrong, and nothing is left behind."""
    Path("file").write_text("{}")
    before = snapshot(Path.cwd())
    given = {"-m": str(MODEL), "-d": str(home / "prompts.jsonl"), "-o": "out", "--device": "g3"} | {option: value}
    code = main(["calibrate", *(word for pair in given.items() for word in pair)])
    err = capsys.readouterr().err
    if (option, value) in {("-o", "new\nline"), ("--chat-template", "file")}:
        assert code == 0, err
        return
    assert code in (1, 2) and "Error" in err and "unexpected" not in err, err
    assert snapshot(Path.cwd(), skipped=[MANIFEST_NAME]) == before
