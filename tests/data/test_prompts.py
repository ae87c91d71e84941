"""Rows become token ids once and as served; samples, lengths and limits are exact."""

import hashlib
import json
import logging
import struct
from pathlib import Path

import pytest

from gaudi_calib.data.prompts import Prompts, prepare_prompts, write_prompts
from gaudi_calib.data.rows import Row
from gaudi_calib.data.tokens import Rendering, load_tokenizer, tokenize_row
from gaudi_calib.errors import DataError, FileError, ModelError, UsageError
from tests.support.tiny_tokenizer import BOS, LLAMA3_TEMPLATE, MIXTRAL_TEMPLATE, save_tokenizer

USER = {"role": "user", "content": "Hi there"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
TEMPLATES = {"llama3": LLAMA3_TEMPLATE, "mixtral": MIXTRAL_TEMPLATE, "none": None}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories with a tokenizer and a config.json, by chat template."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    for name, template in TEMPLATES.items():
        save_tokenizer(root / name, template)
        (root / name / "config.json").write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 64}))
    return {name: str(root / name) for name in TEMPLATES}


@pytest.fixture(scope="session")
def tokenizers(models):
    return {name: load_tokenizer(model) for name, model in models.items()}


def write_rows(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def of_lengths(tmp_path):
    """Return a call that prepares rows of token ids with the given lengths; row n holds n only."""

    def prepare(*lengths, **options):
        rows = [{"prompt_token_ids": [number] * length} for number, length in enumerate(lengths, 1)]
        (tmp_path / "model").mkdir(exist_ok=True)  # no tokenizer, no config.json
        return prepare_prompts(str(tmp_path / "model"), write_rows(tmp_path / "d.jsonl", rows), **options)

    return prepare


@pytest.mark.parametrize(
    ("template", "messages", "text", "rendering"),
    [
        (
            "llama3",
            [SYSTEM, USER],
            "<s><|system|>\nBe brief.</s><|user|>\nHi there</s><|assistant|>\n",
            "CHAT_TEMPLATE",
        ),
        ("llama3", [USER, ASSISTANT], "<s><|user|>\nHi there</s><|assistant|>\nHello</s>", "CHAT_TEMPLATE"),
        ("mixtral", [USER], "<s>[INST] Hi there [/INST]", "CHAT_TEMPLATE"),
        ("mixtral", [SYSTEM, USER], "<s>[INST] Be brief.\n\nHi there [/INST]", "SYSTEM_FOLDED"),
        ("mixtral", [SYSTEM, USER, ASSISTANT], "<s>[INST] Be brief.\n\nHi there [/INST]Hello</s>", "SYSTEM_FOLDED"),
        ("mixtral", [SYSTEM], "<s>[INST] Be brief. [/INST]", "SYSTEM_FOLDED"),
        ("none", [SYSTEM, USER], "<s>Be brief.\n\nHi there", "TEXT"),
    ],
    ids=lambda value: value if isinstance(value, str) and value in TEMPLATES else "",
)
def test_conversations(tokenizers, template, messages, text, rendering):
    """A conversation becomes what a server makes of it; a refused system role goes into the user's turn."""
    ids, how = tokenize_row(Row(1, messages=tuple(messages)), tokenizers[template])
    assert tokenizers[template].decode(ids) == text
    assert how is Rendering[rendering]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "row",
    [
        Row(1, messages=(SYSTEM, USER)),
        Row(1, messages=(USER, ASSISTANT, USER)),
        Row(1, text="plain text"),
        Row(1, text=f"{BOS}[INST] rendered before [/INST]"),
    ],
    ids=["system", "turns", "text", "rendered"],
)
def test_exactly_one_bos(tokenizers, template, row):
    """Whoever writes BOS, template, tokenizer or dataset, there is one and it comes first."""
    tokenizer = tokenizers[template]
    ids, _ = tokenize_row(row, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_text_bypasses_the_template(tokenizers):
    """Running text is tokenized as a plain prompt even where there is a template."""
    tokenizer = tokenizers["llama3"]
    assert tokenizer.decode(tokenize_row(Row(1, text="Once upon"), tokenizer)[0]) == "<s>Once upon"


def test_token_ids_need_no_tokenizer(of_lengths):
    """Rows of token ids are used as they are."""
    prompts = of_lengths(2, 1)
    assert prompts.token_ids == [[1, 1], [2]]
    assert prompts.renderings == {"token ids": 2}


def test_other_template(models, tmp_path):
    """--chat-template replaces the model's own."""
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}!{{ m['content'] }}{% endfor %}")
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "Hi"}])
    for name in TEMPLATES:
        prompts = prepare_prompts(models[name], data, chat_template=template)
        assert load_tokenizer(models[name]).decode(prompts.token_ids[0]) == "!Hi"
    with pytest.raises(DataError, match="cannot read the chat template"):
        prepare_prompts(models["none"], data, chat_template=tmp_path / "missing.jinja")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{% if %}", [USER], "not valid Jinja"),
        ("{% if %}", [SYSTEM, USER], "not valid Jinja"),
        (MIXTRAL_TEMPLATE, [USER, USER], "refuses the conversation"),
        (MIXTRAL_TEMPLATE, [SYSTEM, USER, USER], "refuses the conversation"),
        (MIXTRAL_TEMPLATE, [USER, {"role": "tool", "content": "x"}, USER, USER], "refuses the conversation"),
        ("{{ messages[5]['content'] }}", [USER], "refuses the conversation"),
    ],
    ids=["syntax", "syntax with system", "turns", "turns after system", "tool", "index"],
)
def test_templates_that_fail(tokenizers, template, messages, message):
    """A template that is invalid or refuses the roles is an error, with the reason."""
    with pytest.raises(DataError, match=message) as caught:
        tokenize_row(Row(3, messages=tuple(messages)), tokenizers["none"], chat_template=template)
    assert caught.value.where in ("row 3", "line 1")
    assert caught.value.why


