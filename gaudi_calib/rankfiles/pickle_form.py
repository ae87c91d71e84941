"""The pickle in an npz, from flat arrays without an object per number.

What `np.savez` makes of a rank's dict is the same few opcodes for every node of one
shape, with a name and float32 bytes in between. A `PickleForm` holds that stream for an
inventory: `fill` puts numbers into it, `match` takes them out of a file that is this
stream byte for byte, and so needs no unpickling. Any other pickle goes through the
restricted unpickler in npz.py.

Source: CPython `save_dict`, `save_list`, `save_reduce` (Modules/_pickle.c), protocol 4;
NumPy `ndarray.__reduce__`.
"""

import struct
from typing import NamedTuple

import numpy as np

from gaudi_calib.ranges.table import Inventory, RangeShape, Shape

# An object array of shape () up to its one item, and what follows that. Memo 2 is numpy's
# _reconstruct, 3 "numpy", 5 ndarray, 7 b"b", 11 dtype.
_START = (
    b"\x8c\x16numpy._core.multiarray\x94\x8c\x0c_reconstruct\x94\x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94"
    b"K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01)h\x03\x8c\x05dtype\x94\x93\x94\x8c\x02O8\x94\x89\x88\x87\x94R\x94"
    b"(K\x03\x8c\x01|\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t\x94b\x89]\x94"
)
_START_MEMOS = 18
_END = b"uat\x94b."
_NEW_ARRAY = b"h\x02h\x05K\x00\x85\x94h\x07\x87\x94R\x94(K\x01"
_NEW_FLOAT32 = (
    b"h\x0b\x8c\x02f4\x94\x89\x88\x87\x94R\x94(K\x03\x8c\x01<\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b"
)
_BATCH = 1000  # items between two marks
_HOLE = np.arange(4)
_SHARED = 5  # inputs, outputs, params, weight, float32
_SHORT = 255  # bytes of a string that a one-byte length can tell


class Head(NamedTuple):
    """What stands before the nodes in a rank file.

    Attributes:
        mode: `DynamicRange` or `Scale`.
        local_rank: the rank, or -1.
        num_samples: forward calls, None where not recorded.
    """

    mode: str
    local_rank: int
    num_samples: int | None = None


class PickleForm:
    """The pickle of any rank that has the nodes of one inventory, with holes for the numbers.

    Args:
        counts_samples: the head has `num_samples`.
    """

    def __init__(self, inventory: Inventory, *, counts_samples: bool):
        stream = _NodeStream(memos=_START_MEMOS + 6 + counts_samples)
        self._stream, self._holes = stream.write_nodes(inventory)

    def fill(self, values: np.ndarray) -> bytes:
        """Return the nodes' part of the pickle, the same for all heads."""
        stream = np.frombuffer(self._stream, dtype=np.uint8).copy()
        stream[self._holes[:, None] + _HOLE] = values.astype("<f4").view(np.uint8).reshape(-1, 4)
        return stream.tobytes()

    def finish(self, head: Head, filled: bytes) -> bytes:
        """Return the whole pickle, in one frame."""
        payload = b"".join((_START, _write_head(head), filled, _END))
        return b"\x80\x04\x95" + struct.pack("<Q", len(payload)) + payload

    def match(self, head: Head, content: bytes) -> np.ndarray | None:
        """Return the values in the pickle `content`, or None where it is not exactly this stream."""
        payload, start = _join_frames(content), _START + _write_head(head)
        if len(payload) != len(start) + len(self._stream) + len(_END):
            return None
        if not payload.startswith(start) or not payload.endswith(_END):
            return None
        stream = np.frombuffer(payload, dtype=np.uint8, count=len(self._stream), offset=len(start)).copy()
        places = self._holes[:, None] + _HOLE
        values = stream[places].reshape(-1).view("<f4").astype(np.float32, copy=False)
        stream[places] = 0
        return values if stream.tobytes() == self._stream else None


def can_pickle_flat(inventory: Inventory, head: Head) -> bool:
    """Tell whether `PickleForm` covers a rank: one channel per range, short names, ordinary numbers."""
    numbers = (head.local_rank, head.num_samples or 0)
    return (
        inventory.is_per_tensor
        and inventory.longest_name <= _SHORT
        and all(-(2**31) <= number < 2**31 for number in numbers)
    )


