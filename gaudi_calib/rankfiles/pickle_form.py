"""The pickle in an npz, from flat arrays without an object per number.

What `np.savez` makes of a rank's dict is the same opcodes for every node of one shape, with
a name and float32 bytes in between. They are cut out of small real pickles: `fill` puts
numbers into the stream, `match` takes them out of a file that is this stream byte for byte,
and so needs no unpickling. Any other pickle goes through the restricted unpickler in npz.py.

The pickler numbers the objects it has written, and refers to a repeated one (a key, the dtype)
by its number. So the nodes up to the first of the last new shape are pickled as they stand;
after them all that repeats has its number, and nodes of one shape are the same but for the name.
"""

import pickle
import re
import struct
from typing import Any

import numpy as np

from gaudi_calib.ranges.table import Inventory, RangeShape
from gaudi_calib.rankfiles.nested import HOLE, SCALES_MODE, Head, encode_rank, encode_samples

_PROTOCOL = 4  # np.savez's
_FRAME = b"\x95"
_LEAST_FRAME = 4  # bytes; fewer at the end stand alone
_MOST_IN_FRAME = 1 << 16  # bytes; a larger object stands alone
# A float that stands in the place of a node, or of all nodes, and what the pickler makes of it.
_STAND_IN: float = struct.unpack(">d", HOLE.tobytes() * 2)[0]
_STANDING_IN = b"G" + HOLE.tobytes() * 2
_SAMPLE_NAME = "{:08}".format
_SAMPLE_LABEL = re.compile(rb"(?:u\()?\x8c\x08\d{8}\x94")  # a thousand items end with `u`, the next begin with `(`


class PickleForm:
    """The pickle of any rank that has the nodes of one inventory, with holes for the numbers.

    Args:
        counts_samples: the head has `num_samples`.
    """

    def __init__(self, inventory: Inventory, *, counts_samples: bool):
        labels = _dump(dict.fromkeys(inventory.names, _STAND_IN)).removesuffix(b".").split(_STANDING_IN)
        words = [b""] * (2 * len(labels) - 1)
        words[::2] = labels
        words[1::2] = _cut_nodes(inventory, Head(SCALES_MODE, 0, 0 if counts_samples else None))
        self._stream = b"".join(words)
        lengths = np.array(list(map(len, self._stream.split(HOLE.tobytes())[:-1])), dtype=np.int64)
        self._places = np.cumsum(lengths + HOLE.nbytes)[:, None] - np.arange(HOLE.nbytes, 0, -1)

    def fill(self, values: np.ndarray) -> bytes:
        """Return the nodes' part of the pickle, the same for all heads."""
        stream = np.frombuffer(self._stream, dtype=np.uint8).copy()
        stream[self._places] = values.astype("<f4").view(np.uint8).reshape(-1, HOLE.nbytes)
        return stream.tobytes()

    def finish(self, head: Head, filled: bytes) -> bytes:
        """Return the whole pickle, in one frame."""
        start, end = _cut_head(head)
        length = struct.pack("<Q", len(start) + len(filled) + len(end))
        return b"".join((pickle.PROTO, bytes([_PROTOCOL]), _FRAME, length, start, filled, end))

    def match(self, head: Head, content: bytes) -> np.ndarray | None:
        """Return the values in the pickle `content`, or None where it is not exactly this stream."""
        payload, (start, end) = _join_frames(content), _cut_head(head)
        if len(payload) != len(start) + len(self._stream) + len(end):
            return None
        stream = np.frombuffer(payload, dtype=np.uint8, count=len(self._stream), offset=len(start))
        values = stream[self._places].reshape(-1).view("<f4").astype(np.float32, copy=False)
        return values if b"".join((start, self.fill(values), end)) == payload else None


def can_pickle_flat(inventory: Inventory) -> bool:
    """Tell whether `PickleForm` covers these nodes: one channel per range, no name that is too long for a frame."""
    longest = max(map(len, inventory.names), default=0)  # characters, of up to four bytes
    ranges = [shape for shape in inventory.distinct_shapes if isinstance(shape, RangeShape)]
    return 4 * longest < _MOST_IN_FRAME and all(set(shape.channels) <= {1} for shape in ranges)


def _cut_nodes(inventory: Inventory, head: Head) -> list[bytes]:
    """Return the opcodes of every node, the name left out."""
    _, firsts = np.unique(inventory.kinds, return_index=True)
    count = int(max(firsts, default=-1)) + 1
    shapes = [*inventory.shapes[:count], *inventory.distinct_shapes]
    nodes = dict(zip(map(_SAMPLE_NAME, range(len(shapes) + 1)), [*encode_samples(shapes), None], strict=True))
    content = _dump(np.array(encode_rank(head, nodes), dtype=object))
    _, *samples, _ = _SAMPLE_LABEL.split(content)
    return samples[:count] + [samples[count + kind] for kind in inventory.kinds[count:].tolist()]


def _cut_head(head: Head) -> tuple[bytes, bytes]:
    """Return the opcodes before and after the nodes."""
    start, end = _dump(np.array(encode_rank(head, _STAND_IN), dtype=object)).split(_STANDING_IN)
    return start, end


def _dump(value: Any) -> bytes:
    return _join_frames(pickle.dumps(value, protocol=_PROTOCOL))


def _join_frames(content: bytes) -> bytes:
    """Return a pickle of protocol 4 without its header and frame marks; empty where it is something else."""
    if content[:2] != pickle.PROTO + bytes([_PROTOCOL]):
        return b""
    parts, position = [], 2
    while len(content) - position >= _LEAST_FRAME:
        if content[position : position + 1] != _FRAME:
            return b""
        (length,) = struct.unpack_from("<Q", content[position + 1 : position + 9].ljust(8, b"\0"))
        position += 9
        parts.append(content[position : position + length])
        position += length
    return b"".join([*parts, content[position:]])
