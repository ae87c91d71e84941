"""The reference's script names and flags, run as a user runs them: from another directory, as processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support import paths
from tests.support.files import write_prompts

ROOT = paths.ROOT
SCRIPTS = ROOT / "scripts"
RANKS_OF_TWO = {"_0_2.json", "_0_2.npz", "_0_2_mod_list.json", "_1_2.json", "_1_2.npz", "_1_2_mod_list.json"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny checkpoint `Model` and a file `prompts.jsonl` of token ids."""
    from tests.support.tiny import make_tiny_model

    directory = tmp_path_factory.mktemp("scripts")
    make_tiny_model("llama", directory / "Model")
    write_prompts(directory, ([1 + (7 * row + i) % 50 for i in range(8)] for row in range(6)))
    return directory


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A directory for PATH that holds `gaudi-calib`, of this interpreter and this checkout."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "gaudi-calib"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gaudi_calib "$@"\n')
    script.chmod(0o755)
    return directory


def run(words: list[object], cwd: Path, **env: object) -> subprocess.CompletedProcess[str]:
    """Run a script with the environment's additions `env`."""
    clean = {name: value for name, value in os.environ.items() if name != "QUANT_CONFIG"}
    full = {**clean, "PYTHONPATH": str(ROOT), **{key: str(value) for key, value in env.items()}}
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd, env=full, check=False)


def run_step(name: str, words: list[object], cwd: Path, **env: object) -> subprocess.CompletedProcess[str]:
    """Run `scripts/step-<name>.py`."""
    return run([sys.executable, SCRIPTS / f"step-{name}.py", *words], cwd, **env)


def write_config(path: Path, **attributes: object) -> Path:
    """Write a QUANT_CONFIG file."""
    lists = {"allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": []}}
    path.write_text(json.dumps({"observer": "maxabs", **lists, **attributes}))
    return path


def node_names(path: Path) -> set[str]:
    """Return the names of the nodes in a rank file."""
    return set(json.loads(path.read_text())["Nodes"])


