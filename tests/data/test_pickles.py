"""Pickled tables of every pandas are read; nothing of a pickle ever runs."""

import contextlib
import functools
import io
import operator
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from gaudi_calib.data.pickles import read_pickle
from gaudi_calib.data.sources import read_rows
from gaudi_calib.errors import CalibrationError, DataError, FileError
from tests.support import hostile, paths
from tests.support.processes import run_limited

PICKLES = paths.GOLDEN / "pickles"
TABLES = sorted(path.name for path in PICKLES.glob("*.pkl*"))
QUESTIONS = ["What is 2 + 2?", "Name three rivers.", "Où est la tour Eiffel ? 🗼"]


def load(name: str):
    with (PICKLES / name).open("rb") as file:
        return read_pickle(file, name=name)


@pytest.mark.parametrize("name", [name for name in TABLES if "-arrow" not in name])
def test_rows_of_every_pandas(name):
    """A DataFrame of pandas 1.1 to 3.1, compressed or not, gives the same questions."""
    rows = read_rows(str(PICKLES / name), columns={"question": "question"})
    assert [row.messages[-1]["content"] for row in rows] == QUESTIONS


@pytest.mark.parametrize("name", [name for name in TABLES if "dtypes" not in name and "-arrow" not in name])
def test_system_prompts(name):
    """The system prompt becomes the first turn, and an empty one no turn."""
    rows = read_rows(str(PICKLES / name), columns={"question": "question"})
    assert rows[0].messages[0] == {"role": "system", "content": "You are terse."}
    assert [len(row.messages) for row in rows] == [2, 1, 2]


@pytest.mark.parametrize("name", [name for name in TABLES if name.endswith(("0.pkl", "1.pkl", "3.pkl", "5.pkl"))])
def test_every_block_type(name):
    """Text, integers, floats, booleans and lists are read from their blocks."""
    table = load(name)
    assert table["score"] == [1, 2, 3]
    assert table["ratio"] == pytest.approx([0.5, np.nan, 2.0], nan_ok=True)
    assert table["flag"] == [True, False, True]
    assert table["prompt_token_ids"] == [[1, 2, 3], [4, 5], [6]]


@pytest.mark.parametrize("name", [name for name in TABLES if "dtypes" in name])
def test_extension_types(name):
    """Nullable text and integers and categories are read, missing values as None."""
    table = load(name)
    assert table["string"] == ["a", "b", None]
    assert table["category"] == ["x", "y", "x"]
    assert table["integer"] == [1, None, 3]


@pytest.mark.parametrize("name", [name for name in TABLES if "-arrow" in name])
def test_arrow_text(name):
    """Text held by Arrow is read without pyarrow, missing values as None."""
    assert load(name) == {"question": ["a", "ü", "c"], "other": ["d", None, "f"]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("rows", [slice(2, 5), slice(None, None, 2), slice(5, 0, -1)], ids=str)
def test_views_of_the_installed_pandas(rows, protocol):
    """Slices and concatenations of a table, which share buffers, give what pandas itself gives."""
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"question": ["a", None, "ç"] * 3, "ids": [[1], [2, 3], []] * 3, "n": range(9)})
    frame = pd.concat([frame.iloc[rows], frame.iloc[1:3]])
    table = read_pickle(io.BytesIO(pickle.dumps(frame, protocol)), name="frame")
    assert table["ids"] == frame["ids"].to_list()
    assert table["n"] == frame["n"].to_list()
    assert [cell if isinstance(cell, str) else None for cell in table["question"]] == [
        cell if isinstance(cell, str) else None for cell in frame["question"]
    ]


def test_plain_containers():
    """Lists of dicts and dicts of lists are read too, NumPy scalars and arrays in them as Python values."""
    rows = [{"prompt": np.str_("hé"), "ids": np.array([1, 2]), "n": np.int64(3), "x": np.float32(0.5), "o": None}]
    value = read_pickle(io.BytesIO(pickle.dumps(rows)), name="rows")
    assert value == [{"prompt": "hé", "ids": [1, 2], "n": 3, "x": 0.5, "o": None}]
    assert read_pickle(io.BytesIO(pickle.dumps({"prompt": ["a"]})), name="rows") == {"prompt": ["a"]}


def test_pandas_is_not_needed():
    """Reading a DataFrame loads neither pandas nor pyarrow."""
    code = (
        "import sys; from gaudi_calib.data.sources import read_rows; "
        f"assert len(read_rows({str(PICKLES / 'pandas3.1-arrow.pkl')!r})) == 3; "
        "assert not {'pandas', 'pyarrow', 'transformers', 'datasets', 'torch'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "system"),
        (eval, ("open({!r}, 'w')",), "builtins.eval"),
        (exec, ("open({!r}, 'w')",), "builtins.exec"),
        (getattr, (os, "system"), "builtins.getattr"),
        (open, ("{}", "w"), "io.open"),
        (__import__, ("os",), "builtins.__import__"),
        (functools.partial, (os.system, "touch {}"), "functools.partial"),
        (operator.attrgetter("system"), (), "operator.attrgetter"),
        (operator.methodcaller("system"), (), "operator.methodcaller"),
        (subprocess.Popen, (["touch", "{}"],), "subprocess.Popen"),
        (np.load, ("{}",), "numpy.load"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__) if callable(value) else "",
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_is_refused_by_name(tmp_path, function, args, name, protocol):
    """A pickle that asks for anything but tables is refused, names it, and has done nothing."""
    target = tmp_path / "created"
    args = tuple(arg.format(str(target)) if isinstance(arg, str) else arg for arg in args if arg is not os)
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps([{"prompt": "x"}, Call(function, *args)], protocol))
    with pytest.raises(FileError, match="refused to load") as caught:
        read_rows(str(path))
    assert name.rpartition(".")[2] in caught.value.what
    assert not target.exists()


