"""Directories that real Gaudis wrote, of every age: what commands over directories do with excerpts of them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.layout import RankFile, parse_rank_file
from gaudi_calib.ranges.node import Op, RankSet, ScaleNode, find_op
from gaudi_calib.rankfiles.store import read_scales
from gaudi_calib.runs.quantize import Scaling, quantize_dir
from tests.support.files import snapshot
from tests.support.paths import GOLDEN

REAL = GOLDEN / "real"
# Device, and options that the set needs.
SETS = {
    "deepseek-r1": ["--device", "g3"],
    "llama-2-7b": ["--device", "g2"],
    "llama-3.1-70b": ["--device", "g3"],
    "llama-4-maverick": ["--device", "g3", "--dump", "inc_measure_output"],
    "llama-4-maverick-ep8": ["--device", "g3"],
    "mixtral-8x7b": ["--device", "g3"],
    "qwen3-235b": ["--device", "g2"],
}


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(REAL / name, tmp_path / name))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("name", SETS)
def test_scales_of_every_set(name: str, elsewhere: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever its age, without manifest, `.npz` or QUANT_CONFIG; then INC finds all that it reads."""
    source, out = copy(name, tmp_path), tmp_path / "out"
    assert main(["quantize", str(source), *SETS[name], *(["-o", str(out)] if elsewhere else []), "--json"]) == 0
    told, captured = json.loads((printed := capsys.readouterr()).out), printed.err
    place = CalibrationDir(out if elsewhere else source, dump=dict(zip(SETS[name], SETS[name][1:])).get("--dump"))
    for world, ranks in told["ranks"].items():
        missing = {place.name_file(rank, int(world)).name for rank in range(int(world)) if rank not in ranks}
        assert {path.name for path in place.list_missing(int(world))} == missing
        assert len(place.list_missing(int(world), method="MAXABS_HW")) == len(missing)
        assert bool(missing) is ("no ranges of rank 2, 3, 4, 5, 6, 7 of 8" in captured)


# Scales of sets that somebody unified are maxima over ranks, and an output's maximum is not the product of maxima.
UNIFIED = {"inc_output_hooks_maxabs_MAXABS_HW_0_1.json", "unit_test_hooks_maxabs_MAXABS_HW_0_1.json"}


def published(name: str) -> Iterator[tuple[Path, RankFile]]:
    """Yield the scale files of a set, once each."""
    stems = {path.with_suffix(".json") for path in (REAL / name).rglob("*_hooks_*")}
    yield from ((path, file) for path in sorted(stems) if (file := parse_rank_file(path.name)) and file.method)


@pytest.mark.parametrize("name", [name for name in SETS if list(published(name))])
def test_published_scales_follow_from_their_ranges(name: str, tmp_path: Path):
    """Every input and every weight, to the bit; outputs, too, but where files were unified."""
    for path, file in published(name):
        device = SETS[name][1]
        scaling = Scaling(method=file.method, device=device, dump=file.dump, world=file.position[1], allows_idle=True)
        quantize_dir(REAL / name, tmp_path / "out", scaling)
        ours = CalibrationDir(tmp_path / "out", dump=file.dump).name_file(*file.position, method=file.method)
        theirs, found = read_scales(path), read_scales(ours.with_suffix(".json"))
        assert theirs.nodes and set(theirs.nodes) <= set(found.nodes)
        assert list(differing(theirs, found, outputs=path.name not in UNIFIED)) == []


def differing(theirs: RankSet[ScaleNode], ours: RankSet[ScaleNode], *, outputs: bool) -> Iterator[str]:
    parts = ("inputs", "weight", "outputs") if outputs else ("inputs", "weight")
    for name, node in theirs.nodes.items():
        pairs = [(flatten(getattr(one, part)) for one in (node, ours.nodes[name])) for part in parts]
        yield from (f"{name} {part}" for part, pair in zip(parts, pairs, strict=True) if len(set(pair)) > 1)


def flatten(scales: object) -> tuple[float, ...]:
    """The numbers of a tuple of scales, of one, or of none; INC wrote lists of one number in some years."""
    found = scales if isinstance(scales, tuple) else () if scales is None else (scales,)
    return tuple(float(np.ravel(scale)[0]) for scale in found)


