"""The json of a rank, from flat arrays: fixed text with numbers in between.

`json.dumps` with an indent is a Python loop over every bracket. The text of a node
depends only on its shape, so it is made once per shape (by `json.dumps`), cut where the
numbers stand, and joined.
"""

import json
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np

from gaudi_calib.ranges.pickle_form import Head
from gaudi_calib.ranges.table import Inventory, RangeShape, Shape

_MARK = 0.123456789
_NODES = '    "Nodes": {'


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

    def fill(self, values: np.ndarray) -> str:
        """Return the text after `"Nodes": {`, the same for all heads."""
        words: list[str] = [""] * (2 * len(self._pieces) - 1)
        words[::2] = self._pieces
        words[1::2] = _write_numbers(values)
        return "".join(words)

    def finish(self, head: Head, filled: str) -> str:
        """Return the whole text."""
        content: dict[str, Any] = {} if head.num_samples is None else {"NumSamples": head.num_samples}
        content |= {"GlobalRank": None, "LocalRank": head.local_rank, "Mode": head.mode, "Nodes": {}}
        return json.dumps(content, indent=4).removesuffix("}\n}") + filled


def read_head(text: str) -> Head | None:
    """Return the head of a json file, or None where it is not laid out as `JsonForm` does it."""
    start, nodes, _ = text[:1000].partition(_NODES)
    try:
        content = json.loads(start + nodes + "}}")
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
    distinct, places = np.unique(values.view(np.uint32), return_inverse=True)
    texts = np.array([json.dumps(value) for value in distinct.view(np.float32).tolist()], dtype=object)
    return texts[places].tolist() if len(texts) else []
