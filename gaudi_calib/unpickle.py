"""Pickles of tables and arrays, read without building a single object of theirs.

A pickle is a program: it names classes and functions, calls them and sets their state. Here
every name must be one its reader knows, and is answered with a recorder, which keeps the
arguments and the state and does nothing. What comes out are recorders, lists, tuples, dicts, sets,
text and numbers, from which the reader makes its values; no code of NumPy or pandas runs for the pickle.

Time and memory follow the size of the pickle, whatever it claims: the opcodes that could make them
grow beyond it are carried out here, and what it repeats by reference is counted as often as it occurs.
"""

import io
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from math import prod
from typing import Any, ClassVar

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
_DEEPEST = 1000
_MOST_AXES = 64  # of a NumPy array
# Opcodes of numbers, None and booleans: they can be left to the unpickler in C, and lists of token ids are long.
_NUMBERS = re.compile(rb"(?:J....|M..|K.|G........|[N\x88\x89])++", re.DOTALL)

# What no pickler of today writes, or what asks the unpickler for objects in ways of its own.
_REFUSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)


class Recorder:
    """What a pickle asked for: `name(*args)`, with `state` if it set one."""

    name: str

    def __init__(self, args: tuple[Any, ...]):
        self.args = args
        self.state: Any = None


@cache
def record(name: str) -> type[Recorder]:
    """Return the recorder class that answers to `name`."""
    return type(name, (Recorder,), {"name": name})


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
        value = _Machine(content, find_class, name).load()
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


def count_array_cells(recorder: Recorder) -> int:
    """Return how many cells a recorded NumPy array has, or bytes recorded bytes; 0 for others."""
    if recorder.name in ARRAYS:
        shape = recorder.args[2] if recorder.name == "_frombuffer" else recorder.state[1]
        return prod(max(length, 1) for length in shape[:_MOST_AXES])  # an array of shape (n, 0) is a list of n lists
    if recorder.name in _BYTES or recorder.name == "scalar":
        return sum(len(part) for part in recorder.args[:2] if isinstance(part, str | bytes | bytearray))
    return 0


def read_array(array: Recorder, decode: Callable[[Any], Any]) -> np.ndarray:
    """Return a recorded array, read-only; `decode` is applied to the elements of an object array.

    Raises:
        ValueError: it has a dtype that tables do not have, or its shape does not fit its content.
    """
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
    return _make_dtype(dtype.args[0], dtype.state[1] if dtype.state else "=")


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
        weight = weights.get(id(value))
        if weight is None:
            weights[id(value)] = 0
            weight = weights[id(value)] = weigh_parts(value)
        if weight == 0:
            raise pickle.UnpicklingError(f"a {type(value).__name__} that contains itself")
        return weight

    def weigh_parts(value: Any) -> int:
        parts, cells = value, 0
        if isinstance(value, Recorder):
            parts, cells = (value.args, value.state), count_cells(value)
            if not 0 <= cells <= size_bytes:
                raise pickle.UnpicklingError(f"{value.name} of {cells} cells in {size_bytes} bytes")
        elif isinstance(value, type):
            parts = ()
        elif isinstance(value, dict):
            parts = [*value, *value.values()]
        is_flat = _SCALARS.issuperset(map(type, parts))
        weight = _CONTAINER + cells + (len(parts) if is_flat else sum(map(weigh, parts)))
        if weight > most:
            raise pickle.UnpicklingError(f"{size_bytes} bytes that stand for more than {most} objects")
        return weight

    weigh(value)


def _require_keys(keys: Iterable[Any]) -> None:
    """Require keys that are quick to hash and compare: a tuple of tuples can take for ever."""
    for key in keys:
        is_quick = key.bit_length() <= 64 if type(key) is int else type(key) in _SCALARS or isinstance(key, Recorder)
        if not is_quick:
            raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")


class _Machine(pickle._Unpickler):
    """The unpickler in Python, with recorders for objects.

    The one in C keeps a list as long as the largest number under which an object is remembered, and hashes any key.
    """

    # What pickle._Unpickler has while it loads.
    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes, find_class: Callable[[str, str], Any], name: str):
        self._content, self._stream = content, io.BytesIO(content)
        self._find_class, self._name = find_class, name
        super().__init__(self._stream)

    def load(self) -> Any:
        """Return what the pickle leaves on the stack."""
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        self.read, self.readline = self._stream.read, self._stream.readline
        for opcode in iter(partial(self.read, 1), pickle.STOP):
            if not opcode:
                raise EOFError("the pickle ends early")
            self.dispatch[opcode[0]](self)
        return self.stack.pop()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._find_class(module, name)
        except LookupError:
            asked = f"{module:.100}.{name:.100}".encode("unicode_escape").decode()
            raise FileError(
                f"refused to load {asked} from a pickle",
                where=self._name,
                why="loading data never runs code; only known array and table types are allowed",
                fix="store the data as .jsonl or .parquet, or get the file from a source you trust",
            ) from None

    def _enter_frame(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        if size > len(self._content) - self._stream.tell():
            raise pickle.UnpicklingError("pickle exhausted before end of frame")

    def _mark(self) -> None:
        if len(self.metastack) >= _DEEPEST:
            raise pickle.UnpicklingError("nested too deeply")
        self.metastack.append(self.stack)
        self.stack = []
        if run := _NUMBERS.match(self._content, self._stream.tell()):
            self.stack = pickle.loads(b"".join((pickle.MARK, run[0], pickle.LIST, pickle.STOP)))  # noqa: S301
            self._stream.seek(run.end())
        self.append = self.stack.append

    def _call(self) -> None:
        args, called = self.stack.pop(), self.stack[-1]
        is_recorder = isinstance(called, type) and issubclass(called, Recorder)
        if not isinstance(args, tuple) or not (is_recorder or (called is dict and not args)):
            raise pickle.UnpicklingError(f"a call of {called!r:.80}")
        self.stack[-1] = called(args) if is_recorder else {}

    def _call_with_keywords(self) -> None:
        self.stack.pop()
        self._call()

    def _set_state(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Recorder):
            raise pickle.UnpicklingError(f"state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].state = state

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        _require_keys(keys)
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError(f"items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(keys, values, strict=True))

    def _add_items(self) -> None:
        items = self.pop_mark()
        _require_keys(items)
        self.stack[-1].update(items)

    def _make_frozenset(self) -> None:
        items = self.pop_mark()
        _require_keys(items)
        self.append(frozenset(items))

    def _make_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an opcode that no table needs")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(b"".join(_REFUSED), _refuse),
        pickle.FRAME[0]: _enter_frame,
        pickle.MARK[0]: _mark,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.NEWOBJ_EX[0]: _call_with_keywords,
        pickle.BUILD[0]: _set_state,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _make_dict,
        pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _make_frozenset,
        pickle.BYTEARRAY8[0]: _make_bytearray,
    }
