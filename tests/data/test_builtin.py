"""The shipped prompt set is large, diverse and usable with any chat template."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import gaudi_calib.data
from gaudi_calib.data.prompts import prepare_prompts
from gaudi_calib.data.sources import read_rows
from gaudi_calib.data.tokens import load_tokenizer
from gaudi_calib.errors import DataError
from tests.support.tiny_tokenizer import LLAMA3_TEMPLATE, MIXTRAL_TEMPLATE, save_tokenizer

RECORDS = [
    json.loads(line)
    for line in (Path(gaudi_calib.data.__file__).parent / "builtin.jsonl").read_text(encoding="utf-8").splitlines()
]
TEXTS = {record["id"]: "\n".join(turn["content"] for turn in record["messages"]) for record in RECORDS}
SCRIPTS = {
    "Chinese characters": r"[\u4e00-\u9fff]",
    "kana": r"[\u3040-\u30ff]",
    "hangul": r"[\uac00-\ud7af]",
    "Arabic": r"[\u0600-\u06ff]",
    "Devanagari": r"[\u0900-\u097f]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Greek": r"[\u0370-\u03ff]",
    "Hebrew": r"[\u0590-\u05ff]",
    "Thai": r"[\u0e00-\u0e7f]",
    "emoji": r"[\U0001f300-\U0001faff]",
}


def shingles(text: str, size: int = 5) -> set[str]:
    text = " ".join(text.lower().split())
    return {text[start : start + size] for start in range(max(1, len(text) - size + 1))}


def test_size():
    """At least 256 rows, in a file of a few hundred kilobytes."""
    rows = read_rows("builtin")
    assert len(rows) == len(RECORDS) >= 256
    assert len({record["id"] for record in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize(
    ("category", "number"),
    {
        "chat": 30,
        "code": 30,
        "math": 25,
        "language": 80,
        "conversation": 15,
        "system": 15,
        "json": 10,
        "table": 5,
    }.items(),
)
def test_categories(category, number):
    """Every kind of use is there, more than once."""
    assert Counter(record["category"] for record in RECORDS)[category] >= number


@pytest.mark.parametrize("language", ["en", "zh", "ja", "es", "fr", "de", "ar", "hi", "ru", "pt", "ko"])
def test_languages(language):
    """Each large language has at least ten prompts."""
    assert Counter(record["language"] for record in RECORDS)[language] >= 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(script):
    """The scripts of these languages are really in the text."""
    assert any(len(re.findall(SCRIPTS[script], text)) >= 4 for text in TEXTS.values())


@pytest.mark.parametrize(
    "language", ["python", "javascript", "typescript", "rust", "go", "c", "cpp", "java", "sql", "bash"]
)
def test_programming_languages(language):
    """The common programming languages are there."""
    assert any(record["language"] == language for record in RECORDS)


def test_lengths():
    """There are prompts of a few characters and of more than a thousand words."""
    lengths = sorted(map(len, TEXTS.values()))
    assert sum(length <= 40 for length in lengths) >= 20
    assert sum(length >= 1500 for length in lengths) >= 24
    assert max(len(text.split()) for text in TEXTS.values()) >= 1000


def test_no_near_duplicates():
    """No two prompts share more than a fifth of their five-letter sequences."""
    sets = {name: shingles(text) for name, text in TEXTS.items()}
    pairs = [
        (first, second)
        for first, second in combinations(sorted(sets, key=lambda name: len(sets[name])), 2)
        if len(sets[first]) > 0.2 * len(sets[second])  # otherwise they cannot be similar
        and len(sets[first] & sets[second]) > 0.2 * len(sets[first] | sets[second])
    ]
    assert pairs == []


def test_turns_alternate():
    """At most one system turn, first; then user and assistant in turn, the user last, as any template accepts."""
    for record in RECORDS:
        roles = [turn["role"] for turn in record["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == [("user", "assistant")[n % 2] for n in range(len(turns))], record["id"]
        assert turns[-1] == "user", record["id"]


def test_no_special_tokens_of_known_templates():
    """No prompt holds a marker that a chat template gives a meaning to."""
    markers = re.compile(r"<\|[\w ]+\|>|</?s>|\[/?INST\]|<<SYS>>|<(start|end)_of_turn>|<bos>|<eos>")
    assert [name for name, text in TEXTS.items() if markers.search(text)] == []


@pytest.mark.parametrize("template", [LLAMA3_TEMPLATE, MIXTRAL_TEMPLATE, None], ids=["llama3", "mixtral", "none"])
def test_every_row_is_a_prompt(tmp_path, template):
    """Every row goes through templates of all kinds."""
    pytest.importorskip("transformers")
    save_tokenizer(tmp_path, template)
    prompts = prepare_prompts(str(tmp_path), "builtin")
    assert (len(prompts), prompts.truncated) == (len(RECORDS), 0)
    bos = load_tokenizer(str(tmp_path)).bos_token_id
    assert all(ids.count(bos) == 1 for ids in prompts.token_ids)


@pytest.mark.parametrize(
    ("context", "options", "longest"), [(2048, {}, 2047), (64, {}, 63), (64, {"max_tokens": 9}, 9)]
)
def test_it_works_with_every_context(tmp_path, context, options, longest):
    """Prompts longer than the model's context are cut and counted, and leave room for the token that vLLM generates."""
    pytest.importorskip("transformers")
    save_tokenizer(tmp_path, LLAMA3_TEMPLATE)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": context}))
    whole = prepare_prompts(str(tmp_path), "builtin", max_model_len=10**6)
    prompts = prepare_prompts(str(tmp_path), "builtin", **options)
    assert prompts.token_ids == [ids[:longest] for ids in whole.token_ids]
    assert prompts.truncated == sum(len(ids) > longest for ids in whole.token_ids) > 0
    assert prompts.summary()["longest"] == longest
    assert prepare_prompts(str(tmp_path), "builtin", new_tokens=1, **options).sha256 == prompts.sha256
    with pytest.raises(DataError, match="no prompt is left"):
        prepare_prompts(str(tmp_path), "builtin", min_tokens=context)
