"""Pickles put together opcode by opcode, as no pickler writes them."""

import pickle
import struct

Opcodes = bytes
SHARED_TWICE = 60  # levels of a value that holds the one below twice: 2**60 values when written out
HUGE = 10**11


def text(value: str) -> Opcodes:
    """Push a short text."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def number(value: int) -> Opcodes:
    """Push an integer of eight bytes."""
    return b"\x8a\x08" + struct.pack("<q", value)


def blob(value: bytes) -> Opcodes:
    """Push bytes."""
    return b"B" + struct.pack("<I", len(value)) + value


def find(path: str) -> Opcodes:
    """Push a class or function by its dotted name."""
    module, _, name = path.rpartition(".")
    return text(module) + text(name) + b"\x93"


def call(path: str, *args: Opcodes) -> Opcodes:
    """Push the result of a call."""
    return find(path) + b"(" + b"".join(args) + b"tR"


def double(first: Opcodes, pair: Opcodes) -> Opcodes:
    """Push a value that holds `first` 2**SHARED_TWICE times; `pair` makes one value of the upper two of the stack."""
    levels = [b"h" + bytes([level]) + b"h" + bytes([level]) + pair + b"\x94" for level in range(SHARED_TWICE)]
    return first + b"\x94" + b"".join(levels)


def dtype(spec: str, *, flags: int = 0) -> Opcodes:
    """Push a NumPy dtype, its state set by the pickle."""
    state = b"(K\x03" + text("<") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K" + bytes([flags]) + b"tb"
    return call("numpy.dtype", text(spec), b"\x89", b"\x88") + state


def array(spec: str, shape: Opcodes, content: Opcodes) -> Opcodes:
    """Push a NumPy array, its state set by the pickle."""
    empty = call("numpy.core.multiarray._reconstruct", find("numpy.ndarray"), b"K\x00\x85", b"C\x01b")
    return empty + b"(K\x01" + shape + dtype(spec) + b"\x89" + content + b"tb"


def table(*columns: Opcodes, count: int | None = None) -> Opcodes:
    """Push a DataFrame of extension arrays, one per column; its index claims `count` columns."""
    stop = number(len(columns) if count is None else count)
    index = call(
        "pandas.core.indexes.base._new_Index",
        find("pandas.core.indexes.range.RangeIndex"),
        b"}(" + text("start") + b"K\x00" + text("stop") + stop + text("step") + b"K\x01u",
    )
    places = [call("builtins.slice", number(at), number(at + 1), b"K\x01") for at in range(len(columns))]
    blocks = [
        call("pandas._libs.internals._unpickle_block", values, place, b"K\x02")
        for values, place in zip(columns, places, strict=True)
    ]
    axes = b"](" + index + index + b"e"
    manager = call("pandas.core.internals.managers.BlockManager", b"(" + b"".join(blocks) + b"t", axes)
    return find("pandas.core.frame.DataFrame") + b")\x81}" + text("_mgr") + manager + b"sb"


def arrow(kind: str, length: int, *buffers: Opcodes) -> Opcodes:
    """Push a column held by Arrow."""
    alias = call("pyarrow.lib.type_for_alias", text(kind))
    parts = b"(" + alias + number(length) + b"K\x00K\x00](" + b"".join(buffers) + b"e]Nt"
    held = b"}" + text("_pa_array") + call("pyarrow.lib._restore_array", parts) + b"sb"
    return find("pandas.core.arrays.arrow.array.ArrowExtensionArray") + b")\x81" + held


def finish(opcodes: Opcodes) -> bytes:
    """Return the pickle that leaves on the stack what `opcodes` pushed."""
    return b"\x80\x05" + opcodes + pickle.STOP


def _overlap(count: int, size: int) -> Opcodes:
    offsets = struct.pack(f"<{count + 1}i", *([0, size] * count)[: count + 1])
    return table(arrow("string", count, b"N", blob(offsets), blob(b"a" * size)))


_LAST = b"h" + bytes([SHARED_TWICE])  # what `double` has made
_MANY = b"0](" + 5000 * (find("numpy.dtype") + b"h\x00R") + b"e"

# Small pickles that claim or repeat much, and what is said of them.
BOMBS: dict[str, tuple[Opcodes, str]] = {
    "bytes claimed": (b"\x96" + struct.pack("<Q", 1 << 40) + b"N", "the pickle ends early"),
    "frame claimed": (b"\x95" + struct.pack("<Q", 1 << 40) + b"N", "exhausted before end of frame"),
    "shape claimed": (array("f4", number(HUGE) + b"K\x00\x86", b"C\x00"), "cells in"),
    "lists of lists": (double(b"]", b"\x86"), "stand for more than"),
    "tuples of tuples": (double(b")", b"\x86"), "stand for more than"),
    "tuples as a key": (double(b")", b"\x86") + b"}" + _LAST + b"Ns", "a key of type tuple"),
    "a deep tuple as a key": (b"})" + 1_000_000 * b"\x85" + b"Ns", "a key of type tuple"),
    "tuples in a set": (double(b")", b"\x86") + b"\x8f(" + _LAST + b"\x90", "stand for more than"),
    "tuples in a frozen set": (double(b")", b"\x86") + b"(" + _LAST + b"\x91", "stand for more than"),
    "tuples as a type": (
        double(b")", b"\x86") + array("f4", b"K\x01\x85", b"C\x04abcd").replace(text("f4"), _LAST),
        "stand for more than",
    ),
    "numbers of one hash": (
        b"}(" + b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(60_000)) + b"u",
        "a key of type int",
    ),
    "itself in a list": (b"]\x94h\x00a", "a list that contains itself"),
    "itself in a dict": (b"}\x94K\x01h\x00s", "a dict that contains itself"),
    "deep lists": (100_000 * b"]" + 99_999 * b"a", "RecursionError"),
    "open lists": (100_000 * b"(", "unexpected MARK found"),
    "arguments in common": (b"(" + 500_000 * b"N" + b"t\x94" + _MANY, "a call with 500000 arguments"),
    "a number claimed": (b"Nr\xff\xff\xff\xff", "a number larger than the pickle"),
    "a number claimed in text": (b"Np4294967295\n", "a number larger than the pickle"),
    "state of a class": (find("numpy.dtype") + b"}" + text("name") + text("x") + b"sb", "TypeError"),
    "state of a dict": (b"}N}" + text("name") + text("x") + b"s\x86b", "state of a dict"),
}
TABLE_BOMBS: dict[str, tuple[Opcodes, str]] = {
    "a dict of pairs": (
        double(b")", b"\x86") + call("collections.OrderedDict", b"](" + _LAST + b"N\x86e"),
        "TypeError",
    ),
    "billions of columns": (table(count=HUGE), "a table this version cannot read"),
    "billions of cells": (table(arrow("null", HUGE, b"N")), "cells in"),
    "cells that overlap": (_overlap(60_000, 60_000), "cells overlap"),
}
