"""Every kind of dataset gives the same rows, and a bad one says what is wrong and where."""

import bz2
import gzip
import json
import lzma

import pytest

from gaudi_calib.data.rows import Row
from gaudi_calib.data.sources import read_rows
from gaudi_calib.errors import DataError, UsageError

RECORDS = [
    {"system_prompt": "Be brief.", "question": "Hi, there", "score": 1},
    {"system_prompt": None, "question": 'Say "héllo"\nin two lines', "score": 2},
]
EXPECTED = [
    Row(1, messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, there"})),
    Row(2, messages=({"role": "user", "content": 'Say "héllo"\nin two lines'},)),
]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_table(path, records):
    """Write `records` to `path` in the format of its suffix."""
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(records)
    match path.suffix:
        case ".pkl":
            frame.to_pickle(path)
        case ".parquet":
            frame.to_parquet(path)
        case ".csv":
            frame.to_csv(path, index=False)
        case ".json":
            path.write_text(json.dumps(records))
        case _:
            write_jsonl(path, records)
    return str(path)


@pytest.mark.parametrize("suffix", [".pkl", ".parquet", ".csv", ".json", ".jsonl"])
@pytest.mark.parametrize("compress", [None, gzip, lzma, bz2], ids=["plain", "gz", "xz", "bz2"])
def test_formats(tmp_path, suffix, compress):
    """A table gives the same rows in every format, compressed or not."""
    path = tmp_path / f"data{suffix}"
    write_table(path, RECORDS)
    if compress:
        ending = {gzip: ".gz", lzma: ".xz", bz2: ".bz2"}[compress]
        compressed = path.with_name(path.name + ending)
        compressed.write_bytes(compress.compress(path.read_bytes()))
        path = compressed
    assert read_rows(str(path)) == EXPECTED


@pytest.mark.parametrize(
    "content",
    [
        RECORDS,
        {name: [record[name] for record in RECORDS] for name in RECORDS[0]},
        {name: {str(n): record[name] for n, record in enumerate(RECORDS)} for name in RECORDS[0]},
    ],
    ids=["records", "columns", "columns by index"],
)
def test_json_layouts(tmp_path, content):
    """JSON may be a list of records, or columns, as pandas writes them."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    assert read_rows(str(path)) == EXPECTED


def test_json_that_holds_lines(tmp_path):
    """JSON lines are read from a .json file too, as hub datasets name them."""
    assert read_rows(write_jsonl(tmp_path / "data.json", RECORDS)) == EXPECTED


def test_txt_has_a_prompt_per_line(tmp_path):
    """Each line that is not blank is a user's turn."""
    path = tmp_path / "prompts.txt"
    path.write_text("First prompt\n\n   \n  Zweite Frage \r\n")
    rows = read_rows(str(path))
    assert [row.messages[0]["content"] for row in rows] == ["First prompt", "Zweite Frage"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p", "text": "t"}, Row(1, messages=({"role": "user", "content": "p"},))),
        ({"text": "t", "input": "i"}, Row(1, text="t")),
        ({"input": "<s>i"}, Row(1, text="<s>i")),
        ({"input": "<s>old", "question": "q"}, Row(1, messages=({"role": "user", "content": "q"},))),
        ({"prompt_token_ids": [3, 4], "messages": "ignored"}, Row(1, token_ids=(3, 4))),
        ({"prompt_token_ids": "[3, 4]"}, Row(1, token_ids=(3, 4))),
        ({"messages": [{"role": "user", "content": "m"}]}, Row(1, messages=({"role": "user", "content": "m"},))),
        (
            {"messages": [{"from": "human", "value": "m"}]},
            Row(1, messages=({"role": "user", "content": "m"},)),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            Row(1, messages=({"role": "user", "content": "a\nb"},)),
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_columns(tmp_path, record, expected):
    """The first known column makes the row: ids as they are, turns for the template, text past it."""
    assert read_rows(write_jsonl(tmp_path / "data.jsonl", [record])) == [expected]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("human", "a"), ("gpt", "b")], [user("a"), assistant("b")]),
        ([("system", "s"), ("human", "a")], [{"role": "system", "content": "s"}, user("a")]),
        ([("user", "a"), ("chatgpt", "b"), ("user", "c")], [user("a"), assistant("b"), user("c")]),
        ([("gpt", "lost"), ("human", "a"), ("gpt", "b")], [user("a"), assistant("b")]),
        ([("system", "s"), ("gpt", "lost"), ("human", "a")], [{"role": "system", "content": "s"}, user("a")]),
        ([("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d")], [user("a\n\nb"), assistant("c\n\nd")]),
        (
            [("human", "a"), ("function_call", "f()"), ("observation", "1"), ("tool", "2"), ("gpt", "b")],
            [
                *(user("a"), assistant("f()")),
                *({"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}),
                assistant("b"),
            ],
        ),
    ],
    ids=lambda turns: " ".join(turn[0] for turn in turns) if isinstance(turns[0], tuple) else "",
)
def test_sharegpt_conversations(tmp_path, turns, expected):
    """A conversation begins with its first question; what one speaker says in several turns is one turn."""
    record = {"id": "1", "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    assert read_rows(write_jsonl(tmp_path / "d.jsonl", [record])) == [Row(1, messages=tuple(expected))]
    as_messages = [{"role": turn["role"], "content": turn["content"]} for turn in expected]
    assert read_rows(write_jsonl(tmp_path / "d.jsonl", [{"conversations": as_messages}]))[0].messages == (*expected,)
    as_text = write_table(tmp_path / "d.csv", [{"conversations": json.dumps(record["conversations"])}])
    assert read_rows(as_text) == [Row(1, messages=tuple(expected))]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "gpt", "value": "x"}], "no turn of a user"),
        ([{"from": "system", "value": "x"}], "no turn of a user"),
        ([{"from": "narrator", "value": "x"}], "from 'narrator', which is no known speaker"),
        ([{"from": ["human"], "value": "x"}], "no known speaker"),
        ([{"from": "human", "value": None}], "a message has no text"),
        ([{"from": "human"}], "needs messages with"),
        ([], "'conversations' is empty"),
        ({"from": ["human"], "value": ["x"]}, "holds dict, expected a list"),
    ],
    ids=str,
)
def test_sharegpt_conversations_that_are_none(tmp_path, turns, message):
    """What is no conversation is said to be none, with the row."""
    data = write_jsonl(tmp_path / "d.jsonl", [{"conversations": turns}])
    with pytest.raises(DataError) as caught:
        read_rows(data)
    assert message in caught.value.what
    assert caught.value.where.startswith(f"{data}, row 1")


