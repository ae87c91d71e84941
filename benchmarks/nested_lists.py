"""Baseline for `unify` and `expand`: the rule of vllm-gaudi's steps 5 and 6, written the plain way.

Every rank file is parsed into nested lists, merged by Python loops, and written with
`json.dump(indent=4)` and with `np.savez` of a dict of arrays, one rank after the other.
Nothing of gaudi_calib is used, so that a comparison compares two programs.

    python benchmarks/nested_lists.py unify -m DIR -r 1 -o OUT [-u] [-s]
    python benchmarks/nested_lists.py expand -m DIR -w 16 -o OUT [-u] [--slice-lists]

The rule, which is right for the directories the reference is meant for:

- unify: consecutive ranks are merged, each number of each node to its maximum; scale files as
  well. With -u experts are renumbered (expert e of the group's i-th rank becomes `local * i + e`)
  and the fused op lines up their maxima in that order.
- expand: every rank gets the ranges of the one. With -u each rank's fused op gets the maxima of
  its own experts only; the lists of experts stay whole, as the reference leaves them, unless
  --slice-lists gives each rank its own, renumbered.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

Nodes = dict[str, dict[str, Any]]

_RANK_FILE = re.compile(
    r"(?P<start>\w+?_hooks_maxabs(?P<method>(?:_[A-Z][A-Z0-9]*)*))_(?P<rank>\d+)_(?P<world>\d+)\.json"
)
_EXPERT = re.compile(r"(?P<op>.+)\.(?P<list>w13_list|w2_list)\.(?P<index>\d+)")


def find_files(directory: Path, world: int | None = None) -> dict[str, list[Path]]:
    """Return the files of `world` (None: the largest there) in rank order, by the first part of their name."""
    matches = [(match, path) for path in directory.iterdir() if (match := _RANK_FILE.fullmatch(path.name))]
    world = world or max(int(match["world"]) for match, _ in matches)
    chosen: dict[str, dict[int, Path]] = {}
    for match, path in matches:
        if int(match["world"]) == world:
            chosen.setdefault(match["start"], {})[int(match["rank"])] = path
    return {start: [ranks[rank] for rank in range(world)] for start, ranks in sorted(chosen.items())}


def merge_groups(ranks: list[Nodes], *, expert_parallel: bool) -> Nodes:
    """Merge the nodes of consecutive ranks into those of the first, which is returned."""
    merged = ranks[0]
    local = 1 + max((int(match["index"]) for match in map(_EXPERT.fullmatch, merged) if match), default=-1)
    renumbered: Nodes = {}
    for name, node in merged.items():
        expert = _EXPERT.fullmatch(name) if expert_parallel and local else None
        if expert:
            for i, other in enumerate(ranks):
                renumbered[f"{expert['op']}.{expert['list']}.{local * i + int(expert['index'])}"] = other[name]
            continue
        is_fused = expert_parallel and f"{name}.w13_list.0" in merged
        for other in ranks[1:]:
            take_maximum(node, other[name], local if is_fused else 0)
    merged.update(renumbered)
    return merged


def take_maximum(node: dict[str, Any], other: dict[str, Any], experts: int) -> None:
    """Raise the numbers of `node` to those of `other`; the list with one entry per expert grows instead."""
    for key in ("inputs", "outputs"):
        if key not in node:
            continue
        ours, theirs = node[key], other[key]
        shared = 1 if experts and len(theirs) == experts + 1 else len(theirs)
        for i in range(shared):
            if isinstance(ours[i], list):
                for j in range(len(ours[i])):
                    ours[i][j] = higher(ours[i][j], theirs[i][j])
            else:
                ours[i] = max(ours[i], theirs[i])
        ours.extend(theirs[shared:])
    if "weight" in node.get("params", {}):
        node["params"]["weight"] = higher(node["params"]["weight"], other["params"]["weight"])


def higher(ours: Any, theirs: Any) -> Any:
    """Return the elementwise maximum of two numbers, lists or dicts of the same structure."""
    if isinstance(ours, list):
        return [higher(our, their) for our, their in zip(ours, theirs, strict=True)]
    if isinstance(ours, dict):
        return {key: higher(our, theirs[key]) for key, our in ours.items()}
    return max(ours, theirs)


def slice_experts(nodes: Nodes, rank: int, world: int, *, slice_lists: bool) -> Nodes:
    """Leave the fused ops the experts of `rank`; with `slice_lists` the lists of experts too."""
    kept: Nodes = {}
    for name, node in nodes.items():
        expert = _EXPERT.fullmatch(name) if slice_lists else None
        if expert:
            local = len(nodes[expert["op"]]["outputs"]) - 1
            first, index = rank * (local // world), int(expert["index"])
            if first <= index < first + local // world:
                kept[f"{expert['op']}.{expert['list']}.{index - first}"] = node
        elif f"{name}.w13_list.0" in nodes:
            local = (len(node["outputs"]) - 1) // world
            first = 1 + rank * local
            kept[name] = {**node, "outputs": [node["outputs"][0], *node["outputs"][first : first + local]]}
        else:
            kept[name] = node
    return kept


def write_rank(path: Path, content: dict[str, Any], rank: int) -> None:
    """Write `content` as json and npz."""
    content["LocalRank"] = rank
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=4)
    nodes: Nodes = {}
    for name, node in content["Nodes"].items():
        nodes[name] = {"inputs": [np.array(numbers, dtype=np.float32) for numbers in node["inputs"]]}
        if "outputs" in node:
            nodes[name]["outputs"] = [np.array(numbers, dtype=np.float32) for numbers in node["outputs"]]
        if "weight" in node.get("params", {}):
            weight = node["params"]["weight"]
            if isinstance(weight, dict):
                arrays: Any = {int(axis): np.array(numbers, dtype=np.float32) for axis, numbers in weight.items()}
            else:
                arrays = np.array(weight, dtype=np.float32)
            nodes[name]["params"] = {"weight": arrays}
    value = {"GlobalRank": None, "LocalRank": rank, "Mode": content["Mode"], "Nodes": nodes}
    np.savez(path.with_suffix(".npz"), np.array(value, dtype=object))


def unify(directory: Path, world: int, out: Path, *, expert_parallel: bool = False, scales: bool = True) -> None:
    """Merge the ranks in `directory` into `world` of them and write those to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for start, paths in find_files(directory).items():
        if "_maxabs_" in start and not scales:
            continue
        size = len(paths) // world
        for index in range(world):
            contents = [json.loads(path.read_bytes()) for path in paths[index * size : (index + 1) * size]]
            merge_groups([content["Nodes"] for content in contents], expert_parallel=expert_parallel)
            del contents[1:]
            write_rank(out / f"{start}_{index}_{world}.json", contents[0], index if world > 1 else -1)