class _NodeStream:
    """The part of the pickle that describes the nodes.

    The pickler numbers every object it has written and refers to a repeated one by its
    number; `memos` counts them, `known` holds the numbers of those that repeat.
    """

    def __init__(self, memos: int):
        self._memos = memos
        self._known: dict[str, int] = {}
        self._content = bytearray()
        self._holes: list[int] = []

    def write_nodes(self, inventory: Inventory) -> tuple[bytes, np.ndarray]:
        """Return the dict of all nodes, and where its numbers go: int64, shape (values,)."""
        parts, holes, bases, position = [b"}\x94"], [], [], 2
        self._memos += 1
        count = len(inventory.names)
        chunks: dict[int, tuple[bytes, np.ndarray]] = {}
        for number, (name, shape) in enumerate(zip(inventory.names, inventory.shapes, strict=True)):
            text = name.encode("utf-8", "surrogatepass")
            label = b"\x8c%c%b\x94" % (len(text), text)
            if count > 1 and number % _BATCH == 0:
                label = (b"u(" if number else b"(") + label
            chunk = chunks.get(id(shape))
            if chunk is None:
                chunk, is_final = self._write_node(shape)
                if is_final:
                    chunks[id(shape)] = chunk
            parts += (label, chunk[0])
            bases.append(position + len(label))
            holes.append(chunk[1])
            position += len(label) + len(chunk[0])
        if count > 1:
            parts.append(b"u" if count % _BATCH else b"u(u")
        elif count:
            parts.append(b"s")
        places = np.repeat(np.array(bases, dtype=np.int64), inventory.sizes)
        return b"".join(parts), places + (np.concatenate(holes) if holes else 0)

    def _write_node(self, shape: Shape) -> tuple[tuple[bytes, np.ndarray], bool]:
        """Return the bytes and holes of a node, and whether every later node of this shape has the same."""
        self._content, self._holes, known = bytearray(), [], len(self._known)
        self._memos += 1  # the name, which the caller writes
        self._put(b"}\x94", memos=1)
        if isinstance(shape, RangeShape):
            outputs = None if shape.outputs is None else len(shape.outputs)
            self._put_ranges(len(shape.inputs), outputs, has_weight=shape.weight is not None)
        else:
            self._put_scales(shape.inputs, shape.outputs, has_weight=shape.weight)
        is_final = known == len(self._known) == _SHARED
        return (bytes(self._content), np.array(self._holes, dtype=np.int64)), is_final

    def _put_ranges(self, inputs: int, outputs: int | None, *, has_weight: bool) -> None:
        """Lists of arrays of shape (1, 1); absent keys are left out."""
        several = outputs is not None or has_weight
        self._put(b"(" if several else b"")
        self._put_text("inputs")
        self._put_list(inputs, is_matrix=True)
        if outputs is not None:
            self._put_text("outputs")
            self._put_list(outputs, is_matrix=True)
        if has_weight:
            self._put_weight(is_matrix=True)
        self._put(b"u" if several else b"s")

    def _put_scales(self, inputs: int, outputs: int, *, has_weight: bool) -> None:
        """A list and a tuple of arrays of shape (); params is there even if empty."""
        self._put(b"(")
        self._put_text("inputs")
        self._put_list(inputs, is_matrix=False)
        self._put_text("outputs")
        self._put_tuple(outputs)
        if has_weight:
            self._put_weight(is_matrix=False)
        else:
            self._put_text("params")
            self._put(b"}\x94", memos=1)
        self._put(b"u")

    def _put_weight(self, *, is_matrix: bool) -> None:
        self._put_text("params")
        self._put(b"}\x94", memos=1)
        self._put_text("weight")
        self._put_array(is_matrix=is_matrix)
        self._put(b"s")

    def _put_list(self, count: int, *, is_matrix: bool) -> None:
        self._put(b"]\x94", memos=1)
        for start in range(0, count, _BATCH):
            self._put(b"(" if count > 1 else b"")
            for _ in range(min(_BATCH, count - start)):
                self._put_array(is_matrix=is_matrix)
            self._put(b"e" if count > 1 else b"a")

    def _put_tuple(self, count: int) -> None:
        if count == 0:
            self._put(b")")
            return
        self._put(b"(" if count > 3 else b"")
        for _ in range(count):
            self._put_array(is_matrix=False)
        self._put((b"\x85", b"\x86", b"\x87")[count - 1] if count <= 3 else b"t")
        self._put(b"\x94", memos=1)

    def _put_array(self, *, is_matrix: bool) -> None:
        """A float32 array of one number."""
        self._put(_NEW_ARRAY, memos=3)
        self._put(b"K\x01K\x01\x86\x94" if is_matrix else b")", memos=int(is_matrix))
        if not self._refer("float32"):
            self._known["float32"] = self._memos + 2
            self._put(_NEW_FLOAT32, memos=5)
        self._put(b"\x89C\x04")
        self._holes.append(len(self._content))
        self._put(b"\0\0\0\0\x94t\x94b", memos=2)

    def _put_text(self, text: str) -> None:
        """A key that every node repeats."""
        if not self._refer(text):
            self._known[text] = self._memos
            self._put(_write_text(text), memos=1)

    def _refer(self, key: str) -> bool:
        number = self._known.get(key)
        if number is not None:
            self._put(b"h%c" % number if number < 256 else b"j" + struct.pack("<I", number))
        return number is not None

    def _put(self, opcodes: bytes, *, memos: int = 0) -> None:
        self._content += opcodes
        self._memos += memos


def _write_head(head: Head) -> bytes:
    words = [b"}\x94("]
    if head.num_samples is not None:
        words += [_write_text("NumSamples"), _write_integer(head.num_samples)]
    words += [_write_text("GlobalRank"), b"N", _write_text("LocalRank"), _write_integer(head.local_rank)]
    words += [_write_text("Mode"), _write_text(head.mode), _write_text("Nodes")]
    return b"".join(words)


def _write_text(text: str) -> bytes:
    return b"\x8c%c%b\x94" % (len(text), text.encode())


def _write_integer(number: int) -> bytes:
    if 0 <= number < 2**8:
        return b"K" + struct.pack("<B", number)
    return b"M" + struct.pack("<H", number) if 0 <= number < 2**16 else b"J" + struct.pack("<i", number)


def _join_frames(content: bytes) -> bytes:
    """Return a pickle of protocol 4 without its header and frame marks; empty where it is something else."""
    if content[:2] != b"\x80\x04":
        return b""
    parts, position = [], 2
    while position < len(content):
        if content[position : position + 1] != b"\x95":
            return b""
        (length,) = struct.unpack_from("<Q", content[position + 1 : position + 9].ljust(8, b"\0"))
        position += 9
        parts.append(content[position : position + length])
        position += length
    return b"".join(parts)