CALIBRATE = SCRIPTS / "calibrate_model.sh"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "-m is missing"),
        (["-d", "x", "-o", "y"], "-m is missing"),
        (["-m", "x", "-o", "y"], "-d is missing"),
        (["-m", "x", "-d", "y"], "-o is missing"),
        (["-m", "x", "-d", ""], "-d is missing"),
        (["-m"], "-m needs a value"),
        (["-m", "x", "-q"], "no such option: -q"),
        (["-m", "x", "-d", "y", "stray", "-o", "z"], "unexpected argument: stray"),
        (["stray"], "unexpected argument: stray"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_calibrate_model_checks_its_flags_one_by_one(words: list[str], message: str, tmp_path: Path) -> None:
    """Each required flag has its own message with a fix; the exit code is 2 and nothing is written."""
    result = run([CALIBRATE, *words], tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"Error: {message}\n  fix:   ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["-m", "x", "-h"]], ids=" ".join)
def test_calibrate_model_help_wants_no_argument(words: list[str], tmp_path: Path) -> None:
    """`-h` prints every flag on stdout and succeeds."""
    result = run([CALIBRATE, *words], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"\n  -{flag} " in result.stdout for flag in "mdobltrueh")


def test_calibrate_model_says_how_to_install(tmp_path: Path) -> None:
    """Without the program, in PATH or in the clone's .venv, the message names the way to get it."""
    copy = tmp_path / "clone" / "scripts" / "calibrate_model.sh"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(CALIBRATE.read_bytes())
    result = run(["bash", copy, "-m", "x", "-d", "y", "-o", "z"], tmp_path, PATH="/usr/bin:/bin")
    assert result.returncode == 2
    assert "gaudi-calib is not installed" in result.stderr
    assert "make venv" in result.stderr


@pytest.mark.parametrize(
    ("extra", "passed"),
    [
        ([], []),
        (["-b", "4", "-l", "8", "-t", "2", "-r", "1"], ["-b", "4", "-l", "8", "-t", "2", "-r", "1"]),
        (["-u", "-e"], ["-u", "-e"]),
        (["--", "--device", "g2"], ["--device", "g2"]),
    ],
    ids=["none", "values", "switches", "after --"],
)
def test_calibrate_model_passes_every_flag_on(extra: list[str], passed: list[str], tmp_path: Path) -> None:
    """What the user gave reaches `gaudi-calib calibrate` word by word, spaces included, in the user's directory."""
    program = tmp_path / "bin" / "gaudi-calib"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\npwd\nfor word; do echo "$word"; done\n')
    program.chmod(0o755)
    given = ["-m", "my model", "-d", "builtin", "-o", "out"]
    result = run([CALIBRATE, *given, *extra], tmp_path, PATH=f"{program.parent}:/usr/bin:/bin")
    assert result.stdout.splitlines() == [str(tmp_path), "calibrate", *given, *passed]


def test_calibrate_model_takes_several_datasets(tmp_path: Path) -> None:
    """Each -d reaches `gaudi-calib calibrate`, weights included."""
    program = tmp_path / "bin" / "gaudi-calib"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    program.chmod(0o755)
    datasets = ["-d", "builtin=3", "-d", "my data.jsonl=1"]
    result = run([CALIBRATE, *datasets, "-m", "x", "-o", "y"], tmp_path, PATH=f"{program.parent}:/usr/bin:/bin")
    assert result.stdout.splitlines() == ["calibrate", "-m", "x", *datasets, "-o", "y"]


@pytest.mark.torch
def test_calibrate_model_writes_a_run_beside_its_caller(tiny: Path, program: Path, tmp_path: Path) -> None:
    """Relative paths are the caller's; both worlds and devices have ranges and scales; the end says how to serve."""
    words = ["-m", "Model", "-d", "prompts.jsonl", "-o", tmp_path / "out", "-t", "2", "-r", "1"]
    result = run([CALIBRATE, *words], tiny, PATH=f"{program}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    root = tmp_path / "out" / "model"
    for device in ("g2", "g3"):
        names = {path.name for path in (root / device).iterdir()}
        assert {f"inc_output_hooks_maxabs{end}" for end in RANKS_OF_TWO} <= names
        assert {"inc_output_hooks_maxabs_0_1.npz", "inc_output_hooks_maxabs_MAXABS_HW_0_1.npz"} <= names
        assert f"QUANT_CONFIG={root}/maxabs_quant_{device}.json" in result.stdout
    assert "vllm serve" in result.stdout


@pytest.mark.torch
def test_a_failing_calibration_keeps_its_exit_code(tiny: Path, program: Path, tmp_path: Path) -> None:
    """The shell never turns a failure into success."""
    words = ["-m", tiny / "Model", "-d", "missing.jsonl", "-o", tmp_path / "out"]
    result = run([CALIBRATE, *words], tmp_path, PATH=f"{program}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert "missing.jsonl" in result.stderr
    assert not (tmp_path / "out" / "model" / "g3" / "inc_output_hooks_maxabs_0_1.npz").exists()


# Of vllm-gaudi and vllm-hpu-extension, August 2026.
FLAGS_OF_THE_REFERENCE = {
    "1-prepare-calibration-dataset": "-d --dataset -m --model -o --output_name --max-model-length "
    "--max-dataset-samples --chat-template",
    "2-measure-scales": "-d --dataset -m --model --batch-size --tensor-parallel-size --max-dataset-samples "
    "--max-num-prefill-seqs --block-quant --expert-parallel --auto-process-dataset --enforce-eager --max-model-len "
    "--max-tokens --sample-len -v --verbose --distributed-executor-backend --gpu-memory-utilization",
    "3-postprocess-measure": "-m --measurements -o --out -d --deepseek",
    "4-quantize-scales": "--model --tensor-parallel-size --block-quant --enforce-eager --expert-parallel "
    "--max-num-prefill-seqs --distributed-executor-backend --gpu-memory-utilization --max-model-len",
    "5-unify_measurements": "-m --measurements -r --rank -o --out -u --use_expert_paral -s --skip_unify_scales",
    "6-expand-measurements": "-m --measurements -o --out -w --target_world_size",
}


@pytest.mark.parametrize("name", FLAGS_OF_THE_REFERENCE)
def test_every_flag_of_the_reference_is_taken(name: str, tmp_path: Path) -> None:
    """Long ones and short ones are in --help."""
    result = run_step(name, ["--help"], tmp_path)
    assert set(FLAGS_OF_THE_REFERENCE[name].split()) <= set(re.findall(r"(?<!\S)--?[\w-]+", result.stdout))


def test_step_0_fails_without_a_gaudi(tmp_path: Path) -> None:
    """No device is no exit code 2 or 3, which mean Gaudi 2 and Gaudi 3."""
    result = run_step("0-detect-device", [], tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no Gaudi on this machine" in result.stderr


@pytest.mark.parametrize("digit", [2, 3])
def test_step_0_returns_the_generation(digit: int, tmp_path: Path) -> None:
    """On a Gaudi the exit code is its generation, as calibrate_model.sh of the reference reads it."""
    module = tmp_path / "habana_frameworks" / "torch" / "hpu.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"is_available = lambda: True\nget_device_name = lambda: 'GAUDI{digit}'\n")
    result = run_step("0-detect-device", [], tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert (result.returncode, result.stdout) == (digit, f"g{digit}\n"), result.stderr


@pytest.mark.torch
def test_step_1_writes_what_step_2_reads(tiny: Path, tmp_path: Path) -> None:
    """NAME-calibration-dataset.pkl holds one row of token ids per sample, cut to the model length.

    The reference's step 2 gives each cell of `input` to vLLM, which takes token ids in a dict.
    """
    words = ["-m", tiny / "Model", "-d", tiny / "prompts.jsonl", "-o", "name", "--max-dataset-samples", 3]
    result = run_step("1-prepare-calibration-dataset", [*words, "--max-model-length", 5], tmp_path)
    assert result.returncode == 0, result.stderr
    table = pd.read_pickle(tmp_path / "name-calibration-dataset.pkl")
    assert [len(ids) for ids in table["prompt_token_ids"]] == [5, 5, 5]
    assert all(type(token) is int for ids in table["prompt_token_ids"] for token in ids)
    assert list(table["input"]) == [{"prompt_token_ids": ids} for ids in table["prompt_token_ids"]]


def test_steps_5_and_6_advise_flags_that_they_take(tmp_path: Path) -> None:
    """Where experts are unclear, each step names its own flags, and takes those of the command that it has not."""
    experts = paths.GOLDEN / "mixtral-tiny" / "tp1" / "g2"
    expand = ["-m", experts, "-o", tmp_path / "many"]
    result = run_step("6-expand-measurements", [*expand, "-w", 3], tmp_path)
    assert result.returncode == 1
    assert "divides the experts, or --tensor-parallel\n" in result.stderr
    assert run_step("6-expand-measurements", [*expand, "-w", 2], tmp_path).returncode == 0
    unify = ["-m", tmp_path / "many", "-r", 1, "-o", tmp_path / "one"]
    (tmp_path / "many" / "calibration_manifest.json").unlink(missing_ok=True)
    result = run_step("5-unify_measurements", unify, tmp_path)
    assert result.returncode == 1
    assert "give -u if each rank held experts of its own, --no-expert-parallel if" in result.stderr
    for advised in ("-u", "--no-expert-parallel"):
        result = run_step("5-unify_measurements", [*unify, advised, "-s"], tmp_path)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("6-expand-measurements", ["-m", "ranges", "-w", 0], "'-w' / '--target_world_size'"),
        ("6-expand-measurements", ["-m", "nowhere", "-w", 2], "'-m' / '--measurements'"),
        ("6-expand-measurements", ["-m", "ranges", "-w", 2, "-o", "file"], "'-o' / '--out'"),
        ("5-unify_measurements", ["-m", "ranges", "-r", 0], "'-r' / '--rank'"),
        ("5-unify_measurements", ["-m", "nowhere", "-r", 1], "'-m' / '--measurements'"),
        ("3-postprocess-measure", ["-m", "nowhere"], "'-m' / '--measurements'"),
        ("3-postprocess-measure", ["-m", "ranges", "-o", "file"], "'-o' / '--out'"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_by_the_steps_name_of_it(
    name: str, words: list, message: str, tmp_path: Path
) -> None:
    """One line that names the flag as `--help` of the step has it."""
    (tmp_path / "ranges").mkdir()
    (tmp_path / "file").touch()
    result = run_step(name, words, tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"Error: Invalid value for {message}: "), result.stderr
    own = run_step(name, ["--help"], tmp_path).stdout
    assert all(flag in own for flag in message.replace("'", "").split(" / "))


def test_measuring_again_is_advised_by_the_flag_of_step_2(tmp_path: Path) -> None:
    """Steps 5 and 6 have no -t; the step that measures calls it --tensor-parallel-size."""
    result = run_step("5-unify_measurements", ["-m", paths.GOLDEN / "mixtral-tiny/tp1/g2", "-r", 1], tmp_path)
    assert result.returncode == 1
    assert "measure with a larger --tensor-parallel-size that" in result.stderr


def test_step_6_deals_out_experts_of_a_single_rank_only(tmp_path: Path) -> None:
    """Whether two ranks held slices or experts of their own, it asks, and takes what it advises."""
    start = ["-m", paths.GOLDEN / "mixtral-tiny/tp1/g2", "-w", 2, "-o", tmp_path / "two", "--tensor-parallel"]
    assert run_step("6-expand-measurements", start, tmp_path).returncode == 0
    words = ["-m", "two", "-w", 4, "-o", "four", "--from-world", 2]
    result = run_step("6-expand-measurements", words, tmp_path)
    assert result.returncode == 1
    assert "give -u if each rank held experts of its own, --tensor-parallel if each held" in result.stderr
    assert not (tmp_path / "four").exists()
    for advised in ("-u", "--tensor-parallel"):
        result = run_step("6-expand-measurements", [*words, advised], tmp_path)
        assert result.returncode == 0, result.stderr


@pytest.mark.torch
@pytest.mark.parametrize("place", ["run/model/g2", "elsewhere"])
def test_step_4_takes_expert_parallel_for_files_of_the_reference(place: str, tmp_path: Path) -> None:
    """Rank files alone, no manifest: -u is checked against the ranges, and what contradicts them is told."""
    golden, ranges = paths.GOLDEN / "mixtral-tiny", tmp_path / place
    deal = ["-m", golden / "tp1/g2", "-w", 2, "-o", ranges]
    assert run_step("6-expand-measurements", [*deal, "-s"], tmp_path).returncode == 0
    assert not (ranges / "calibration_manifest.json").exists()
    config = write_config(
        tmp_path / "q.json",
        mode="QUANTIZE",
        scale_method="maxabs_hw",
        dump_stats_path=str(ranges / "inc_output"),
        blocklist=blocked("self_attn", "lm_head"),
    )
    words = ["--model", golden / "model", "--tensor-parallel-size", 2, "--device", "g2"]
    result = run_step("4-quantize-scales", [*words, "--no-expert-parallel"], tmp_path, QUANT_CONFIG=config)
    assert result.returncode == 1
    assert f"where: {ranges}\n" in result.stderr and "fix:   give -u, which" in result.stderr
    result = run_step("4-quantize-scales", [*words, "--expert-parallel"], tmp_path, QUANT_CONFIG=config)
    assert result.returncode == 0, result.stderr
    assert (ranges / "inc_output_hooks_maxabs_MAXABS_HW_1_2.npz").is_file()


@pytest.mark.parametrize("size", [0, -1, "two"])
def test_a_number_of_ranks_is_at_least_one(size: object, tmp_path: Path) -> None:
    """Said before anything is read."""
    config = write_config(tmp_path / "q.json", mode="QUANTIZE", dump_stats_path="./g2/inc_output")
    words = ["--model", "model", "--tensor-parallel-size", size]
    result = run_step("4-quantize-scales", words, tmp_path, QUANT_CONFIG=config)
    assert result.returncode == 2
    assert f"'{size}' is no number of ranks" in result.stderr


@pytest.mark.torch
def test_step_2_lets_a_tokenizer_run_its_code_where_it_is_told_to(tiny: Path, tmp_path: Path) -> None:
    """The reference always does; here the error names the flag, and the step takes it."""
    model = tmp_path / "Model"
    shutil.copytree(tiny / "Model", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "OwnTokenizer"}))
    (model / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    measure = write_config(tmp_path / "m.json", mode="MEASURE", dump_stats_path="./g3/inc_output")
    words = ["-m", model, "-d", "rows.jsonl"]
    env = {"QUANT_CONFIG": measure, "HF_HOME": tmp_path / "hf"}
    result = run_step("2-measure-scales", words, tmp_path, **env)
    assert result.returncode == 1 and "pass --trust-remote-code if you trust" in result.stderr, result.stderr
    result = run_step("2-measure-scales", [*words, "--trust-remote-code"], tmp_path, **env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "g3/inc_output_hooks_maxabs_0_1.npz").is_file()


LONG, UNKNOWN = [1] * 2000, [10**6]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("rows", "words", "advice", "followed"),
    [
        ([LONG], ["--max-model-length", 5000], "pass --max-model-length 512 to", ["--max-model-length", 512]),
        (
            [[1]],
            ["--max-dataset-samples", -3],
            "Invalid value for '--max-dataset-samples'",
            ["--max-dataset-samples", 1],
        ),
        ([[1], UNKNOWN], [], "--skip-bad-rows 1", ["--skip-bad-rows", 1]),
        ([[1]], ["--column", "text=x"], "--column text=FIELD", ["--column", "prompt_token_ids=prompt_token_ids"]),
    ],
    ids=["too long", "samples", "bad row", "column"],
)
def test_step_1_advises_flags_that_it_takes(
    rows: list, words: list, advice: str, followed: list, tiny: Path, tmp_path: Path
) -> None:
    """An error names the step's own flags, and what it advises works."""
    data = write_prompts(tmp_path, rows)
    given = ["-m", tiny / "Model", "-d", data, "-o", tmp_path / "name"]
    result = run_step("1-prepare-calibration-dataset", [*given, *words], tmp_path)
    assert result.returncode in (1, 2) and advice in result.stderr, result.stderr
    assert "--max-tokens" not in result.stderr and " -l " not in result.stderr and "--limit" not in result.stderr
    result = run_step("1-prepare-calibration-dataset", [*given, *followed], tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(pd.read_pickle(tmp_path / "name-calibration-dataset.pkl")) == 1


@pytest.mark.torch
def test_step_2_advises_flags_that_it_takes(tiny: Path, tmp_path: Path) -> None:
    """Its --max-tokens is something else: too long a prompt is cut by --max-model-len, as the error says."""
    data = write_prompts(tmp_path, [LONG, [1, 2]])
    measure = write_config(tmp_path / "m.json", mode="MEASURE", dump_stats_path="./g3/inc_output")
    words = ["-m", tiny / "Model", "-d", data, "-d", tiny / "prompts.jsonl", "--device", "g3"]
    result = run_step("2-measure-scales", words, tmp_path, QUANT_CONFIG=measure)
    assert result.returncode == 1
    assert "pass --max-model-len 512 to cut long prompts" in result.stderr
    assert "--skip-bad-rows 1" in result.stderr
    for more in (["--max-model-len", 512], ["--skip-bad-rows", 1]):
        result = run_step("2-measure-scales", [*words, *more], tmp_path, QUANT_CONFIG=measure)
        assert result.returncode == 0, result.stderr


@pytest.mark.torch
@pytest.mark.parametrize("name", ["2-measure-scales", "4-quantize-scales"])
def test_steps_that_need_quant_config_say_so(name: str, tiny: Path, tmp_path: Path) -> None:
    """Without QUANT_CONFIG the two steps exit with 2 and how to set it."""
    dataset = ["-d", tiny / "prompts.jsonl"] if name.startswith("2") else []
    result = run_step(name, ["--model", tiny / "Model", *dataset], tmp_path)
    assert result.returncode == 2
    assert "QUANT_CONFIG is not set" in result.stderr


@pytest.mark.torch
def test_steps_2_to_6_honour_quant_config_in_the_layout_of_a_run(tiny: Path, tmp_path: Path) -> None:
    """dump_stats_path and blocklist of QUANT_CONFIG decide where the files go and what is in them."""
    directory = tmp_path / "out" / "model" / "g2"
    dump = {"dump_stats_path": str(directory / "inc_output")}
    measure = write_config(tmp_path / "m.json", mode="MEASURE", **dump | {"blocklist": blocked("lm_head")})
    words = ["-m", tiny / "Model", "-d", tiny / "prompts.jsonl", "--tensor-parallel-size", 2]
    result = run_step("2-measure-scales", words, tmp_path, QUANT_CONFIG=measure)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in directory.glob("*hooks*")} == {
        f"inc_output_hooks_maxabs{end}" for end in RANKS_OF_TWO
    }
    assert not any("lm_head" in name for name in node_names(directory / "inc_output_hooks_maxabs_0_2.json"))
    assert not (tmp_path / "out" / "model" / "g3").exists()

    result = run_step("3-postprocess-measure", ["-m", directory, "-o", directory, "-d"], tmp_path)
    assert result.returncode == 0, result.stderr

    quantize = write_config(
        tmp_path / "q.json",
        mode="QUANTIZE",
        scale_method="maxabs_pow2",
        **dump | {"blocklist": blocked("lm_head", "down_proj")},
    )
    words = ["--model", tiny / "Model", "--tensor-parallel-size", 2]
    result = run_step("4-quantize-scales", words, tmp_path, QUANT_CONFIG=quantize)
    assert result.returncode == 0, result.stderr
    names = node_names(directory / "inc_output_hooks_maxabs_MAXABS_POW2_1_2.json")
    assert any("o_proj" in name for name in names)
    assert not any("down_proj" in name for name in names)

    result = run_step("5-unify_measurements", ["-m", directory, "-r", 1, "-o", directory, "-u"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (directory / "inc_output_hooks_maxabs_MAXABS_POW2_0_1.npz").is_file()
    result = run_step("6-expand-measurements", ["-m", directory, "-w", 4, "-o", tmp_path / "four"], tmp_path)
    assert result.returncode == 0, result.stderr
    ends = ("_3_4.npz", "_MAXABS_POW2_3_4.npz")
    assert {path.name for path in (tmp_path / "four").glob("*_3_4.npz")} == {
        f"inc_output_hooks_maxabs{end}" for end in ends
    }
    assert (directory / "inc_output_hooks_maxabs_0_1_mod_list.json").is_file()


def blocked(*names: str) -> Mapping[str, list[str]]:
    """Return a blocklist of names."""
    return {"types": [], "names": list(names)}


@pytest.mark.torch
def test_steps_2_and_4_honour_any_dump_stats_path(tiny: Path, tmp_path: Path) -> None:
    """A path that is no run's layout, relative to the caller, gets files of its own name and nothing else."""
    measure = write_config(tmp_path / "m.json", mode="MEASURE", dump_stats_path="./hqt_output/measure")
    dataset = ["-d", tiny / "prompts.jsonl", "--device", "g3"]
    result = run_step("2-measure-scales", ["-m", tiny / "Model", *dataset], tmp_path, QUANT_CONFIG=measure)
    assert result.returncode == 0, result.stderr
    quantize = write_config(
        tmp_path / "q.json", mode="QUANTIZE", scale_method="maxabs_hw", dump_stats_path="./hqt_output/measure"
    )
    words = ["--model", tiny / "Model", "--device", "g3", "--gpu-memory-utilization", 0.5]
    result = run_step("4-quantize-scales", words, tmp_path, QUANT_CONFIG=quantize)
    assert result.returncode == 0, result.stderr
    assert "no effect with the torch engine: --gpu-memory-utilization" in result.stderr
    ends = ("_0_1.json", "_0_1.npz", "_0_1_mod_list.json", "_MAXABS_HW_0_1.json", "_MAXABS_HW_0_1.npz")
    assert {path.name for path in (tmp_path / "hqt_output").iterdir()} == {f"measure_hooks_maxabs{end}" for end in ends}
    content = np.load(tmp_path / "hqt_output" / "measure_hooks_maxabs_0_1.npz", allow_pickle=True)["arr_0"].item()
    assert content["Nodes"]


@pytest.mark.torch
def test_step_4_continues_a_run_whatever_it_is_called(tiny: Path, tmp_path: Path) -> None:
    """Its manifest knows the model and the scales afterwards; the scales of another checkpoint never get in."""
    from gaudi_calib.cli.main import main
    from gaudi_calib.manifest import read_manifest
    from tests.support.tiny import make_tiny_model

    words = ("-m", tiny / "Model", "-d", tiny / "prompts.jsonl", "-o", tmp_path, "--name", "mine", "--device", "g3")
    assert main(["calibrate", *map(str, words), "--engine", "torch"]) == 0
    config = tmp_path / "mine/maxabs_quant_g3.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scale_method": "maxabs_pow2"}))
    result = run_step("4-quantize-scales", ["-m", tiny / "Model"], tmp_path, QUANT_CONFIG=config)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "mine/g3/calibration_manifest.json")
    assert "inc_output_hooks_maxabs_MAXABS_POW2_0_1.npz" in manifest.scales
    other = make_tiny_model("llama", tmp_path / "other/Model", seed=1)
    result = run_step("4-quantize-scales", ["-m", other], tmp_path, QUANT_CONFIG=config)
    assert result.returncode == 1 and "were measured on another checkpoint" in result.stderr


def test_step_2_wants_a_device_it_can_know(tiny: Path, tmp_path: Path) -> None:
    """Off Gaudi, with a path that names no device, the step asks instead of guessing."""
    measure = write_config(tmp_path / "m.json", mode="MEASURE", dump_stats_path="./hqt_output/measure")
    words = ["-m", tiny / "Model", "-d", tiny / "prompts.jsonl"]
    result = run_step("2-measure-scales", words, tmp_path, QUANT_CONFIG=measure)
    assert result.returncode == 1
    assert "--device g2 or --device g3" in result.stderr
    assert not (tmp_path / "hqt_output").exists()
