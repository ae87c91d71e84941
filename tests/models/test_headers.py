"""Headers of safetensors files, read without safetensors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from gaudi_calib.errors import FileError
from gaudi_calib.models.headers import read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file whose tensors do not lie in the order of their names."""
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((), np.int8), "c": np.ones(0, "f4")}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def write_file(path: Path, header: object, data: bytes = b"") -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)


def test_a_header_says_what_safetensors_finds(path: Path) -> None:
    """Types, shapes, metadata, and where the bytes are."""
    header, content = read_header(path), path.read_bytes()
    with safe_open(path, framework="np") as file:
        assert header.metadata == file.metadata()
        stored = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}
    assert {span.name: (span.dtype, list(span.shape)) for span in header.spans} == stored
    spans = {span.name: content[span.start : span.stop] for span in header.spans}
    assert spans == {"b": np.arange(6, dtype=np.float32).tobytes(), "a": b"\0", "c": b""}
    assert content.startswith(header.prefix) and header.spans[0].start == len(header.prefix)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    """It is one all the same."""
    write_file(tmp_path / "x", {"__metadata__": {"a": "b"}})
    assert read_header(tmp_path / "x").metadata == {"a": "b"}


def entry(start: object, stop: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [2], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("breaks", "why"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(b""), "the file is of 0"),
        (lambda path: path.write_bytes(b"\xff" * 100), "the file is of 100"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its header tells of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "its header tells of"),
        (lambda path: write_file(path, b"\x80"), "is not one of safetensors"),
        (lambda path: write_file(path, [1, 2]), "is not one of safetensors"),
        (lambda path: write_file(path, {"a": {"dtype": "U8"}}), "is not one of safetensors"),
        (lambda path: write_file(path, {"a": entry(0, None)}), "is not one of safetensors"),
        (lambda path: write_file(path, {"a": entry(0, 2), "b": entry(1, 3)}, b"123"), "'b' begins elsewhere"),
        (lambda path: write_file(path, {"a": entry(0, 2), "b": entry(3, 5)}, b"12345"), "'b' begins elsewhere"),
    ],
    ids=["missing", "empty", "huge", "short", "long", "bytes", "list", "fields", "offsets", "overlap", "hole"],
)
def test_a_damaged_file_is_told(path: Path, breaks: Callable[[Path], object], why: str) -> None:
    """Whatever is wrong is an error with the file's name, never a strange exception."""
    breaks(path)
    with pytest.raises(FileError, match=r"cannot read x\.safetensors") as caught:
        read_header(path)
    assert caught.value.why is not None and why in caught.value.why
