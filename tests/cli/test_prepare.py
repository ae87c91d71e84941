"""`gaudi-calib prepare` as a user meets it."""

import json

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.data.prompts import prepare_prompts
from tests.support.tiny_tokenizer import LLAMA3_TEMPLATE, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tokenizer, a chat template and a config.json."""
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(directory, LLAMA3_TEMPLATE)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 512}))
    return str(directory)


@pytest.fixture
def data(tmp_path):
    """Five questions under another name."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"title": f"Question {number}?"}) + "\n" for number in range(5)))
    return str(path)


def test_prompts_file_and_summary(model, data, tmp_path, capsys):
    """The file holds what the Python call returns, and --json says how many and their hash."""
    output = tmp_path / "new" / "prompts.jsonl"
    options = ["-l", "3", "--seed", "7", "--max-tokens", "12", "--column", "prompt=title"]
    assert main(["prepare", "-m", model, "-d", data, "-o", str(output), *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    expected = prepare_prompts(model, data, limit=3, seed=7, max_tokens=12, columns={"prompt": "title"})
    assert prepare_prompts(model, str(output)).token_ids == expected.token_ids
    assert summary == {"file": str(output), **expected.summary()}
    assert (summary["prompts"], summary["rows"], summary["truncated"]) == (3, 5, 3)


def test_text_summary(model, data, tmp_path, capsys):
    """Without --json the summary is for people, on stdout."""
    output = tmp_path / "prompts.jsonl"
    assert main(["prepare", "-m", model, "-d", data, "-o", str(output), "--column", "prompt=title"]) == 0
    text = capsys.readouterr().out
    assert f"5 prompts of {data} (5 rows)" in text
    assert "rendered:  5 chat template" in text
    assert str(output) in text


def test_bad_rows_are_counted(model, data, tmp_path, capfd):
    """Rows that are left out are named on stderr, and counted in the summary, for people and as JSON."""
    with open(data, "a") as file:
        file.write("not JSON\n")
    words = ["prepare", "-m", model, "-d", data, "--column", "prompt=title", "-o", str(tmp_path / "prompts.jsonl")]
    assert main(words) == 1
    assert "; --skip-bad-rows 1 leaves out" in capfd.readouterr().err
    assert main([*words, "--skip-bad-rows", "1"]) == 0
    captured = capfd.readouterr()
    assert "5 prompts of" in captured.out and "(6 rows)" in captured.out
    assert "skipped:   1" in captured.out
    assert f"Warning: left out {data}, line 6: a line is not valid JSON (Expecting value" in captured.err
    assert main([*words, "--skip-bad-rows", "1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["skipped"] == 1


def test_several_datasets(model, data, tmp_path, capfd):
    """Each -d is a dataset, with or without a weight; the summary says what each gave."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"title": "What else?"}\n' * 9)
    words = ["prepare", "-m", model, "--column", "prompt=title", "-o", str(tmp_path / "prompts.jsonl")]
    assert main([*words, "-d", data, "-d", str(other)]) == 0
    assert f"14 prompts of {data}, {other} (14 rows)" in capfd.readouterr().out
    assert main([*words, "-d", f"{data}=1", "-d", f"{other}=3", "-l", "8"]) == 0
    text = capfd.readouterr().out
    assert f"of which:  2 of {data}=1 (5 rows)" in text and f"of which:  6 of {other}=3 (9 rows)" in text
    assert main([*words, "-d", data, "-d", str(other), "-l", "7", "--json"]) == 0
    parts = json.loads(capfd.readouterr().out)["parts"]
    assert [(part["dataset"], part["prompts"], part["renderings"]) for part in parts] == [
        (data, 3, {"chat template": 3}),
        (str(other), 4, {"chat template": 4}),
    ]
    assert main([*words, "-d", f"{data}=1", "-d", str(other)]) == 2
    assert f"-d {other}=1" in capfd.readouterr().err


def test_prompts_file_is_a_dataset(model, data, tmp_path):
    """A prompts file given to -d comes out as it went in."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert main(["prepare", "-m", model, "-d", data, "--column", "text=title", "-o", str(first)]) == 0
    assert main(["prepare", "-m", model, "-d", str(first), "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_output_over_the_dataset(model, data):
    """-o equal to -d is safe: the dataset is read before the file is written."""
    assert main(["prepare", "-m", model, "-d", data, "--column", "prompt=title", "-o", data]) == 0
    assert len(prepare_prompts(model, data)) == 5


def test_too_few_prompts_is_said_on_stderr(model, data, tmp_path, capfd):
    """A sample larger than the dataset is warned of."""
    output = str(tmp_path / "p.jsonl")
    assert main(["prepare", "-m", model, "-d", data, "--column", "prompt=title", "-l", "9", "-o", output]) == 0
    assert "5 prompts, 9 were asked for" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--column", "prompt"], 2, "is not NAME=FIELD"),
        (["--column", "prompt="], 2, "is not NAME=FIELD"),
        (["--column", "promt=title"], 2, "unknown column 'promt'"),
        (["--column", "prompt=titel"], 1, "columns: title"),
        ([], 1, "no usable column"),
        (["-l", "0"], 2, "0 is not in the range"),
        (["--min-tokens", "9", "--max-tokens", "8"], 2, "--min-tokens 9 is above --max-tokens 8"),
        (["--column", "prompt=title", "--min-tokens", "100"], 1, "no prompt is left"),
        (["--chat-template", "missing.jinja"], 2, "missing.jinja"),
        (["--column", "prompt=title", "-d", "missing.jsonl"], 1, "no such dataset file"),
        (["-m", "./missing"], 1, "no model directory"),
    ],
    ids=lambda value: " ".join(value) or "(none)" if isinstance(value, list) else "",
)
def test_failures(model, data, tmp_path, monkeypatch, capfd, arguments, code, message):
    """A failure says what is wrong, exits with its code and leaves the last result alone."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "prompts.jsonl"
    output.write_text('{"prompt_token_ids": [1]}\n')
    assert main(["prepare", "-m", model, "-d", data, "-o", str(output), *arguments]) == code
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert output.read_text() == '{"prompt_token_ids": [1]}\n'


@pytest.mark.parametrize("missing", ["-m", "-d", "-o"])
def test_required_options(capfd, missing):
    """Each of -m, -d and -o is required."""
    arguments = [word for flag in ("-m", "-d", "-o") if flag != missing for word in (flag, "x")]
    assert main(["prepare", *arguments]) == 2
    assert f"'{missing}'" in capfd.readouterr().err