@pytest.mark.vllm  # installs mistral_common
def test_tokenizer_with_a_chat_format_of_its_own(tmp_path):
    """Mistral's own tokenizer has no template and formats conversations all the same."""
    pytest.importorskip("transformers")
    mistral_common = pytest.importorskip("mistral_common")
    tekken = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    (tmp_path / "tekken.json").symlink_to(tekken)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    tokenizer = load_tokenizer(str(tmp_path))
    for turns in ((SYSTEM, USER), (USER, ASSISTANT), (USER, ASSISTANT, USER)):
        ids, how = tokenize_row(Row(1, messages=turns), tokenizer)
        assert how is Rendering.CHAT_TEMPLATE
        assert tokenizer.decode(ids).startswith("<s>[INST]")
        assert ids.count(tokenizer.bos_token_id) == 1


def test_limit_is_a_reproducible_sample(of_lengths):
    """The sample depends on the seed only, and a smaller limit is the head of a larger one."""
    rows = [1] * 50
    first = [ids[0] for ids in of_lengths(*rows, limit=10, seed=42).token_ids]
    assert first == [ids[0] for ids in of_lengths(*rows, limit=20, seed=42).token_ids][:10]
    assert first != [ids[0] for ids in of_lengths(*rows, limit=10, seed=43).token_ids]
    assert len(of_lengths(*rows, limit=10**30)) == len(rows)
    assert first == [26, 24, 20, 12, 5, 46, 27, 10, 30, 17]  # as with every Python from 3.8 to 3.13
    assert len(set(first)) == 10


def test_without_limit_rows_keep_their_order(of_lengths):
    """Every row, in the dataset's order, whatever the seed."""
    assert of_lengths(1, 2, 3, seed=1).token_ids == [[1], [2, 2], [3, 3, 3]]


def test_long_context_selection(of_lengths):
    """As for DeepSeek-R1: so many prompts of at least N tokens, cut to exactly N."""
    prompts = of_lengths(*range(1, 41), limit=5, min_tokens=20, max_tokens=20)
    assert [len(ids) for ids in prompts.token_ids] == [20] * 5
    assert prompts.truncated == sum(ids[0] > 20 for ids in prompts.token_ids)
    assert all(ids[0] >= 20 for ids in prompts.token_ids)
    everything = of_lengths(*range(1, 41), min_tokens=20, max_tokens=30)
    assert (len(everything), everything.too_short, everything.truncated) == (21, 19, 10)


def test_fewer_rows_than_asked_for(of_lengths, caplog):
    """Too few rows are used all the same, with a warning that says how many and why."""
    with caplog.at_level(logging.WARNING, logger="gaudi_calib"):
        prompts = of_lengths(1, 5, 5, limit=3, min_tokens=5)
    assert len(prompts) == 2
    assert "d.jsonl: 2 prompts, 3 were asked for (3 rows, 1 of them below 5 tokens)" in caplog.text


def test_no_prompt_left(of_lengths):
    """No prompt of the length asked for is an error, not an empty result."""
    with pytest.raises(DataError, match="no prompt is left") as caught:
        of_lengths(1, 2, min_tokens=3)
    assert caught.value.why == "2 rows, 2 of them below 3 tokens"


