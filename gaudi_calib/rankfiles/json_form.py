"""The json of a rank, from flat arrays: fixed text with numbers in between.

`json.dumps` with an indent is a Python loop over every bracket. The text of a node
depends only on its shape, so it is made once per shape (by `json.dumps`), cut where the
numbers stand, and joined.
"""

import json
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np

from gaudi_calib.ranges.table import Inventory, RangeShape, Shape
from gaudi_calib.rankfiles.pickle_form import Head

_MARK = 0.123456789
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
# Text of every bfloat16 seen so far, by its 16 bits.
_BFLOAT16_TEXTS = np.full(1 << 16, None, dtype=object)
_NODES = b'    "Nodes": {'


class JsonForm:
    """The json of any rank that has the nodes of one inventory, with holes for the numbers."""

    def __init__(self, inventory: Inventory):
        texts: dict[int, list[str]] = {}
        pieces: list[str] = []
        text = ""
        for name, shape in zip(inventory.names, inventory.shapes, strict=True):
            cut = texts.get(id(shape))
            if cut is None:
                cut = texts[id(shape)] = _cut_node(shape)
            text = f"{text},\n        {encode_basestring_ascii(name)}: {cut[0]}"
            if len(cut) > 1:
                pieces.append(text)
                pieces += cut[1:-1]
                text = cut[-1]
        if inventory.names:
            text += "\n    "
        self._pieces = [*pieces, text + "}\n}"]
        self._pieces[0] = self._pieces[0].removeprefix(",")

    def fill(self, values: np.ndarray) -> bytes:
        """Return the text after `"Nodes": {`, the same for all heads."""
        return "".join(self._join(values)).encode("ascii")

    def write(self, head: Head, values: np.ndarray) -> bytes:
        """Return the whole text."""
        return "".join([write_head(head), *self._join(values)]).encode("ascii")

    def _join(self, values: np.ndarray) -> list[str]:
        words: list[str] = [""] * (2 * len(self._pieces) - 1)
        words[::2] = self._pieces
        words[1::2] = _write_numbers(values)
        return words


def write_head(head: Head) -> str:
    """Return the text up to the first node."""
    content: dict[str, Any] = {} if head.num_samples is None else {"NumSamples": head.num_samples}
    content |= {"GlobalRank": None, "LocalRank": head.local_rank, "Mode": head.mode, "Nodes": {}}
    return json.dumps(content, indent=4).removesuffix("}\n}")


def read_head(text: bytes) -> Head | None:
    """Return the head of a json file, or None where it is not laid out as `JsonForm` does it."""
    start, nodes, _ = text[:1000].partition(_NODES)
    try:
        content = json.loads(start + nodes + b"}}")
        head = Head(content["Mode"], content["LocalRank"], content.get("NumSamples"))
    except (ValueError, KeyError, TypeError):
        return None
    known = isinstance(head.mode, str) and type(head.local_rank) is int and type(head.num_samples) in (int, type(None))
    return head if known else None


def _cut_node(shape: Shape) -> list[str]:
    """Return the text of a node of `shape` between its numbers."""
    node: dict[str, Any]
    if isinstance(shape, RangeShape):
        node = {"inputs": [[[_MARK]] * channels for channels in shape.inputs]}
        if shape.outputs is not None:
            node["outputs"] = [[[_MARK]] * channels for channels in shape.outputs]
        if shape.weight is not None:
            node["params"] = {"weight": [[_MARK]] * shape.weight}
    else:
        params = {"weight": _MARK} if shape.weight else {}
        node = {"inputs": [_MARK] * shape.inputs, "outputs": [_MARK] * shape.outputs, "params": params}
    text = json.dumps({"Nodes": {"": node}}, indent=4)
    start = text.index('"": ') + len('"": ')
    return text[start : -len("\n    }\n}")].split(repr(_MARK))


def _write_numbers(values: np.ndarray) -> list[str]:
    """Return each number as `json.dumps` writes it; few are different, and only those are converted."""
    bits = values.view(np.uint32)
    if (bits & 0xFFFF).any():  # no bfloat16
        distinct, places = np.unique(bits, return_inverse=True)
        texts = np.array(_write_distinct(distinct), dtype=object)
        return texts[places].tolist()
    halves = (bits >> 16).astype(np.uint16)
    used = np.flatnonzero(np.bincount(halves, minlength=len(_BFLOAT16_TEXTS)))
    new = used[_BFLOAT16_TEXTS[used] == None]  # noqa: E711 - elementwise
    _BFLOAT16_TEXTS[new] = _write_distinct(new.astype(np.uint32) << 16)
    return _BFLOAT16_TEXTS[halves].tolist()


def _write_distinct(bits: np.ndarray) -> list[str]:
    texts = list(map(repr, bits.view(np.float32).tolist()))
    return [_NOT_FINITE.get(text, text) for text in texts]
