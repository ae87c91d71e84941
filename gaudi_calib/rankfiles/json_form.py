"""The json of a rank, from flat arrays: fixed text with numbers in between.

`json.dumps` with an indent is a Python loop over every bracket. The text of a node
depends only on its shape, so it is made once per shape (by `json.dumps`), cut where the
numbers stand, and joined.
"""

import json
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np

from gaudi_calib.files import parse_json
from gaudi_calib.ranges.table import Inventory
from gaudi_calib.rankfiles.nested import HOLE, Head, decode_head, encode_rank, encode_samples, to_lists

_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
# Text of every bfloat16 seen so far, by its 16 bits.
_BFLOAT16_TEXTS = np.full(1 << 16, None, dtype=object)
_NODES = b'    "Nodes": {'


class JsonForm:
    """The json of any rank that has the nodes of one inventory, with holes for the numbers."""

    def __init__(self, inventory: Inventory):
        cuts = [_cut_node(node) for node in encode_samples(inventory.distinct_shapes)]
        self._pieces: list[str] = []
        text = ""
        for name, kind in zip(inventory.names, inventory.kinds.tolist(), strict=True):
            first, *others = cuts[kind]
            text += f",\n        {encode_basestring_ascii(name)}: {first}"
            if others:
                self._pieces += [text, *others[:-1]]
                text = others[-1]
        self._pieces.append(text + ("\n    }\n}" if inventory.names else "}\n}"))
        self._pieces[0] = self._pieces[0].removeprefix(",")

    def fill(self, values: np.ndarray) -> bytes:
        """Return the text after `"Nodes": {`, the same for all heads."""
        words: list[str] = [""] * (2 * len(self._pieces) - 1)
        words[::2] = self._pieces
        words[1::2] = _write_numbers(values)
        return "".join(words).encode("ascii")

    def finish(self, head: Head, filled: bytes) -> bytes:
        """Return the whole text."""
        return json.dumps(encode_rank(head, {}), indent=4).removesuffix("}\n}").encode("ascii") + filled


def read_head(text: bytes) -> Head | None:
    """Return the head of a json file, or None where it is not laid out as `JsonForm` does it."""
    start, nodes, _ = text[:1000].partition(_NODES)
    try:
        return decode_head(parse_json(start + nodes + b"}}"))
    except ValueError:
        return None


def _cut_node(node: dict[str, Any]) -> list[str]:
    """Return the text of a sample node between its numbers."""
    text = json.dumps({"Nodes": {"": to_lists(node)}}, indent=4)
    start = text.index('"": ') + len('"": ')
    return text[start : -len("\n    }\n}")].split(repr(float(HOLE)))


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
