"""Rank files on disk. The only place that knows nested lists and pickled npz.

A rank's ranges (or scales) are one value, written twice:

    {"NumSamples": 10, "GlobalRank": null, "LocalRank": 0, "Mode": "DynamicRange", "Nodes": {
        "<module>": {"inputs": [[[x]], ...], "outputs": [[[x]], ...], "params": {"weight": [[x]]}}}}

`.json` is for people. `.npz` holds the same dict, pickled under `arr_0` with float32
arrays as leaves; it is all that INC reads. Keys that do not apply to ranges are
absent. In a scale file `Mode` is `Scale`, every node has all three keys, a scale is a
bare number, and a per-channel weight is {0: per output channel, 1: per input channel}.
`_mod_list.json` lists the modules INC patched.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gaudi_calib.errors import FileError
from gaudi_calib.files import load_pickle, read_json, write_bytes, write_text
from gaudi_calib.layout import RankFile, parse_rank_file
from gaudi_calib.ranges.node import Node, PerChannelWeight, RankSet, ScaleNode

N = TypeVar("N", Node, ScaleNode)

_RANGES_MODE, _SCALES_MODE = "DynamicRange", "Scale"
_FIXES = {
    _RANGES_MODE: "restore the file or measure again",
    _SCALES_MODE: "restore the file, or make it again with `gaudi-calib quantize`",
}


def write_rank_set(
    directory: Path,
    rank_set: RankSet[Node] | RankSet[ScaleNode],
    *,
    method: str | None = None,
) -> list[Path]:
    """Write one rank's `.json` and `.npz`, and for ranges `_mod_list.json`.

    Args:
        method: scale method in upper case for scales, None for ranges.

    Returns:
        The files written.

    Raises:
        FileError: a file cannot be written.
    """
    encode: Callable[[Any], dict[str, Any]] = _encode_ranges if method is None else _encode_scales
    value: dict[str, Any] = {} if rank_set.num_samples is None else {"NumSamples": rank_set.num_samples}
    value |= {
        "GlobalRank": None,
        "LocalRank": rank_set.rank,
        "Mode": _RANGES_MODE if method is None else _SCALES_MODE,
        "Nodes": {name: encode(node) for name, node in rank_set.nodes.items()},
    }
    file = RankFile(dump=rank_set.dump, method=method, rank=rank_set.rank, world=rank_set.world)
    json_path = directory / file.name
    npz_path = json_path.with_suffix(".npz")
    buffer = io.BytesIO()
    np.savez(buffer, np.array(value, dtype=object))
    write_bytes(npz_path, buffer.getvalue())
    write_text(json_path, json.dumps(_to_lists(value), indent=4))
    if method is not None:
        return [json_path, npz_path]
    mod_list = directory / RankFile(dump=rank_set.dump, rank=rank_set.rank, world=rank_set.world, is_mod_list=True).name
    write_text(mod_list, json.dumps(list(rank_set.modules), indent=4))
    return [json_path, npz_path, mod_list]


def read_ranges(path: Path) -> RankSet[Node]:
    """Read one rank's ranges from its `.json` (and `.npz` beside it, which wins for INC).

    Raises:
        FileError: a file is malformed, holds scales, or json and npz disagree.
    """
    file, value, nodes = _read_pair(path, _RANGES_MODE, _decode_ranges)
    modules, samples = _read_modules(path, file, nodes), value.get("NumSamples")
    return RankSet(file.rank or 0, file.world or 1, nodes, modules, samples, file.dump)


def read_scales(path: Path) -> RankSet[ScaleNode]:
    """Read one rank's scales; see `read_ranges`."""
    file, _, nodes = _read_pair(path, _SCALES_MODE, _decode_scales)
    return RankSet(file.rank or 0, file.world or 1, nodes, dump=file.dump)


def list_worlds(directory: Path, method: str | None = None) -> dict[int, dict[int, Path]]:
    """Return the `.json` files of a directory by world and rank (ranges, or scales of `method`).

    A file without a rank (INC without torch.distributed) counts as rank 0 of 1.

    Raises:
        FileError: the directory is missing.
    """
    if not directory.is_dir():
        raise FileError(
            "no such directory", where=directory, fix="give the <device> directory of a run, e.g. OUT/<model>/g3"
        )
    worlds: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()):
        file = parse_rank_file(path.name)
        if file is None or file.is_mod_list or file.extension != "json" or file.method != method:
            continue
        if file.observer != "maxabs":
            continue
        worlds.setdefault(file.world or 1, {}).setdefault(file.rank or 0, path)
    return dict(sorted(worlds.items()))


def read_world_dir(directory: Path, world: int) -> list[RankSet[Node]]:
    """Read the ranges of all ranks of `world`, in rank order.

    Raises:
        FileError: a rank's file is missing or malformed.
    """
    worlds = list_worlds(directory)
    files = worlds.get(world, {})
    missing = [rank for rank in range(world) if rank not in files]
    if missing:
        raise FileError(
            f"no ranges of rank {missing[0]} of {world}" + (f" (nor of {len(missing) - 1} more)" * (len(missing) > 1)),
            where=directory / RankFile(rank=missing[0], world=world).name,
            why=f"the directory holds ranges of world size {', '.join(map(str, worlds)) or 'none'}",
            fix=f"run `gaudi-calib measure -t {world}`, or name a world size that is there",
        )
    return [read_ranges(files[rank]) for rank in range(world)]


def _encode_ranges(node: Node) -> dict[str, Any]:
    value: dict[str, Any] = {"inputs": [_matrix(one) for one in node.inputs]}
    if node.outputs is not None:
        value["outputs"] = [_matrix(one) for one in node.outputs]
    if node.weight is not None:
        value["params"] = {"weight": _matrix(node.weight)}
    return value