@pytest.mark.parametrize(
    ("record", "columns", "text"),
    [
        ({"instruction": "Do", "input": "this", "output": "done"}, {}, "Do\n\nthis"),
        ({"instruction": "Do", "input": " "}, {}, "Do"),
        ({"instruction": "Do", "input": None}, {}, "Do"),
        ({"instruction": "Do"}, {}, "Do"),
        ({"task": "Do", "input": "this"}, {"instruction": "task"}, "Do\n\nthis"),
        ({"task": "Do", "about": "this"}, {"instruction": "task", "input": "about"}, "Do\n\nthis"),
        ({"instruction": "Do", "input": "this"}, {"prompt": "instruction"}, "Do"),
        ({"instruction": "Do", "input": "this", "prompt": "Why?"}, {}, "Why?"),
    ],
    ids=str,
)
def test_alpaca_instructions(tmp_path, record, columns, text):
    """An instruction with its input below it is the user's turn; the answer is not part of the prompt."""
    data = write_jsonl(tmp_path / "d.jsonl", [record])
    assert read_rows(data, columns=columns) == [Row(1, messages=(user(text),))]


@pytest.mark.parametrize(
    ("record", "columns", "text"),
    [
        ({"instruction": "Do", "input": "this", "text": "### Do this"}, {}, "### Do this"),
        ({"conversations": [{"from": "human", "value": "x"}], "text": "<s>x"}, {}, "<s>x"),
        ({"conversations": [{"from": "human", "value": "x"}], "input": "<s>x"}, {}, "<s>x"),
        ({"instruction": "Do", "input": "<s>x"}, {"input": "input"}, "<s>x"),
    ],
    ids=str,
)
def test_older_columns_win_over_conversations_and_instructions(tmp_path, record, columns, text):
    """A dataset that was read before these two columns were known is read as it was."""
    data = write_jsonl(tmp_path / "d.jsonl", [record])
    assert read_rows(data, columns=columns) == [Row(1, text=text)]