def test_longer_than_the_context(models, tmp_path):
    """A prompt beyond the model's context names row, lengths and the fix; --max-tokens is the fix."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt_token_ids": [1]}, {"prompt_token_ids": [1] * 65}])
    with pytest.raises(DataError, match="65 tokens, the model's context 64") as caught:
        prepare_prompts(models["none"], data)
    assert caught.value.where == f"{data}, row 2"
    assert "--max-tokens 64" in caught.value.fix
    prompts = prepare_prompts(models["none"], data, max_tokens=64)
    assert ([len(ids) for ids in prompts.token_ids], prompts.truncated) == ([1, 64], 1)
    assert len(prepare_prompts(models["none"], data, max_model_len=65)) == 2
    with pytest.raises(DataError, match="65 tokens"):
        prepare_prompts(models["none"], data, max_tokens=100)


def test_room_for_new_tokens(models, tmp_path):
    """Where tokens follow, a prompt must leave room for them; what is advised is enough."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt_token_ids": [1] * 64}])
    assert len(prepare_prompts(models["none"], data)) == 1
    with pytest.raises(DataError, match="64 tokens, the model's context 64") as caught:
        prepare_prompts(models["none"], data, new_tokens=1)
    assert caught.value.why == "at least one token is generated after it"
    assert "--max-tokens 63" in caught.value.fix
    assert len(prepare_prompts(models["none"], data, new_tokens=1, max_tokens=63)) == 1
    with pytest.raises(DataError, match="64 tokens, --max-model-len 20"):
        prepare_prompts(models["none"], data, max_model_len=20)
    with pytest.raises(UsageError, match="no room for a prompt"):
        prepare_prompts(models["none"], data, max_model_len=1, new_tokens=1)


def test_a_refused_conversation_names_the_dataset(models, tmp_path):
    """What a template refuses is called by dataset and row."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "x"}, {"messages": [USER, USER]}])
    with pytest.raises(DataError, match="refuses the conversation") as caught:
        prepare_prompts(models["mixtral"], data)
    assert caught.value.where == f"{data}, row 2"


def test_unknown_token_id(models, tmp_path):
    """A token id the model does not have is an error naming row and id."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt_token_ids": [299]}, {"prompt_token_ids": [1, 300]}])
    with pytest.raises(DataError, match="token id 300 is outside the model's vocabulary of 300") as caught:
        prepare_prompts(models["none"], data)
    assert caught.value.where == f"{data}, row 2"


def test_prompt_without_tokens(models, tmp_path):
    """A prompt of no tokens is an error naming the row."""
    template = tmp_path / "empty.jinja"
    template.write_text("{# nothing #}")
    data = write_rows(tmp_path / "d.jsonl", [{"prompt_token_ids": [1]}, {"messages": [USER]}])
    with pytest.raises(DataError, match="no tokens") as caught:
        prepare_prompts(models["none"], data, chat_template=template)
    assert caught.value.where == f"{data}, row 2"


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"min_tokens": 0}, {"max_tokens": -1}, {"min_tokens": 9, "max_tokens": 8}],
    ids=str,
)
def test_impossible_options(options):
    """Impossible limits are refused before anything is read."""
    with pytest.raises(UsageError):
        prepare_prompts("model", "missing.jsonl", **options)


def test_hash_is_of_the_ids():
    """The hash covers every id and where prompts begin, in a form that any language can repeat."""
    prompts = Prompts([[1, 2], [70000]])
    content = struct.pack("<5q", 2, 1, 2, 1, 70000)
    assert prompts.sha256 == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert prompts.sha256 != Prompts([[1], [2, 70000]]).sha256


def test_prompts_file(of_lengths, tmp_path):
    """A prompts file gives back the same ids, and is itself a dataset that needs no tokenizer."""
    prompts = of_lengths(3, 1)
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, prompts)
    assert path.read_text().splitlines()[0] == '{"prompt_token_ids": [1, 1, 1]}'
    again = prepare_prompts(str(tmp_path / "model"), str(path))
    assert again.sha256 == prompts.sha256


def test_prompts_file_cannot_be_written(tmp_path):
    """A target that cannot be written is an error of this package."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        write_prompts(tmp_path / "file" / "prompts.jsonl", Prompts([[1]]))


def test_summary(models, tmp_path):
    """The summary accounts for every row and prompt."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "Hi"}, {"text": "x" * 40}, {"prompt_token_ids": [5]}])
    prompts = prepare_prompts(models["llama3"], data, min_tokens=2, max_tokens=30)
    summary = prompts.summary()
    assert (summary["dataset"], summary["rows"], summary["prompts"]) == (data, 3, 2)
    assert (summary["too_short"], summary["truncated"], summary["longest"]) == (1, 1, 30)
    assert summary["tokens"] == sum(map(len, prompts.token_ids))
    assert summary["renderings"] == {"chat template": 1, "plain text": 1}


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2", "gpt_neox"])
def test_model_without_tokenizer(tmp_path, model_type):
    """A model directory without a tokenizer is an error with a way out, never an empty tokenizer."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(DataError, match="no usable tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "prompt_token_ids" in caught.value.fix


@pytest.mark.parametrize("model", ["/no/such/model", "./missing", "a/b/c"])
def test_missing_model_directory(model):
    """A model path that leads nowhere is said to be missing, even where no tokenizer is needed."""
    with pytest.raises(ModelError, match="no model directory"):
        prepare_prompts(model, "builtin")
