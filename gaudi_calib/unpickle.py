"""Pickles of tables and arrays, read without building a single object of theirs.

A pickle is a program: it names classes and functions, calls them and sets their state. Here
every name must be one its reader knows, and is answered with a recorder, which keeps the
arguments and the state and does nothing. What comes out are recorders, lists, tuples, dicts, sets,
text and numbers, from which the reader makes its values; no code of NumPy or pandas runs for the pickle.

Time and memory follow the size of the pickle, whatever it claims: the opcodes that could make them
grow beyond it are carried out here, and what it repeats by reference is counted as often as it occurs.
"""

import gc
import io
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from math import prod
from typing import Any, ClassVar, Self

import numpy as np

from gaudi_calib.errors import FileError

NUMPY_NAMES = {
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},  # bytes of protocols 0 to 2; empty ones are a call
    "__builtin__": {"bytes"},
}
ARRAYS = frozenset({"_reconstruct", "_frombuffer"})
_BYTES = frozenset({"bytes", "bytearray", "encode", "py_buffer"})
_SCALARS = frozenset({int, str, float, bool, bytes, bytearray, type(None)})
# Objects that a pickle may stand for: so many per byte of it, and so many however small it is.
_OBJECTS_PER_BYTE, _LEAST_OBJECTS = 8, 10_000_000
_CONTAINER = 4  # a list takes the memory of so many numbers
_MOST_ARGUMENTS = 16  # of a call
_MOST_AXES = 64  # of a NumPy array

# Opcodes that take nothing but what is on the stack, or a fixed number of bytes or a line. Nearly all are.
_PLAIN = (
    rb"[)\]aesubRtN012l\x81\x85-\x89\x90\x92-\x94]|[hqK].|\((?!d)|C\x04.{4}|[jJ].{4}|M..|G.{8}|\x80[\x00-\x05]"
    rb"|[ILFSVg][^\n]*+\n|c[^\n]*+\n[^\n]*+\n"
)
# Those that begin with a length, and its bytes.
_WIDTHS = {
    **dict.fromkeys((pickle.SHORT_BINUNICODE, pickle.SHORT_BINBYTES, pickle.SHORT_BINSTRING, pickle.LONG1), 1),
    **dict.fromkeys((pickle.BINUNICODE, pickle.BINBYTES, pickle.BINSTRING, pickle.LONG4), 4),
    **dict.fromkeys((pickle.BINUNICODE8, pickle.BINBYTES8, pickle.BYTEARRAY8, pickle.FRAME), 8),
}
_NEW_DICT = pickle.NONE + pickle.BINPERSID
# Those of dicts, the older one after a mark, of sets and of frames.
_REPLACED = {
    pickle.EMPTY_DICT: _NEW_DICT,
    pickle.MARK: _NEW_DICT,
    pickle.EMPTY_SET: pickle.EMPTY_TUPLE + pickle.BINPERSID,
    pickle.FROZENSET: pickle.TUPLE + pickle.BINPERSID,
    pickle.FRAME: b"",
}


class Recorder:
    """What a pickle asked for: `name(*args)`, with `state` if it set one."""

    __slots__ = ("args", "state")
    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        if len(args) > _MOST_ARGUMENTS:
            raise pickle.UnpicklingError(f"a call with {len(args)} arguments")
        recorder = super().__new__(cls)
        recorder.args, recorder.state = args, None
        return recorder

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(Recorder):
    """An array: of numbers as soon as its content is known, as they are many; of objects as NumPy pickles it."""

    __slots__ = ()
    name = "_reconstruct"

    def __setstate__(self, state: Any) -> None:
        self.args, self.state = (), state
        try:
            _, shape, recorded, is_fortran, content = state
            if type(content) is bytes and type(shape) is tuple:
                dtype = _read_dtype(recorded)
                self.state = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
        except Exception:
            return  # of objects, or malformed: `read_array` says so


@cache
def record(name: str) -> type[Recorder]:
    """Return the recorder class that answers to `name`."""
    return _Array if name == _Array.name else type(name, (Recorder,), {"name": name, "__slots__": ()})


def load_recorded(
    content: bytes,
    *,
    find_class: Callable[[str, str], Any],
    count_cells: Callable[[Recorder], int],
    name: str,
) -> Any:
    """Return what the pickle `content` holds, with recorders for the objects that it builds.

    Args:
        find_class: returns what answers to (module, name): a class of `record`, `dict` or a value; or raises
            LookupError to refuse it.
        count_cells: returns how many cells or bytes the reader makes of a recorder, beside what it holds.
        name: what to call the pickle in errors.

    Returns:
        A value without cycles whose size, with all that it repeats written out, is bounded by that of `content`.

    Raises:
        FileError: the pickle refers to something `find_class` refuses, is malformed, or stands for far more than it
            holds.
    """
    try:
        value = _Unpickler(content, find_class, name).load()
        _require_bounded(value, len(content), count_cells)
    except FileError:
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise FileError(
            "not a readable pickle",
            where=name,
            why=f"{type(error).__name__}: {error}",
            fix="get it again from its source, or make it again",
        ) from error
    return value


