"""Pickled tables, read without building a single object of theirs.

Every class or function a pickle asks for must be on the list below, and is answered
with a recorder: a class of this module that keeps its arguments and state and does
nothing. The table is then read from what was recorded, so no code of pandas, NumPy
or pyarrow runs on the pickle's behalf, and a table opens whatever pandas wrote it
(1.x, 2.x and 3.x) and whatever pandas is installed, or none.

What was recorded, for a DataFrame:

    DataFrame, state {"_mgr": BlockManager}                    "_data" before pandas 1.1
      BlockManager(blocks, axes)                               pandas 1.3 and later
        _unpickle_block(values, placement, ndim)
      BlockManager, state (…, {"0.14.1": {"axes", "blocks"}})  before
      axes[0]: the column names; placement: which of them `values` holds
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import IO, Any

import numpy as np

from gaudi_calib.errors import DataError
from gaudi_calib.files import load_pickle

_ARRAYS = ("_reconstruct", "_frombuffer")
_EXTENSION_ARRAYS = (
    *("ArrowExtensionArray", "ArrowStringArray", "ArrowStringArrayNumpySemantics", "StringArray"),
    *("StringArrayNumpySemantics", "NumpyExtensionArray", "PandasArray", "Categorical", "DatetimeArray"),
    *("TimedeltaArray", "IntegerArray", "FloatingArray", "BooleanArray"),
)
_PANDAS = frozenset(
    (
        *("DataFrame", "BlockManager", "_unpickle_block", "BlockPlacement", "__pyx_unpickle_NDArrayBacked"),
        *("_new_Index", "Index", "RangeIndex", "Int64Index", "UInt64Index", "Float64Index"),
        *("MultiIndex", "CategoricalIndex", "_new_DatetimeIndex", "DatetimeIndex", "TimedeltaIndex", "FrozenList"),
        *("Timestamp", "_unpickle_timestamp", "Timedelta", "_timedelta_unpickle", "_nat_unpickle", "Day", "Hour"),
        *("StringDtype", "ArrowDtype", "CategoricalDtype", "BooleanDtype", "Float32Dtype", "Float64Dtype"),
        *("DatetimeTZDtype",),
        *(f"{sign}Int{bits}Dtype" for sign in ("", "U") for bits in (8, 16, 32, 64)),
        *_EXTENSION_ARRAYS,
    )
)
_OTHERS = {
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "pyarrow.lib": {"_restore_array", "type_for_alias", "py_buffer", "chunked_array"},
    "copyreg": {"_reconstructor"},
    "_codecs": {"encode"},
    "builtins": {"object", "bytearray", "bytes"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "zoneinfo": {"ZoneInfo._unpickle"},
    "pytz": {"_UTC", "_p"},
    "decimal": {"Decimal"},
}
_PYTHON2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocols 0 to 2
_PLAIN = {int, str, float, bool, type(None)}


class _Recorder:
    """What a pickle asked for: `name(*args)`, with `state` if it set one."""

    name: str
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> "_Recorder":
        recorder = super().__new__(cls)
        recorder.args = args
        recorder.state = None
        return recorder

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(file: IO[bytes], *, name: str) -> Any:
    """Return the plain value of a pickled table: lists, dicts, text and numbers.

    Args:
        file: an open binary file, decompressed.
        name: what to call it in errors.

    Returns:
        `{column: [cell, ...]}` for a DataFrame; otherwise what was pickled, with arrays
        as lists, missing values as None and cells of no use here (dates) as "<name>" objects.

    Raises:
        FileError: it refers to anything that is not part of a table, by name; or is malformed.
        DataError: a table in a form no known pandas writes.
    """
    value = load_pickle(file, find_class=_recorders(), name=name)
    try:
        return _plain(value)
    except Exception as error:  # what was recorded can have any shape
        raise DataError(
            "the pickle holds a table this version cannot read",
            where=name,
            why=f"{type(error).__name__}: {error}",
            fix="write it again as .parquet or .jsonl: DataFrame.to_parquet(...)",
        ) from error


def _recorders() -> Callable[[str, str], Any]:
    """Return a `find_class` with recorders of its own, so that no pickle can touch another's."""
    made: dict[str, type] = {}

    def find_class(module: str, name: str) -> Any:
        module = _PYTHON2_MODULES.get(module, module)
        if name == "NA" and module in ("pandas", "pandas._libs.missing"):
            return None
        if module in ("builtins", "collections") and name in ("slice", "OrderedDict"):
            return slice if name == "slice" else dict
        is_pandas = module.partition(".")[0] == "pandas" and name in _PANDAS
        if not is_pandas and name not in _OTHERS.get(module, ()):
            raise LookupError(f"{module}.{name}")
        return made.setdefault(name, type(name, (_Recorder,), {"name": name}))

    return find_class


