"""Rank files on disk. The only way to and from nested lists and pickled npz.

A rank's ranges (or scales) are one value (nested.py), written twice: `.json` is for people; `.npz`
holds the same dict, pickled under `arr_0`, and is all that INC reads. `_mod_list.json` lists the
modules INC patched.

Ranks of one world have the same nodes. Their files are then equal but for the numbers:
the text and the opcodes in between are made once (json_form.py, pickle_form.py), and a
file that consists of them is read without being parsed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.files import read_json
from gaudi_calib.layout import RankFile, parse_rank_file
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import Inventory, RangeTable, ScaleTable, tabulate_ranges, tabulate_scales
from gaudi_calib.rankfiles.background import BackgroundWriter
from gaudi_calib.rankfiles.json_form import JsonForm, read_head
from gaudi_calib.rankfiles.nested import (
    RANGES_MODE,
    SCALES_MODE,
    Head,
    decode_head,
    decode_table,
    encode_node,
    encode_rank,
    flatten_node,
    is_same_table,
    require_nodes,
    to_lists,
)
from gaudi_calib.rankfiles.npz import load_value, pack_pickle, pack_value, read_pickle
from gaudi_calib.rankfiles.pickle_form import PickleForm, can_pickle_flat

AnyRankSet = RankSet[Node] | RankSet[ScaleNode]

_json_form = lru_cache(maxsize=4)(JsonForm)
_pickle_form = lru_cache(maxsize=4)(PickleForm)


def write_rank_set(directory: Path, rank_set: AnyRankSet, *, method: str | None = None) -> list[Path]:
    """Write one rank's files; see `write_rank_sets`."""
    return write_rank_sets(directory, [rank_set], method=method)


def write_rank_sets(directory: Path, rank_sets: Sequence[AnyRankSet], *, method: str | None = None) -> list[Path]:
    """Write every rank's `.json` and `.npz`, and for ranges `_mod_list.json`; what ranks have in common is made once.

    Args:
        method: scale method in upper case for scales, None for ranges.

    Returns:
        The files written.

    Raises:
        FileError: a file cannot be written.
    """
    written: list[Path] = []
    renderer = _Renderer(SCALES_MODE if method else RANGES_MODE)
    with BackgroundWriter() as writer:
        for rank_set in rank_sets:
            file = RankFile(rank_set.dump, method=method, rank=rank_set.rank, world=rank_set.world)
            text, npz = renderer.render(rank_set)
            contents = {file.name: text, replace(file, extension="npz").name: npz}
            if method is None:
                contents[replace(file, is_mod_list=True).name] = renderer.render_modules(rank_set.modules)
            for name, content in contents.items():
                writer.write(directory / name, content)
                written.append(directory / name)
    return written


def read_ranges(path: Path) -> RankSet[Node]:
    """Read one rank's ranges from its `.json` and the `.npz` beside it, which wins for INC; either may be missing.

    Raises:
        FileError: a file is malformed, holds scales, or json and npz disagree.
    """
    return _read_rank(path, RANGES_MODE)


def read_scales(path: Path) -> RankSet[ScaleNode]:
    """Read one rank's scales; see `read_ranges`."""
    return _read_rank(path, SCALES_MODE)


def read_node_names(path: Path) -> tuple[str, ...]:
    """Return the names of a rank's nodes, in order, from its `.json` alone.

    Raises:
        FileError: the file is missing or malformed.
    """
    content = read_json(path, lambda value: None if isinstance(value.get("inputs"), list) else value)
    return tuple(require_nodes(path, content))


def read_stored_names(path: Path) -> tuple[str, ...]:
    """Return the names of a rank's nodes, in order, from its `.npz` alone, as INC finds them.

    Raises:
        FileError: the file is missing or malformed.
    """
    return tuple(require_nodes(path, load_value(read_pickle(path), path)))


def read_any_names(path: Path) -> tuple[str, ...]:
    """Return the names of a rank's nodes, in order, from its `.json`, or from its `.npz` where it has only that.

    Raises:
        FileError: the file is malformed.
    """
    text = path.with_suffix(".json")
    return read_node_names(text) if text.is_file() else read_stored_names(path.with_suffix(".npz"))


def read_world_files(paths: Sequence[Path]) -> list[RankSet[Node]]:
    """Read ranges of ranks of one world; those with the nodes of the first share its inventory.

    Raises:
        FileError: see `read_ranges`.
    """
    ranks: list[RankSet[Node]] = []
    for path in paths:
        like = tabulate_ranges(ranks[0].nodes).inventory if ranks else None
        ranks.append(_read_rank(path, RANGES_MODE, like))
    return ranks


def _read_rank(path: Path, mode: str, like: Inventory | None = None) -> RankSet[Any]:
    """Read a rank's json and npz, and require that they agree.

    Args:
        like: nodes that the rank probably has.
    """
    file = parse_rank_file(path.name)
    if file is None:
        raise FileError(
            "not the name of a rank file", where=path, fix="expected inc_output_hooks_maxabs_<rank>_<world>.json"
        )
    found = None if like is None else _match_rank(path, mode, like)
    table, samples = found or _parse_rank(path, mode)
    if like is not None and table.inventory.equals(like):
        table.inventory = like
    modules = _read_modules(path, file, table.inventory.names) if mode == RANGES_MODE else ()
    return RankSet(file.rank or 0, file.world or 1, table, modules, samples, file.dump)


