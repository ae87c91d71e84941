"""Rows that cannot be used: an error that says how many, or left out, counted and told of."""

import json
from pathlib import Path

import pytest

from gaudi_calib.data.bad_rows import RowError
from gaudi_calib.data.prompts import prepare_prompts
from gaudi_calib.errors import DataError, UsageError
from tests.support.tiny_tokenizer import MIXTRAL_TEMPLATE, save_tokenizer

GOOD = '{"prompt_token_ids": [1]}'
# A line that cannot be used -> what is wrong with it, noticed by one step after another.
BAD = {
    '{"prompt": ': "a line is not valid JSON",
    "[" * 100_000: "a line is not valid JSON",
    "[1]": "a row is a list",
    '{"other": 1}': "the row has no usable column",
    '{"prompt": ""}': "column 'prompt' is empty",
    '{"prompt_token_ids": [1e9]}': "column 'prompt_token_ids' holds",
    '{"prompt_token_ids": [99999999999999999999]}': "column 'prompt_token_ids' holds",
    '{"conversations": [{"from": "gpt", "value": "x"}]}': "the conversation has no turn of a user",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "the chat template refuses the conversation",
    '{"prompt_token_ids": [300]}': "token id 300 is outside the model's vocabulary",
    json.dumps({"prompt_token_ids": [1] * 65}): "the prompt has 65 tokens",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model of 300 tokens and a context of 64, whose template refuses an assistant's turn at the head."""
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(directory, MIXTRAL_TEMPLATE)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 64}))
    return str(directory)


def write_lines(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_a_bad_row_is_left_out_wherever_it_is_noticed(model, tmp_path, caplog, line):
    """The option that the error names leaves it out; the warning says which row, and why."""
    data = write_lines(tmp_path / "d.jsonl", GOOD, line, GOOD)
    with pytest.raises(RowError) as caught:
        prepare_prompts(model, data)
    assert caught.value.what.startswith(BAD[line])
    assert caught.value.where.startswith((f"{data}, row 2", f"{data}, line 2"))
    assert caught.value.fix.endswith("leave out what cannot be used with --skip-bad-rows 1")
    prompts = prepare_prompts(model, data, skip_bad_rows=1)
    assert (prompts.token_ids, prompts.rows, prompts.skipped) == ([[1], [1]], 3, 1)
    assert f"{caught.value.where} is left out: {caught.value.what}" in caplog.text


def test_more_bad_rows_than_allowed(model, tmp_path):
    """The error is that of the first, with the number of all, and that number is enough."""
    data = write_lines(tmp_path / "d.jsonl", GOOD, *[line for line in BAD if "300" in line or "65" in line], '{"a": 1}')
    late = write_lines(
        tmp_path / "late.jsonl", GOOD, '{"prompt_token_ids": [300]}', GOOD, '{"prompt_token_ids": [301]}'
    )
    with pytest.raises(RowError, match="token id 300") as caught:
        prepare_prompts(model, late, skip_bad_rows=1)
    assert caught.value.why == "2 rows cannot be used, and --skip-bad-rows allows 1"
    assert caught.value.fix.endswith("--skip-bad-rows 2")
    assert prepare_prompts(model, late, skip_bad_rows=2).skipped == 2
    with pytest.raises(RowError, match="no usable column"):  # noticed before any row is tokenized
        prepare_prompts(model, data)


def test_rows_keep_their_numbers(model, tmp_path, caplog):
    """A row after one that is left out is called by its place in the file."""
    data = write_lines(tmp_path / "d.jsonl", "{", GOOD, '{"prompt_token_ids": [300]}')
    prepare_prompts(model, data, skip_bad_rows=2)
    assert f"{data}, line 1 is left out" in caplog.text and f"{data}, row 3 is left out" in caplog.text


def test_a_bad_cell_of_a_csv(model, tmp_path):
    """A line with too many cells is one bad row."""
    data = write_lines(tmp_path / "d.csv", "prompt", "fine", "one, two", "fine")
    with pytest.raises(RowError, match="more cells than the header"):
        prepare_prompts(model, data)
    assert len(prepare_prompts(model, data, skip_bad_rows=1)) == 2


def test_the_number_is_of_all_datasets_together(model, tmp_path):
    """Bad rows of several datasets add up."""
    names = [write_lines(tmp_path / name, GOOD, "{") for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(RowError) as caught:
        prepare_prompts(model, names, skip_bad_rows=1)
    assert caught.value.where == f"{names[0]}, line 2"
    assert prepare_prompts(model, names, skip_bad_rows=2).skipped == 2


def test_a_sample_skips_only_the_rows_it_meets(model, tmp_path):
    """Rows beyond the sample are not tokenized, so what is wrong with their tokens is not noticed."""
    data = write_lines(tmp_path / "d.jsonl", *[GOOD] * 20, '{"prompt_token_ids": [300]}')
    assert prepare_prompts(model, data, limit=1).skipped == 0
    assert prepare_prompts(model, data, limit=20, skip_bad_rows=1).token_ids == [[1]] * 20


def test_nothing_is_left(model, tmp_path):
    """Where every row is bad, leaving them out is not advised; told to do so all the same, no prompt is left."""
    data = write_lines(tmp_path / "d.jsonl", "{", "{")
    with pytest.raises(RowError) as caught:
        prepare_prompts(model, data)
    assert "--skip-bad-rows" not in caught.value.fix
    with pytest.raises(DataError, match="no prompt is left") as caught:
        prepare_prompts(model, data, skip_bad_rows=2)
    assert caught.value.why == "2 rows, 2 of them cannot be used"


def test_what_is_wrong_with_all_rows_is_no_bad_row(model, tmp_path):
    """A template that is not valid, and a dataset without a usable column, are not skipped."""
    template = tmp_path / "t.jinja"
    template.write_text("{% if %}")
    data = write_lines(tmp_path / "d.jsonl", '{"prompt": "x"}', '{"prompt": "y"}')
    with pytest.raises(DataError, match="not valid Jinja"):
        prepare_prompts(model, data, chat_template=template, skip_bad_rows=9)
    data = write_lines(tmp_path / "e.jsonl", '{"other": "x"}')
    with pytest.raises(DataError, match="the dataset has no usable column"):
        prepare_prompts(model, data, skip_bad_rows=9)


def test_a_negative_number_is_refused(model):
    """Fewer than none cannot be left out."""
    with pytest.raises(UsageError, match="--skip-bad-rows is -1"):
        prepare_prompts(model, "builtin", skip_bad_rows=-1)
