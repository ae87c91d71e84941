"""What lies in a safetensors file, from its header.

A file is 8 bytes of length, that many bytes of JSON, and the tensors one after the other:

    {"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}

Offsets are from the end of the header.
"""

from dataclasses import dataclass
from pathlib import Path

from gaudi_calib.errors import FileError
from gaudi_calib.files import parse_json

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Span:
    """One tensor, and where its bytes lie in the file.

    Attributes:
        name: of the tensor.
        dtype: safetensors' word for it (`BF16`, `F8_E4M3`, ...).
        shape: may be empty.
        start, stop: first byte and the one behind the last, from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        content: its bytes, JSON padded with blanks.
        metadata: `__metadata__`, empty where there is none.
        spans: the tensors, in the order of their bytes.
    """

    content: bytes
    metadata: dict[str, str]
    spans: tuple[Span, ...]

    @property
    def prefix(self) -> bytes:
        """What a file with this header begins with, up to its first tensor."""
        return len(self.content).to_bytes(_LENGTH_BYTES, "little") + self.content

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.spans[-1].stop if self.spans else len(self.prefix)


def read_header(path: Path) -> Header:
    """Return the header of the safetensors file `path`.

    Raises:
        FileError: it cannot be read, is no safetensors file, or is shorter or longer than its
            header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if _LENGTH_BYTES + length > size:
                raise ValueError(f"its header would be of {length} bytes, the file is of {size}")
            content = file.read(length)
        return _parse_header(content, size)
    except (OSError, ValueError) as error:
        raise FileError(
            f"cannot read {path.name}",
            where=path,
            why=(isinstance(error, OSError) and error.strerror) or str(error),
            fix="the file is damaged or incomplete; get it again from its source",
        ) from error


def _parse_header(content: bytes, size: int) -> Header:
    try:
        entries = parse_json(content)
        metadata = dict(entries.pop("__metadata__", None) or {})
        base = _LENGTH_BYTES + len(content)
        found = [
            Span(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), *(base + i for i in entry["data_offsets"]))
            for name, entry in entries.items()
        ]
        spans = sorted(found, key=lambda span: (span.start, span.stop))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its header is not one of safetensors") from error
    end = base
    for span in spans:
        if span.start != end or span.stop < end:
            raise ValueError(f"its header says that {span.name!r} begins elsewhere than the tensor before it ends")
        end = span.stop
    if end != size:
        raise ValueError(f"its header tells of {end} bytes, the file is of {size}")
    return Header(content, metadata, tuple(spans))