def test_an_instruction_has_a_system_prompt(tmp_path):
    """`system_prompt` goes before an instruction as before any question."""
    data = write_jsonl(tmp_path / "d.jsonl", [{"system_prompt": "Be brief.", "instruction": "Do"}])
    assert read_rows(data)[0].messages == ({"role": "system", "content": "Be brief."}, user("Do"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "title"}, Row(1, messages=({"role": "user", "content": "T"},))),
        ({"text": "title"}, Row(1, text="T")),
        (
            {"prompt": "title", "system_prompt": "role"},
            Row(1, messages=({"role": "system", "content": "R"}, {"role": "user", "content": "T"})),
        ),
        (
            {"system_prompt": "role"},
            Row(1, messages=({"role": "system", "content": "R"}, {"role": "user", "content": "Q"})),
        ),
        ({"input": "question"}, Row(1, text="Q")),
    ],
    ids=str,
)
def test_column_mapping(tmp_path, columns, expected):
    """--column names the field of a column, and wins over columns that are there anyway."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "Q", "title": "T", "role": "R"}])
    assert read_rows(data, columns=columns) == [expected]


def test_rows_may_differ(tmp_path):
    """JSON lines may mix conversations, prompts and token ids."""
    records = [{"prompt": "a"}, {"prompt_token_ids": [1]}, {"text": "b"}]
    rows = read_rows(write_jsonl(tmp_path / "data.jsonl", records))
    assert [(row.messages is not None, row.token_ids, row.text) for row in rows] == [
        (True, None, None),
        (False, (1,), None),
        (False, None, "b"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": None}, "'prompt' is empty"),
        ({"prompt": "  \n"}, "'prompt' is empty"),
        ({"question": float("nan")}, "'question' is empty"),
        ({"prompt": 3}, "'prompt' holds int, expected text"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' holds str, expected a list"),
        ({"messages": ["hello"]}, "needs messages with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": ""}]}, "a message has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "something other than text"),
        ({"prompt_token_ids": []}, "'prompt_token_ids' is empty"),
        ({"prompt_token_ids": [1, -2]}, "holds -2 at position 1"),
        ({"prompt_token_ids": [1, True]}, "holds True at position 1"),
        ({"prompt_token_ids": [0.5]}, "holds 0.5 at position 0"),
        ({"other": "x"}, "no usable column"),
    ],
    ids=str,
)
def test_bad_cells_name_the_row(tmp_path, record, message):
    """An empty or wrong cell is an error with the number of its row."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "fine"}, record])
    with pytest.raises(DataError) as caught:
        read_rows(data)
    assert message in caught.value.what
    assert f"{data}, row 2" in caught.value.where


def test_no_usable_column(tmp_path):
    """A table without a known column is refused; the error lists its columns and the fix."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"title": "Do it", "body": "", "output": "done"}])
    with pytest.raises(DataError) as caught:
        read_rows(data)
    assert caught.value.why == "columns: title, body, output"
    assert "--column NAME=FIELD" in caught.value.fix
    assert read_rows(data, columns={"prompt": "title"})[0].messages[0]["content"] == "Do it"


def test_bad_mapping(tmp_path):
    """--column with an unknown name or an absent field is refused."""
    data = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    with pytest.raises(UsageError, match="unknown column 'promt'"):
        read_rows(data, columns={"promt": "question"})
    with pytest.raises(DataError, match="no column 'titel'") as caught:
        read_rows(data, columns={"prompt": "titel"})
    assert "system_prompt, question, score" in caught.value.why


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": \n', "a line is not valid JSON", "line 3"),
        ("a.jsonl", '{"prompt": "x"}\n[1]\n', "a row is a list", "line 2"),
        ("a.json", '{"prompt": ', "not valid JSON", "a.json"),
        ("a.json", "3", "holds int, expected rows", "a.json"),
        ("a.json", '{"a": [1, 2], "b": [1]}', "differ in length", "a.json"),
        ("a.csv", "prompt,score\nhello, world,3\n", "more cells than the header", "row 1"),
        ("a.csv", 'prompt\n"never closed\n', "not valid CSV", "line 2"),
        ("a.parquet", "PAR1 not really", "not a readable Parquet file", "a.parquet"),
        ("a.txt", "\n \n", "the dataset is empty", "a.txt"),
        ("a.jsonl", "", "the dataset is empty", "a.jsonl"),
        ("a.json", "[]", "the dataset is empty", "a.json"),
        ("a.csv", "prompt\n", "the dataset is empty", "a.csv"),
        ("a.xml", "<a/>", "unknown dataset suffix '.xml'", "a.xml"),
        ("data", "x", "unknown dataset suffix '(none)'", "data"),
        ("a.jsonl.gz", "not compressed", "cannot read the dataset", "a.jsonl.gz"),
        ("a.jsonl.xz", "not compressed", "cannot read the dataset", "a.jsonl.xz"),
    ],
)
def test_bad_files(tmp_path, name, content, what, where):
    """A malformed or empty file is an error that names the file and, where there is one, the line."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert what in caught.value.what
    assert where in caught.value.where