def _matrix(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1)


def _encode_scales(node: ScaleNode) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if isinstance(node.weight, PerChannelWeight):
        params["weight"] = {0: np.float32(node.weight.out_channels), 1: np.float32(node.weight.in_channels)}
    elif node.weight is not None:
        params["weight"] = np.asarray(node.weight, dtype=np.float32)
    return {
        "inputs": [np.asarray(scale, dtype=np.float32) for scale in node.inputs],
        "outputs": tuple(np.asarray(scale, dtype=np.float32) for scale in node.outputs),
        "params": params,
    }


def _to_lists(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _to_lists(one) for key, one in value.items()}
    return [_to_lists(one) for one in value] if isinstance(value, (list, tuple)) else value


def _read_pair(path: Path, mode: str, decode: Callable[[Path, str, Any], N]) -> tuple[RankFile, dict, dict[str, N]]:
    """Read the json and the npz of `path`, require that they agree, and return the npz's content."""
    file = parse_rank_file(path.name)
    if file is None:
        raise FileError(
            "not the name of a rank file", where=path, fix="expected inc_output_hooks_maxabs_<rank>_<world>.json"
        )
    value, npz = read_json(path.with_suffix(".json")), path.with_suffix(".npz")
    nodes = _decode_nodes(path, value, mode, decode)
    if not npz.is_file():
        return file, value, nodes
    loaded = _read_npz(npz)
    stored = _decode_nodes(npz, loaded, mode, decode)
    if list(stored) != list(nodes) or not all(_same(nodes[name], node) for name, node in stored.items()):
        raise FileError(
            f"{path.stem}.json and .npz hold different values",
            where=path,
            why="INC reads only the .npz; somebody edited the .json, or one of them is from another run",
            fix="restore the pair, or measure again",
        )
    return file, {**value, **loaded}, stored


def _decode_nodes(path: Path, value: Any, mode: str, decode: Callable[[Path, str, Any], N]) -> dict[str, N]:
    if not isinstance(value, dict) or not isinstance(value.get("Nodes"), dict):
        raise FileError(f"{path.name} has no Nodes", where=path, fix="restore the file or measure again")
    if value.get("Mode", mode) != mode:
        raise FileError(f"{path.name} holds {value['Mode']}, expected {mode}", where=path, fix=_FIXES[mode])
    return {name: decode(path, name, node) for name, node in value["Nodes"].items()}


def _same(left: Any, right: Any) -> bool:
    """Equality of nodes as float32 values, in which NaN equals NaN."""
    if isinstance(left, (Node, ScaleNode, PerChannelWeight)):
        return all(_same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if left is None or right is None:
        return left is right
    return np.array_equal(np.float32(left), np.float32(right), equal_nan=True)


def _read_npz(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            _, _, dtype = read_header(member)
            if dtype != np.dtype(object):
                why = f"arr_0 has dtype {dtype}"
                raise FileError(f"{path.name} holds no pickled dict", where=path, why=why, fix="restore the file")
            loaded = load_pickle(member, find_class=_find_numpy, name=str(path))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"{path.name} is damaged", where=path, why=str(error), fix="restore the file or measure again"
        ) from error
    return loaded.item() if isinstance(loaded, np.ndarray) else loaded


def _find_numpy(module: str, name: str) -> Any:
    import _codecs

    from numpy._core import multiarray

    allowed = {
        ("multiarray", "_reconstruct"): multiarray._reconstruct,
        ("multiarray", "scalar"): multiarray.scalar,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _codecs.encode,
    }
    core = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
    return allowed[core, name]


def _decode_ranges(path: Path, name: str, node: Any) -> Node:
    try:
        weight = node.get("params", {}).get("weight")
        outputs = node.get("outputs")
        return Node(
            inputs=tuple(_vector(one) for one in node.get("inputs", ())),
            outputs=None if outputs is None else tuple(_vector(one) for one in outputs),
            weight=None if weight is None else _vector(weight),
        )
    except (TypeError, ValueError, AttributeError) as error:
        fix = _FIXES[_RANGES_MODE]
        raise FileError(f"cannot read the ranges of {name}", where=path, why=str(error), fix=fix) from error


def _vector(value: Any) -> np.ndarray:
    return np.asarray(value, dtype=np.float32).reshape(-1)


def _decode_scales(path: Path, name: str, node: Any) -> ScaleNode:
    try:
        weight = node.get("params", {}).get("weight")
        decoded: float | np.ndarray | PerChannelWeight | None = None
        if isinstance(weight, dict):
            out_channels, in_channels = (weight.get(key, weight.get(str(key))) for key in (0, 1))
            decoded = PerChannelWeight(_vector(out_channels), _vector(in_channels))
        elif weight is not None:
            decoded = _scale(weight)
        return ScaleNode(
            tuple(float(one) for one in node.get("inputs", ())),
            tuple(_scale(one) for one in node.get("outputs", ())),
            decoded,
        )
    except (TypeError, ValueError, AttributeError) as error:
        fix = _FIXES[_SCALES_MODE]
        raise FileError(f"cannot read the scales of {name}", where=path, why=str(error), fix=fix) from error


def _scale(value: Any) -> float | np.ndarray:
    return float(value) if np.ndim(value) == 0 else _vector(value)


def _read_modules(path: Path, file: RankFile, nodes: Mapping[str, Node]) -> tuple[str, ...]:
    mod_list = path.with_name(RankFile(file.dump, file.observer, None, file.rank, file.world, is_mod_list=True).name)
    return tuple(read_json(mod_list)) if mod_list.is_file() else tuple(nodes)