@pytest.mark.parametrize(
    "target",
    ["pandas.eval", "pandas.read_pickle", "pandas.io.common.get_handle", "pandas.DataFrame.to_csv", "numpy.core.os"],
)
def test_other_names_of_table_libraries_are_refused(target):
    """Being part of pandas or NumPy is not enough."""
    module, _, name = target.rpartition(".")
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93."
    with pytest.raises(FileError, match="refused to load"):
        read_pickle(io.BytesIO(content), name="bad")


def test_a_refused_name_is_printed_safely():
    """A name cannot write to the terminal, nor fill it."""
    content = hostile.finish(hostile.text("\x1b[31mos\n") + b"X\x40\x42\x0f\x00" + b"x" * 1_000_000 + b"\x93")
    with pytest.raises(FileError, match="refused to load") as caught:
        read_pickle(io.BytesIO(content), name="bad")
    assert caught.value.what.isprintable() and len(caught.value.what) < 300


def test_allowed_names_cannot_be_changed():
    """A pickle that sets attributes on what it may name does not change it for the next."""
    content = b"\x80\x02cpandas\nDataFrame\nN}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86b."
    with pytest.raises(CalibrationError):
        read_pickle(io.BytesIO(content), name="bad")
    assert load("pandas3.1.pkl")["question"] == QUESTIONS


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1, 2, 3])[:-1], b"\x80\x04\x8c\x06pandas\x8c\x09DataFrame\x93)\x81."],
    ids=["empty", "text", "truncated", "frame without content"],
)
def test_malformed(content):
    """A malformed pickle is an error of this package, whatever is wrong with it."""
    with pytest.raises((DataError, FileError)) as caught:
        read_pickle(io.BytesIO(content), name="broken.pkl")
    assert caught.value.where == "broken.pkl"


@pytest.mark.parametrize("name", ["pandas1.1-dtypes.pkl", "pandas3.1-dtypes.pkl"])
def test_damaged_files(name):
    """A real pickle cut anywhere or with a flipped byte gives a table or an error of this package."""
    content = (PICKLES / name).read_bytes()
    cut = [content[:length] for length in range(0, len(content), 7)]
    flipped = [content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :] for at in range(3, len(content), 14)]
    for damaged in cut + flipped:
        with contextlib.suppress(DataError, FileError):
            read_pickle(io.BytesIO(damaged), name=name)


BOMBS = hostile.BOMBS | hostile.TABLE_BOMBS
READ = """
import sys
from gaudi_calib.data.sources import read_rows
from gaudi_calib.errors import CalibrationError
try:
    read_rows(sys.argv[1])
except CalibrationError as error:
    print(error)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_takes_little(tmp_path, name):
    """What a small file claims or repeats takes neither gigabytes nor minutes, and the error says what it is."""
    opcodes, message = BOMBS[name]
    path = tmp_path / "bomb.pkl"
    path.write_bytes(hostile.finish(opcodes))
    result = run_limited(READ, path)
    assert message in result.stdout and "MemoryError" not in result.stdout, result
    assert str(path) in result.stdout and "fix:" in result.stdout


def test_nine_bytes_do_not_take_gigabytes(tmp_path):
    """An object remembered under number 4 294 967 295 is refused: a list of that length would be made."""
    path = tmp_path / "bomb.pkl"
    path.write_bytes(b"\x80\x04Nr\xff\xff\xff\xff.")
    assert "a number larger than the pickle" in run_limited(READ, path).stdout


def test_rows_may_be_repeated():
    """The same row a thousand times is a dataset, though its file holds the row once."""
    row = {"prompt_token_ids": list(range(5000))}
    content = pickle.dumps([row] * 1000)
    assert len(content) < 20_000
    assert read_pickle(io.BytesIO(content), name="rows") == [row] * 1000


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_of_every_opcode(protocol):
    """Long lists of numbers, which are read at once, are what they were, whatever stands among them."""
    mixed = [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31), 2**63, 2**70, 0.5, True, False, None, "(", [7], "K"]
    value = [mixed * 200, list(range(70_000)), {"a": [1.5] * 2000, 1: [], None: [[]]}]
    loaded = read_pickle(io.BytesIO(pickle.dumps(value, protocol)), name="numbers")
    assert repr(loaded) == repr(value)