def _plain(value: Any) -> Any:
    """Return `value` with every recorded array, scalar and table as Python values."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        is_plain = _PLAIN.issuperset(map(type, value))  # long lists of token ids: no call for each
        return list(value) if is_plain else [_plain(item) for item in value]
    if not isinstance(value, _Recorder):
        return value
    name = _kind(value)
    if name == "DataFrame":
        return _columns(value)
    if name == "scalar":
        dtype, content = value.args
        return _array_of(content, dtype).item()
    if name in _ARRAYS:
        return _array(value).tolist()
    if name in ("bytes", "bytearray", "encode"):
        return _bytes(value)
    return value


def _kind(value: Any) -> str:
    """Return the name a recorder stands for; protocols 0 and 1 build objects by way of copyreg."""
    if value.name in ("_reconstructor", "__pyx_unpickle_NDArrayBacked"):
        return str(value.args[0].name)
    return str(value.name)


def _columns(frame: _Recorder) -> dict[Any, list[Any]]:
    """Return `{column: cells}` of a recorded DataFrame, in its order."""
    manager = frame.state["_mgr"] if "_mgr" in frame.state else frame.state["_data"]
    if manager.state is None:
        blocks = [(block.args[0], block.args[1]) for block in manager.args[0]]
        axes = manager.args[1]
    else:
        state = manager.state[3]["0.14.1"]
        blocks = [(block["values"], block["mgr_locs"]) for block in state["blocks"]]
        axes = state["axes"]
    names = _index(axes[0])
    columns: dict[int, list[Any]] = {}
    for values, placement in blocks:
        is_slice = isinstance(placement, slice)
        positions = range(len(names))[placement] if is_slice else _array(placement).tolist()
        columns.update(zip(positions, _block(values), strict=True))
    return {name: columns[position] for position, name in enumerate(names)}


def _index(index: _Recorder) -> list[Any]:
    """Return the labels of a recorded `_new_Index(class, {"data": …})`."""
    content = index.args[1]
    if "start" in content:
        return list(range(content["start"], content["stop"], content["step"]))
    return _block(content["data"])[0]


def _block(values: _Recorder) -> list[list[Any]]:
    """Return the columns of one block: an array of shape (columns, rows), or one extension array."""
    name = _kind(values)
    if name in _ARRAYS:
        array = _array(values)
        columns: list[list[Any]] = array.tolist()
        return columns if array.ndim == 2 else [columns]
    if name not in _EXTENSION_ARRAYS:
        raise ValueError(f"a column of type {name}")
    state = values.state if values.state is not None else values.args[2]
    if isinstance(state, tuple):  # NumPy-backed: (dtype, array, attributes)
        content = next(part for part in state if isinstance(part, _Recorder) and part.name in _ARRAYS)
        state = {"_dtype": state[0], "_codes" if name == "Categorical" else "_ndarray": content}
    if "_codes" in state:
        labels = _index(state["_dtype"].state["categories"])
        return [[labels[code] if code >= 0 else None for code in codes] for codes in _block(state["_codes"])]
    if "_mask" in state:
        cells = zip(_block(state["_data"])[0], _block(state["_mask"])[0], strict=True)
        return [[None if missing else cell for cell, missing in cells]]
    if "_ndarray" in state:
        return _block(state["_ndarray"])
    return [_arrow(state.get("_pa_array", state.get("_data")))]


def _array(array: _Recorder) -> np.ndarray:
    """Return a recorded array; elements of an object array are plain."""
    if array.name == "_frombuffer":
        content, recorded, shape, order = array.args
    else:
        _, shape, recorded, is_fortran, content = array.state
        order = "F" if is_fortran else "C"
    return _array_of(content, recorded).reshape(shape, order=order)


def _array_of(content: Any, recorded: _Recorder) -> np.ndarray:
    """Return the flat array that `content`, a list of objects or bytes, holds."""
    dtype = _dtype(recorded)
    if not dtype.hasobject:
        return np.frombuffer(_bytes(content), dtype)
    return np.fromiter(map(_plain, content), object, len(content))


def _dtype(dtype: _Recorder) -> np.dtype:
    """Return a recorded NumPy dtype; times are counted as integers."""
    spec = dtype.args[0]
    if not re.fullmatch(r"[biufcSUOMm]\d+", spec):
        raise ValueError(f"an array of type {spec}")
    order = dtype.state[1] if dtype.state else "="
    return np.dtype("O" if spec[0] == "O" else order.replace("|", "=") + re.sub("[Mm]", "i", spec))


def _bytes(value: Any) -> bytes:
    """Return recorded bytes; protocols 0 to 2 write them as Latin-1 text."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("latin-1")
    if value.name not in ("bytes", "bytearray", "encode", "py_buffer"):
        raise ValueError(f"{value.name} in place of bytes")
    return _bytes(value.args[0]) if value.args else b""


def _arrow(array: _Recorder) -> list[Any]:
    """Return the cells of a recorded Arrow array of text; cells of other types are recorders."""
    if array.name == "chunked_array":
        return [cell for chunk in array.args[0] for cell in _arrow(chunk)]
    kind, length, _, start, buffers = array.args[0][:5]
    alias = kind.args[0]
    if alias not in ("string", "large_string"):
        return [kind] * length
    offsets = np.frombuffer(_bytes(buffers[1]), "<i8" if alias == "large_string" else "<i4")[start : start + length + 1]
    text = _bytes(buffers[2]) if buffers[2] is not None else b""
    cells: list[Any] = [text[a:b].decode() for a, b in pairwise(offsets)]
    if buffers[0] is not None:
        valid = np.unpackbits(np.frombuffer(_bytes(buffers[0]), np.uint8), bitorder="little")[start : start + length]
        cells = [cell if bit else None for cell, bit in zip(cells, valid, strict=True)]
    return cells
