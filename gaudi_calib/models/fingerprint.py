"""Telling one checkpoint from another in seconds, without reading all of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from gaudi_calib.errors import ModelError

_SAMPLE_BYTES = 4096
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def fingerprint_model(directory: Path, *, tensor_hashes: Mapping[str, str] | None = None) -> str:
    """Return `sha256:<hex>` of the checkpoint in `directory`.

    It covers config.json, and of every weight file its name, size and header (names,
    types, shapes) and of each tensor the first, middle and last 4 KiB. Retraining or
    quantizing any tensor changes it; changing a few values elsewhere in a large tensor
    does not. Moving or copying the directory does not change it.

    Args:
        tensor_hashes: hash of each tensor's whole content, by name, from an engine that
            reads them anyway; used in place of the samples.

    Raises:
        ModelError: there is no config.json.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise ModelError("no config.json in the model directory", where=directory, fix="give a checkpoint's directory")
    digest = hashlib.sha256(config.read_bytes())
    for path in _list_weights(directory):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        if tensor_hashes is None:
            with path.open("rb") as file:
                _sample_file(file, path.stat().st_size, digest)
    for name in sorted(tensor_hashes or {}):
        digest.update(f"\0{name}\0{(tensor_hashes or {})[name]}".encode())
    return f"sha256:{digest.hexdigest()}"


def _list_weights(directory: Path) -> list[Path]:
    for pattern in _WEIGHTS:
        if found := sorted(directory.glob(pattern)):
            return found
    return []


def _sample_file(file: IO[bytes], size_bytes: int, digest: "hashlib._Hash") -> None:
    header_bytes = int.from_bytes(file.read(8), "little")
    spans = [(0, size_bytes)]
    if 8 + header_bytes <= size_bytes:
        header = file.read(header_bytes)
        digest.update(header)
        spans = _find_tensors(header, offset=8 + header_bytes) or spans
    for begin, end in spans:
        for start in dict.fromkeys((begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES))):
            file.seek(start)
            digest.update(file.read(min(_SAMPLE_BYTES, end - start)))


def _find_tensors(header: bytes, *, offset: int) -> list[tuple[int, int]]:
    """Return the byte span of every tensor of a safetensors file, or nothing where it is another format."""
    try:
        entries = json.loads(header)
        spans = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        return sorted((offset + int(begin), offset + int(end)) for begin, end in spans)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
