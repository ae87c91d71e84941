"""The npz of a rank: one pickled dict under `arr_0`, as `np.savez` stores it and `np.load` finds it."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.files import load_pickle

_MEMBER = "arr_0.npy"
_HEADER = {"descr": "|O", "fortran_order": False, "shape": ()}


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
        # An entry compressed in a way that zipfile does not know is a NotImplementedError.
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            _, _, dtype = read_header(member)
            if dtype != np.dtype(object):
                why = f"arr_0 has dtype {dtype}"
                raise FileError(f"{path.name} holds no pickled dict", where=path, why=why, fix="restore the file")
            return member.read()
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, NotImplementedError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{path.name} is damaged", where=path, why=str(error), fix="restore the file or measure again"
        ) from error


def load_value(pickled: bytes, path: Path) -> Any:
    """Unpickle what `read_pickle` returned; only NumPy arrays and plain values, no code.

    Raises:
        FileError: the pickle refers to anything else, or is malformed.
    """
    loaded = load_pickle(io.BytesIO(pickled), find_class=_find_numpy, name=str(path))
    return loaded.item() if isinstance(loaded, np.ndarray) and loaded.ndim == 0 else loaded


def _find_numpy(module: str, name: str) -> Any:
    import _codecs

    from numpy._core import multiarray

    allowed = {
        ("multiarray", "_reconstruct"): multiarray._reconstruct,
        ("multiarray", "scalar"): multiarray.scalar,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _codecs.encode,
    }
    core = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
    return allowed[core, name]