@contextmanager
def pause_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: it would look again and again at all that has been loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def count_array_cells(recorder: Recorder) -> int:
    """Return how many cells a recorded NumPy array has, or bytes recorded bytes; 0 for others."""
    if recorder.name in ARRAYS:
        shape = recorder.args[2] if recorder.name == "_frombuffer" else recorder.state[1]
        return _count_cells(shape[:_MOST_AXES])
    if recorder.name in _BYTES or recorder.name == "scalar":
        return sum(len(part) for part in recorder.args[:2] if isinstance(part, str | bytes | bytearray))
    return 0


def _count_cells(shape: Sequence[int]) -> int:
    """Return what an array of this shape takes as lists: one of shape (n, 0) is n of them."""
    return prod(max(length, 1) for length in shape)


def read_array(array: Recorder, decode: Callable[[Any], Any]) -> np.ndarray:
    """Return a recorded array, read-only; `decode` is applied to the elements of an object array.

    Raises:
        ValueError: it has a dtype that tables do not have, or its shape does not fit its content.
    """
    if isinstance(array.state, np.ndarray):
        return array.state
    if array.name == "_frombuffer":
        content, recorded, shape, order = array.args
    elif array.name != "_reconstruct":
        raise ValueError(f"{array.name} in place of an array")
    else:
        _, shape, recorded, is_fortran, content = array.state
        order = "F" if is_fortran else "C"
    return _flat_array(content, recorded, decode).reshape(shape, order=order)


def read_scalar(scalar: Recorder, decode: Callable[[Any], Any]) -> np.ndarray:
    """Return a recorded NumPy scalar as an array of shape (); see `read_array`."""
    recorded, content = scalar.args
    return _flat_array(content, recorded, decode).reshape(())