def expand(directory: Path, world: int, out: Path, *, expert_parallel: bool = False, slice_lists: bool = False) -> None:
    """Write the ranges of the one rank in `directory` for each of `world` ranks to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for start, (path,) in find_files(directory, 1).items():
        if "_maxabs_" in start:
            continue
        for rank in range(world):
            content = json.loads(path.read_bytes())
            if expert_parallel:
                content["Nodes"] = slice_experts(content["Nodes"], rank, world, slice_lists=slice_lists)
            write_rank(out / f"{start}_{rank}_{world}.json", content, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, flag in (("unify", "-r"), ("expand", "-w")):
        command = commands.add_parser(name)
        command.add_argument("-m", dest="directory", type=Path, required=True, help="directory of the rank files")
        command.add_argument(flag, dest="world", type=int, required=True, help="number of ranks to write")
        command.add_argument("-o", dest="out", type=Path, required=True, help="where the results go")
        command.add_argument("-u", dest="expert_parallel", action="store_true", help="experts are split by expert")
    commands.choices["unify"].add_argument("-s", dest="scales", action="store_false", help="leave out the scales")
    commands.choices["expand"].add_argument("--slice-lists", action="store_true", help="slice the lists of experts too")
    arguments = vars(parser.parse_args())
    run = unify if arguments.pop("command") == "unify" else expand
    run(**arguments)


if __name__ == "__main__":
    main()