def _match_rank(path: Path, mode: str, like: Inventory) -> tuple[RangeTable, int | None] | None:
    """Read a rank whose files consist of the fixed parts of `like` and numbers, or return None."""
    npz = path.with_suffix(".npz")
    if not (path.is_file() and npz.is_file()):
        return None
    text = path.read_bytes()
    head = read_head(text)
    values = _match_pickle(like, head, read_pickle(npz)) if head and head.mode == mode else None
    if head is None or values is None:
        return None
    form = _json_form(like)
    return (RangeTable(like, values), head.num_samples) if form.finish(head, form.fill(values)) == text else None


def _parse_rank(path: Path, mode: str) -> tuple[RangeTable | ScaleTable, int | None]:
    """Read any rank: the json by parsing, the npz by comparing or by the restricted unpickler."""
    npz, text = path.with_suffix(".npz"), path.with_suffix(".json")
    if npz.is_file() and not text.is_file():
        stored = load_value(read_pickle(npz), npz)
        return decode_table(npz, stored, mode), _read_samples(npz, stored)
    value = read_json(text, flatten_node if mode == RANGES_MODE else None)
    table = decode_table(path, value, mode)
    if not npz.is_file():
        return table, _read_samples(text, value)
    pickled = read_pickle(npz)
    values = None if table.others else _match_pickle(table.inventory, decode_head(value), pickled)
    if values is not None and np.array_equal(values, table.numbers, equal_nan=True):
        return table, _read_samples(text, value)
    loaded = load_value(pickled, npz)
    stored = decode_table(npz, loaded, mode)
    if not is_same_table(table, stored):
        raise FileError(
            f"{path.stem}.json and .npz hold different values",
            where=path,
            why="INC reads only the .npz; somebody edited the .json, or one of them is from another run",
            fix="restore the pair, or measure again",
        )
    return stored, _read_samples(npz, {**value, **loaded})


def _read_samples(path: Path, value: Mapping[str, Any]) -> int | None:
    """Return how many forward calls a rank's dict says were measured, None where it does not say."""
    samples = value.get("NumSamples")
    if samples is not None and type(samples) is not int:
        raise FileError(
            f"NumSamples of {path.name} is no whole number",
            where=path,
            why=f"it is {samples!r}",
            fix="restore the file",
        )
    return samples


def _match_pickle(inventory: Inventory, head: Head | None, pickled: bytes) -> np.ndarray | None:
    """Return the numbers in a pickle of just these nodes, or None."""
    if head is None or not can_pickle_flat(inventory):
        return None
    return _pickle_form(inventory, counts_samples=head.num_samples is not None).match(head, pickled)


def _read_modules(path: Path, file: RankFile, names: tuple[str, ...]) -> tuple[str, ...]:
    mod_list = path.with_name(RankFile(file.dump, file.observer, None, file.rank, file.world, is_mod_list=True).name)
    if not mod_list.is_file():
        return names
    listed = read_json(mod_list)
    if not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise FileError(
            f"{mod_list.name} is no list of modules",
            where=mod_list,
            why="it is the JSON list of the names of the modules that INC patched",
            fix="restore it; or delete it, then the nodes of the ranges count",
        )
    return tuple(listed)


class _Renderer:
    """Content of rank files; parts that consecutive ranks share are kept."""

    def __init__(self, mode: str):
        self._mode = mode
        self._last: RangeTable | ScaleTable | None = None
        self._filled = b"", b""
        self._modules: tuple[tuple[str, ...], bytes] | None = None

    def render(self, rank_set: RankSet[Any]) -> tuple[bytes, bytes]:
        """Return the json and the npz of one rank."""
        table = tabulate_ranges(rank_set.nodes) if self._mode == RANGES_MODE else tabulate_scales(rank_set.nodes)
        head = Head(self._mode, rank_set.rank, rank_set.num_samples)
        if table.others or not can_pickle_flat(table.inventory):
            return render_nested(head, table)
        text_form = _json_form(table.inventory)
        pickle_form = _pickle_form(table.inventory, counts_samples=head.num_samples is not None)
        if self._last is not table:
            self._last, self._filled = table, (text_form.fill(table.numbers), pickle_form.fill(table.numbers))
        text, stream = self._filled
        return text_form.finish(head, text), pack_pickle(pickle_form.finish(head, stream))

    def render_modules(self, modules: tuple[str, ...]) -> bytes:
        """Return the text of `_mod_list.json`."""
        if self._modules is None or self._modules[0] is not modules:
            self._modules = modules, json.dumps(modules, indent=4).encode()
        return self._modules[1]


def render_nested(head: Head, nodes: Mapping[str, Node | ScaleNode]) -> tuple[bytes, bytes]:
    """Return the json and the npz of one rank the plain way, which any nodes can go."""
    value = encode_rank(head, {name: encode_node(node) for name, node in nodes.items()})
    return json.dumps(to_lists(value), indent=4).encode(), pack_value(value)