def test_not_utf8(tmp_path):
    """Text in another encoding is refused."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(str(path))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/dataset", "a/b/c", "data.pkl.gz"])
def test_missing_file(name):
    """A path that leads nowhere is called a missing file, not a hub dataset."""
    with pytest.raises(DataError, match="no such dataset file"):
        read_rows(name)


def test_hub_without_connection(monkeypatch):
    """A hub name that cannot be had says so, and how to go on without the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="the Hugging Face hub did not provide it") as caught:
        read_rows("nobody/no-such-dataset")
    assert "download it elsewhere" in caught.value.fix
    assert "builtin" in caught.value.fix


def test_relative_and_home_paths(tmp_path, monkeypatch):
    """Paths are relative to the caller's directory, and ~ is the home directory."""
    write_jsonl(tmp_path / "data.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_rows("data.jsonl") == read_rows("~/data.jsonl") == EXPECTED


def test_saved_datasets(tmp_path):
    """What datasets.save_to_disk wrote is read; of several splits the train split."""
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([*RECORDS])
    train.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"test": train.select([0]), "train": train})
    splits.save_to_disk(str(tmp_path / "splits"))
    assert read_rows(str(tmp_path / "one")) == read_rows(str(tmp_path / "splits")) == EXPECTED
    with pytest.raises(DataError, match="no column 'x'") as caught:
        read_rows(str(tmp_path / "one"), columns={"prompt": "x"})
    assert "score" in caught.value.why


def test_saved_dataset_without_train_split(tmp_path):
    """Several splits and none called train is ambiguous."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "x"}])
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path))
    with pytest.raises(DataError, match="no split 'train'"):
        read_rows(str(tmp_path))


def test_directory_of_data_files(tmp_path):
    """The files of a directory are read in order of name; hidden ones and READMEs are not data."""
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "2"}])
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1"}])
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "0.jsonl", [{"prompt": "0"}])
    assert [row.messages[0]["content"] for row in read_rows(str(tmp_path))] == ["1", "2"]
    assert [row.number for row in read_rows(str(tmp_path))] == [1, 2]


def test_directory_of_a_downloaded_dataset(tmp_path):
    """Of a hub dataset's directory, the train split's files are read."""
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", [{"prompt": "no"}])
    write_table(tmp_path / "data" / "train-00000-of-00002.parquet", [{"prompt": "1"}])
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", [{"prompt": "2"}])
    assert [row.messages[0]["content"] for row in read_rows(str(tmp_path))] == ["1", "2"]


def test_ambiguous_and_empty_directories(tmp_path):
    """A directory without data, or with several datasets, is refused."""
    with pytest.raises(DataError, match="holds no dataset"):
        read_rows(str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}])
    write_table(tmp_path / "b.csv", [{"prompt": "x"}])
    with pytest.raises(DataError, match="several datasets") as caught:
        read_rows(str(tmp_path))
    assert caught.value.why == "a.jsonl, b.csv"


def test_nested_cells_of_parquet(tmp_path):
    """Messages and token ids in Parquet columns are plain lists."""
    write_table(tmp_path / "m.parquet", [{"messages": [{"role": "user", "content": "x"}]}])
    write_table(tmp_path / "t.parquet", [{"prompt_token_ids": [1, 2]}])
    assert read_rows(str(tmp_path / "m.parquet"))[0].messages == ({"role": "user", "content": "x"},)
    assert read_rows(str(tmp_path / "t.parquet"))[0].token_ids == (1, 2)
