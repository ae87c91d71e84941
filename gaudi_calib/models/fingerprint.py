"""Telling one checkpoint from another in seconds, without reading all of it."""

import contextlib
import hashlib
from pathlib import Path

from gaudi_calib.errors import FileError
from gaudi_calib.models.headers import read_header
from gaudi_calib.models.source import find_config

_SAMPLE_BYTES = 4096
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def fingerprint_model(directory: Path) -> str:
    """Return `sha256:<hex>` of the checkpoint in `directory`.

    It covers config.json, and of every weight file its name, size and header (names,
    types, shapes) and of each tensor the first, middle and last 4 KiB. Retraining or
    quantizing any tensor changes it; changing a few values elsewhere in a large tensor
    does not. Moving or copying the directory does not change it.

    Raises:
        ModelError: there is no config.json.
    """
    digest = hashlib.sha256(find_config(directory).read_bytes())
    found = (sorted(directory.glob(pattern)) for pattern in _WEIGHTS)
    for path in next(filter(None, found), []):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        _sample_file(path, digest)
    return f"sha256:{digest.hexdigest()}"


def _sample_file(path: Path, digest: "hashlib._Hash") -> None:
    """Add header and samples of every tensor, or of the whole file where it is of another format."""
    spans = []
    with contextlib.suppress(FileError):
        header = read_header(path)
        digest.update(header.content)
        spans = [(span.start, span.stop) for span in header.spans]
    with path.open("rb") as file:
        for begin, end in spans or [(0, path.stat().st_size)]:
            for start in dict.fromkeys((begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES))):
                file.seek(start)
                digest.update(file.read(min(_SAMPLE_BYTES, end - start)))