@pytest.mark.parametrize(
    ("name", "words", "code", "told"),
    [
        ("deepseek-r1", "unify DIR -r 4 --from-world 8", 0, ""),
        ("deepseek-r1", "unify DIR -r 1", 0, ""),
        ("deepseek-r1", "expand DIR -w 16 --from-world 8 -u", 0, ""),
        ("llama-4-maverick-ep8", "unify DIR -r 2", 0, ""),
        ("llama-4-maverick-ep8", "expand DIR -w 16 --from-world 8", 0, ""),
        ("qwen3-235b", "unify DIR -r 1", 0, ""),
        ("qwen3-235b", "expand DIR -w 8 --from-world 4", 0, ""),
        ("mixtral-8x7b", "expand DIR -w 2 --device g3", 0, ""),
        ("llama-2-7b", "expand DIR -w 2 --device g2", 0, ""),
        ("mixtral-8x7b", "unify DIR -r 1", 1, "nothing to unify into 1"),
        ("llama-3.1-70b", "unify DIR -r 1", 1, "--from-world N"),
        ("llama-3.1-70b", "unify DIR -r 2 --from-world 8 --device g3", 0, ""),
        ("llama-3.1-70b", "expand DIR -w 2", 0, "No scales of MAXABS_HW"),
        ("llama-4-maverick", "unify DIR -r 1", 1, "--dump inc_measure_output or --dump inc_output"),
        ("llama-4-maverick", "unify DIR -r 1 --dump inc_output", 1, "no ranges of rank 2 of 8 (nor of 5 more)"),
        ("llama-4-maverick", "postprocess DIR --dump inc_output", 0, ""),
        ("llama-4-maverick", "postprocess DIR", 1, "--dump inc_measure_output or --dump inc_output"),
        ("llama-4-maverick", "merge DIR DIR/. -o OUT", 1, "--dump inc_measure_output or --dump inc_output"),
        *((name, "postprocess DIR", 0, "") for name in SETS if name != "llama-4-maverick"),
        *(
            (name, "merge DIR COPY -o OUT", 0, "")
            for name in ("deepseek-r1", "llama-2-7b", "llama-3.1-70b", "mixtral-8x7b")
        ),
    ],
)
def test_commands_take_them(
    name: str, words: str, code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In place and elsewhere; what must be known is asked for by one option, and a refusal changes nothing."""
    source, other, out = copy(name, tmp_path), copy(name, tmp_path / "again"), tmp_path / "out"
    places = {"DIR": str(source), "COPY": str(other), "OUT": str(out), "DIR/.": str(source) + "/."}
    line = [places.get(word, word) for word in words.split()]
    before = snapshot(source)
    if "-o" not in line:
        assert main([*line, "-o", str(out)]) == code
        assert snapshot(source) == before and out.exists() is (code == 0)
    assert main(line) == code
    printed = capsys.readouterr()
    assert told in printed.err
    written = {Path(path): parse_rank_file(Path(path).name) for path in printed.out.split()}
    if code:
        assert snapshot(source) == before and not written
    else:
        ranges = {path for path, file in written.items() if file and file.is_ranges}
        assert ranges and {path.with_suffix(end) for path in ranges for end in (".json", ".npz")} == ranges
        assert all(path.is_file() for path in written)


def test_ops_are_told_by_their_names_of_any_age():
    """A cache is no linear layer because an older vLLM called it otherwise."""
    (old,) = CalibrationDir(REAL / "llama-2-7b").read_present(1)
    ops = {name.rpartition(".")[2]: find_op(name, node) for name, node in old.nodes.items()}
    assert ops["qk_matmul"] is ops["kv_matmul"] is Op.MATMUL and ops["key_cache"] is ops["value_cache"] is Op.KV_CACHE
    for name, op in (("qwen3-235b", "MoeOp"), ("llama-4-maverick-ep8", "hpu_fused_moe"), ("deepseek-r1", "moe_op")):
        place = CalibrationDir(REAL / name)
        nodes = place.read_present(place.whole_worlds[0])[0].nodes
        assert [node for node, ranges in nodes.items() if find_op(node, ranges) is Op.DYNAMIC_MOE] == [
            next(node for node in nodes if node.endswith(f".{op}"))
        ]


def test_caches_of_an_older_age_reach_their_matmuls(tmp_path: Path):
    """`key_cache` feeds `qk_matmul`, `value_cache` feeds `kv_matmul`, as their successors do."""
    assert main(["postprocess", str(REAL / "llama-2-7b"), "-o", str(tmp_path)]) == 0
    (nodes,) = (ranks.nodes for ranks in CalibrationDir(tmp_path).read_present(1))
    for name, node in nodes.items():
        parent, _, op = name.rpartition(".")
        cache = {"qk_matmul": "key_cache", "kv_matmul": "value_cache"}.get(op)
        assert cache is None or node.inputs[1] == nodes[f"{parent}.{cache}"].inputs[0]


def test_experts_of_every_age_are_lined_up(tmp_path: Path):
    """Two ranks of whole experts become one of twice as many, whatever the fused op is called."""
    for name, op, count in (("qwen3-235b", "hpu_fused_moe.MoeOp", 64), ("llama-4-maverick-ep8", "hpu_fused_moe", 32)):
        place = CalibrationDir(REAL / name)
        world = place.whole_worlds[0]
        assert main(["unify", str(place.path), "-r", str(world // 2), "-o", str(tmp_path / name)]) == 0
        nodes = CalibrationDir(tmp_path / name).read_present(world // 2)[0].nodes
        fused = next(node for node in nodes if node.endswith(f".experts.{op}"))
        assert len(nodes[fused].outputs or ()) == count + 1 and f"{fused}.w2_list.{count - 1}" in nodes
