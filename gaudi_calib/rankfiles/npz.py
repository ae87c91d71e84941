"""The npz of a rank: one pickled dict under `arr_0`, as `np.savez` stores it and `np.load` finds it."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.files import unpack
from gaudi_calib.unpickle import (
    NUMPY_NAMES,
    Recorder,
    count_array_cells,
    load_recorded,
    pause_collection,
    read_array,
    read_scalar,
    record,
)

_MEMBER = "arr_0.npy"
_HEADER = {"descr": "|O", "fortran_order": False, "shape": ()}
_PLAIN = frozenset({str, int, float, bool, type(None)})
_NUMBERS = frozenset("fdbBhHiIlLqQ")  # type codes of float32, float64 and integers


def pack_pickle(pickled: bytes) -> bytes:
    """Return the npz file of an object array whose pickle is `pickled`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open(_MEMBER, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, _HEADER)
        member.write(pickled)
    return buffer.getvalue()


def pack_value(value: Any) -> bytes:
    """Return the npz file of any dict."""
    buffer = io.BytesIO()
    np.savez(buffer, np.array(value, dtype=object))
    return buffer.getvalue()


def read_pickle(path: Path) -> bytes:
    """Return the pickle in the npz `path`, without loading it.

    Raises:
        FileError: the file is damaged, or holds something else than one object.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as member:
            if archive.getinfo(_MEMBER).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("arr_0 is compressed in a way that NumPy does not use")  # and zipfile not by the piece
            content = unpack(member, path)
        version = np.lib.format.read_magic(content)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(content)
    except FileError:
        raise
    except Exception as error:  # a malformed archive can raise anything
        raise FileError(
            f"{path.name} is damaged", where=path, why=str(error), fix="restore the file or measure again"
        ) from error
    if (dtype, shape) != (np.dtype(object), ()):
        why = f"arr_0 has dtype {dtype} and shape {shape}"
        raise FileError(f"{path.name} holds no pickled dict", where=path, why=why, fix="restore the file")
    return content.read()


@pause_collection()
def load_value(pickled: bytes, path: Path) -> Any:
    """Return the dict in what `read_pickle` returned, without running its code.

    Returns:
        Dicts, lists and tuples of text, numbers and arrays: float32, float64 or integers.

    Raises:
        FileError: the pickle refers to anything else, or is malformed.
    """
    value = load_recorded(pickled, find_class=_find_class, count_cells=count_array_cells, name=str(path))
    try:
        return _decode(value)
    except Exception as error:  # what was recorded can have any shape
        raise FileError(
            f"{path.name} holds more than numbers and their names",
            where=path,
            why=f"{type(error).__name__}: {error}",
            fix="restore the file or measure again",
        ) from error


def _find_class(module: str, name: str) -> type[Recorder]:
    if name not in NUMPY_NAMES.get(module, ()):
        raise LookupError(f"{module}.{name}")
    return record(name)


def _decode(value: Any) -> Any:
    """Return `value` with every recorded array and scalar as what it is."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return {key if type(key) is str else _decode(key): _decode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_decode, value))
    if not isinstance(value, Recorder):
        raise ValueError(f"an object of type {type(value).__name__}")
    array = read_scalar(value, _decode) if value.name == "scalar" else read_array(value, _decode)
    dtype = array.dtype
    if dtype.hasobject and array.ndim == 0:
        return array.item()
    if dtype.char not in _NUMBERS:
        raise ValueError(f"an array of type {dtype}")
    if value.name == "scalar":
        return array[()]
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