def read_bytes(value: Any) -> bytes:
    """Return recorded bytes; protocols 0 to 2 write them as Latin-1 text.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("latin-1")
    if value.name not in _BYTES:
        raise ValueError(f"{value.name} in place of bytes")
    return read_bytes(value.args[0]) if value.args else b""


def _flat_array(content: Any, recorded: Recorder, decode: Callable[[Any], Any]) -> np.ndarray:
    """Return the flat array that `content`, a list of objects or bytes, holds."""
    dtype = _read_dtype(recorded)
    if not dtype.hasobject:
        return np.frombuffer(read_bytes(content), dtype)
    return np.fromiter(map(decode, content), object, len(content))


def _read_dtype(dtype: Recorder) -> np.dtype:
    """Return a recorded NumPy dtype; times are counted as integers."""
    spec, order = dtype.args[0], dtype.state[1] if dtype.state else "="
    if not type(spec) is type(order) is str:
        raise ValueError("an array of no type")
    return _make_dtype(spec, order)


@lru_cache(maxsize=64)
def _make_dtype(spec: str, order: str) -> np.dtype:
    if not re.fullmatch(r"[biufcSUOMm][0-9]{1,9}", spec):
        raise ValueError(f"an array of type {spec:.20}")
    return np.dtype("O" if spec[0] == "O" else order.replace("|", "=") + re.sub("[Mm]", "i", spec))


def _require_bounded(value: Any, size_bytes: int, count_cells: Callable[[Recorder], int]) -> None:
    """Require that `value` contains neither itself nor far more objects than `size_bytes` can hold."""
    most = max(_LEAST_OBJECTS, _OBJECTS_PER_BYTE * size_bytes)
    weights: dict[int, int] = {}  # by id; 0 while it is weighed

    def weigh(value: Any) -> int:
        if type(value) in _SCALARS:
            return 1
        if type(value) is _Array and type(value.state) is np.ndarray:
            return _CONTAINER + require_held(value, value.state.size or _count_cells(value.state.shape))
        weight = weights.get(id(value))
        if weight is None:
            weights[id(value)] = 0
            weight = weights[id(value)] = weigh_parts(value)
        if weight == 0:
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            raise pickle.UnpicklingError(f"a {kind} that contains itself")
        return weight

    def require_held(recorder: Recorder, cells: int) -> int:
        if not 0 <= cells <= size_bytes:
            raise pickle.UnpicklingError(f"{recorder.name} of {cells} cells in {size_bytes} bytes")
        return cells

    def weigh_parts(value: Any) -> int:
        parts, cells = value, 0
        if isinstance(value, Recorder):
            parts, cells = (value.args, value.state), require_held(value, count_cells(value))
        elif isinstance(value, type):
            parts = ()
        elif isinstance(value, dict):
            parts = [*value, *value.values()]
        nested = [part for part in parts if type(part) not in _SCALARS]
        weight = _CONTAINER + cells + len(parts) - len(nested) + sum(map(weigh, nested))
        if weight > most:
            raise pickle.UnpicklingError(f"{size_bytes} bytes that stand for more than {most} objects")
        return weight

    weigh(value)


def _require_quick(key: Any) -> None:
    """Require a key that is quick to hash and compare: a tuple of tuples can take for ever."""
    is_quick = key.bit_length() <= 64 if type(key) is int else type(key) in _SCALARS or isinstance(key, Recorder)
    if not is_quick:
        raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")


class _Dict(dict[Any, Any]):
    """A dict that looks at a key before it hashes it."""

    __slots__ = ()

    def __new__(cls) -> "_Dict":
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str:
            _require_quick(key)
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state of a dict")


class _Set(Recorder):
    """A set, its members as they came: no table needs one."""

    __slots__ = ()
    name = "set"

    def add(self, member: Any) -> None:
        self.state.append(member)


class _Unpickler(pickle.Unpickler):
    """The unpickler in C, for what `_rewrite` makes of a pickle."""

    def __init__(self, content: bytes, find_class: Callable[[str, str], Any], name: str):
        rewritten = _rewrite(content)
        # In one frame: without, the unpickler reads opcode by opcode.
        super().__init__(io.BytesIO(pickle.FRAME + struct.pack("<Q", len(rewritten)) + rewritten))
        self._find_class, self._name = find_class, name

    def persistent_load(self, members: tuple[Any, ...] | None) -> Any:
        """Return a new dict, or set of `members`."""
        if members is None:
            return _Dict()
        new = _Set()
        new.state = list(members)
        return new

    def find_class(self, module: str, name: str) -> Any:
        try:
            found = self._find_class(module, name)
        except LookupError:
            asked = f"{module:.100}.{name:.100}".encode("unicode_escape").decode()
            raise FileError(
                f"refused to load {asked} from a pickle",
                where=self._name,
                why="loading data never runs code; only known array and table types are allowed",
                fix="store the data as .jsonl or .parquet, or get the file from a source you trust",
            ) from None
        return _Dict if found is dict else found


def _rewrite(content: bytes) -> bytes:
    """Return the opcodes of `content` for `_Unpickler`.

    The unpickler in C makes room for whatever a length claims, keeps a list as long as the largest number under which
    an object is remembered, and hashes any key. So a length or number that is larger than the pickle is refused, and
    every dict and set is asked for by `persistent_load`. Frames go: their lengths would be wrong.
    """
    plain = _compile_plain(min(len(content) >> 16, 0xFFFF))
    parts: list[bytes] = []
    start = position = 0
    while True:
        if run := plain.match(content, position):
            position = run.end()
        opcode = content[position : position + 1]
        if opcode == pickle.STOP:
            return b"".join((*parts, content[start:position], pickle.STOP))
        end = _find_end(content, opcode, position)
        if opcode in _REPLACED:
            parts += content[start:position], _REPLACED[opcode]
            start = end
        position = end


def _find_end(content: bytes, opcode: bytes, position: int) -> int:
    """Return where the arguments of an opcode that is not plain end.

    Raises:
        ValueError: it claims more than the pickle holds, or is one that no table needs.
    """
    position += 1
    if opcode in _WIDTHS:
        start = position + _WIDTHS[opcode]
        end = start + int.from_bytes(content[position:start], "little")
        if end > len(content):
            early = "the pickle ends early" if opcode != pickle.FRAME else "pickle exhausted before end of frame"
            raise pickle.UnpicklingError(early)
        return end if opcode != pickle.FRAME else start
    if opcode == pickle.PUT:
        end = content.index(b"\n", position) + 1
        if int(content[position:end]) <= len(content):
            return end
    if opcode in (pickle.PUT, pickle.LONG_BINPUT):
        raise pickle.UnpicklingError("an object remembered under a number larger than the pickle")
    if opcode == pickle.MARK:  # of an empty dict
        return position + 1
    if opcode not in _REPLACED:
        raise pickle.UnpicklingError("an opcode that no table needs" if opcode else "the pickle ends early")
    return position


@lru_cache(maxsize=16)
def _compile_plain(highest: int) -> re.Pattern[bytes]:
    """Return the pattern of opcodes that claim nothing; objects are remembered under numbers up to `highest` << 16."""
    put = b"r..[\\x00-\\x%02x][\\x00-\\x%02x]" % (min(highest, 0xFF), highest >> 8)
    return re.compile(b"(?:%b|%b)++" % (_PLAIN, put), re.DOTALL)
