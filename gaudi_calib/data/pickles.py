"""Pickled tables, read without building a single object of theirs.

Every class or function a pickle asks for must be on the list below, and is answered
with a recorder (`unpickle.py`). The table is then read from what was recorded, so it
opens whatever pandas wrote it (1.x, 2.x and 3.x) and whatever pandas is installed, or none.

What was recorded, for a DataFrame:

    DataFrame, state {"_mgr": BlockManager}                    "_data" before pandas 1.1
      BlockManager(blocks, axes)                               pandas 1.3 and later
        _unpickle_block(values, placement, ndim)
      BlockManager, state (…, {"0.14.1": {"axes", "blocks"}})  before
      axes[0]: the column names; placement: which of them `values` holds
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import IO, Any

import numpy as np

from gaudi_calib.errors import DataError
from gaudi_calib.unpickle import (
    ARRAYS,
    NUMPY_NAMES,
    Recorder,
    count_array_cells,
    load_recorded,
    pause_collection,
    read_array,
    read_bytes,
    read_scalar,
    record,
)

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
    **NUMPY_NAMES,
    "pyarrow.lib": {"_restore_array", "type_for_alias", "py_buffer", "chunked_array"},
    "copyreg": {"_reconstructor"},
    "builtins": {"object", "bytearray", "bytes", "slice"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "zoneinfo": {"ZoneInfo._unpickle"},
    "pytz": {"_UTC", "_p"},
    "decimal": {"Decimal"},
}
_PYTHON2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocols 0 to 2
_PLAIN = {int, str, float, bool, type(None)}


@pause_collection()
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
    value = load_recorded(file.read(), find_class=_find_class, count_cells=_count_cells, name=name)
    try:
        return _plain(value)
    except Exception as error:  # what was recorded can have any shape
        raise DataError(
            "the pickle holds a table this version cannot read",
            where=name,
            why=f"{type(error).__name__}: {error}",
            fix="write it again as .parquet or .jsonl: DataFrame.to_parquet(...)",
        ) from error


def _find_class(module: str, name: str) -> Any:
    module = _PYTHON2_MODULES.get(module, module)
    if name == "NA" and module in ("pandas", "pandas._libs.missing"):
        return None
    if (module, name) == ("collections", "OrderedDict"):
        return dict
    is_pandas = module.partition(".")[0] == "pandas" and name in _PANDAS
    if not is_pandas and name not in _OTHERS.get(module, ()):
        raise LookupError(f"{module}.{name}")
    return record(name)


def _count_cells(recorder: Recorder) -> int:
    if recorder.name == "_restore_array":
        length: int = recorder.args[0][1]
        return length
    return count_array_cells(recorder)


def _plain(value: Any) -> Any:
    """Return `value` with every recorded array, scalar and table as Python values."""
    if isinstance(value, dict):
        if _is_plain(value) and _is_plain(value.values()):
            return value
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(value) if _is_plain(value) else [_plain(item) for item in value]
    if not isinstance(value, Recorder):
        return value
    if _kind(value) == "DataFrame":
        return _columns(value)
    if value.name == "scalar":
        return read_scalar(value, _plain).item()
    if value.name in ARRAYS:
        return read_array(value, _plain).tolist()
    if value.name in ("bytes", "bytearray", "encode"):
        return read_bytes(value)
    return value


def _is_plain(values: Iterable[Any]) -> bool:
    """Tell whether there is nothing to do for `values`: lists of token ids are long."""
    return _PLAIN.issuperset(map(type, values))


def _kind(value: Any) -> str:
    """Return the name a recorder stands for; protocols 0 and 1 build objects by way of copyreg."""
    if value.name in ("_reconstructor", "__pyx_unpickle_NDArrayBacked"):
        return str(value.args[0].name)
    return str(value.name)


def _columns(frame: Recorder) -> dict[Any, list[Any]]:
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
        is_slice = placement.name == "slice"
        positions = range(len(names))[slice(*placement.args)] if is_slice else read_array(placement, _plain).tolist()
        columns.update(zip(positions, _block(values), strict=True))
    return {name: columns[position] for position, name in enumerate(names)}


def _index(index: Recorder) -> Sequence[Any]:
    """Return the labels of a recorded `_new_Index(class, {"data": …})`; a range of billions is as quick as any."""
    content = index.args[1]
    if "start" in content:
        return range(content["start"], content["stop"], content["step"])
    return _block(content["data"])[0]


def _block(values: Recorder) -> list[list[Any]]:
    """Return the columns of one block: an array of shape (columns, rows), or one extension array."""
    name = _kind(values)
    if values.name in ARRAYS:
        array = read_array(values, _plain)
        columns: list[list[Any]] = array.tolist()
        return columns if array.ndim == 2 else [columns]
    if name not in _EXTENSION_ARRAYS:
        raise ValueError(f"a column of type {name}")
    state = values.state if values.state is not None else values.args[2]
    if isinstance(state, tuple):  # NumPy-backed: (dtype, array, attributes)
        content = next(part for part in state if isinstance(part, Recorder) and part.name in ARRAYS)
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


def _arrow(array: Recorder) -> list[Any]:
    """Return the cells of a recorded Arrow array of text; cells of other types are recorders."""
    if array.name == "chunked_array":
        return [cell for chunk in array.args[0] for cell in _arrow(chunk)]
    if array.name != "_restore_array":
        raise ValueError(f"{array.name} in place of an Arrow array")
    kind, length, _, start, buffers = array.args[0][:5]
    alias = kind.args[0]
    if alias not in ("string", "large_string"):
        return [kind] * length
    offsets = np.frombuffer(read_bytes(buffers[1]), "<i8" if alias == "large_string" else "<i4")[
        start : start + length + 1
    ]
    text = read_bytes(buffers[2]) if buffers[2] is not None else b""
    if np.any(np.diff(offsets) < 0) or offsets[0] < 0 or offsets[-1] > len(text):
        raise ValueError("an Arrow array whose cells overlap")
    cells: list[Any] = [text[a:b].decode() for a, b in pairwise(offsets)]
    if buffers[0] is not None:
        valid = np.unpackbits(np.frombuffer(read_bytes(buffers[0]), np.uint8), bitorder="little")[
            start : start + length
        ]
        cells = [cell if bit else None for cell, bit in zip(cells, valid, strict=True)]
    return cells
