"""`unify`: ranks into fewer ranks, experts included, and how they were split is found out."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import CalibrationError, RangeError, TopologyError, UsageError
from gaudi_calib.files import write_json
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME
from gaudi_calib.manifest import WorldFacts, read_manifest, record_run
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.unify import gather_world, unify_ranks
from gaudi_calib.rankfiles.store import read_ranges, read_scales, write_rank_set
from gaudi_calib.runs.sharing import Evidence, settle_expert_parallel
from gaudi_calib.runs.unify import Conversion, unify_dir
from gaudi_calib.scales.compute import compute_scales
from tests.support.files import snapshot
from tests.support.topologies import LAYER, OPS, is_equal, make_rank, make_ranks, merge_plainly, write_world

RANKS_ONLY = Conversion(expert_parallel=True, skips_scales=True)


def unify(ranks: list[RankSet[Node]], world: int, *, expert_parallel: bool) -> list[RankSet[Node]]:
    return unify_ranks(gather_world(ranks), world, expert_parallel=expert_parallel)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tp", "ep"])
@pytest.mark.parametrize(("world", "size"), [(2, 1), (4, 2), (8, 1), (8, 8)])
def test_unify_equals_the_plain_rule(world: int, size: int, expert_parallel: bool, op: str):
    """Names, order and numbers are those of the rule written node by node, for both names of the fused op."""
    ranks = make_ranks(1, world, experts=5, op=op)
    merged = unify(ranks, size, expert_parallel=expert_parallel)
    group = world // size
    for index, one in enumerate(merged):
        parts = ranks[index * group : (index + 1) * group]
        expected = merge_plainly(parts, expert_parallel=expert_parallel and group > 1)
        modules = (*expected, "model.layers.0.self_attn.attn.impl.softmax")
        assert is_equal(one, RankSet(index, size, expected, modules, 10))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tp", "ep"])
def test_unify_is_associative_along_divisors(seed: int, expert_parallel: bool):
    """8 -> 4 -> 2 -> 1, 8 -> 2 -> 1 and 8 -> 1 give the same."""
    ranks = make_ranks(seed, 8, experts=1 + seed)
    results = []
    for chain in ((4, 2, 1), (2, 1), (1,)):
        current = ranks
        for size in chain:
            current = unify(current, size, expert_parallel=expert_parallel)
        results += current
    assert is_equal(results[0], results[1]) and is_equal(results[0], results[2])


def test_maxima_of_different_ranks_survive():
    """Each rank has the largest value somewhere; all of them are in the result, channel by channel."""
    ranks = [
        RankSet(rank, 4, {"q": Node((np.eye(4, dtype=np.float32)[rank],), None, np.float32([rank]))})
        for rank in range(4)
    ]
    (merged,) = unify(ranks, 1, expert_parallel=False)
    assert merged.nodes["q"].inputs[0].tolist() == [1, 1, 1, 1] and merged.nodes["q"].weight == 3


def test_experts_of_different_ranks_are_never_maximized():
    """Idle experts differ between ranks: the data prove expert parallelism, without a flag and against a wrong one."""
    world = gather_world(make_ranks(2, 4, experts=4, idle=[(0,), (), (2,), ()]))
    assert settle_expert_parallel(world, None) is True
    with pytest.raises(TopologyError, match="not clear how the experts") as error:
        settle_expert_parallel(world, False)
    assert "--no-expert-parallel" in str(error.value) and "idle" in str(error.value)


def test_equal_idle_experts_prove_tensor_parallelism_only_beyond_coincidence():
    """2 idle of 64 on 8 ranks are the same by chance with probability 2016**-7; 1 of 4 on 2 ranks with 1/4."""
    many = gather_world(make_ranks(3, 8, experts=64, idle=[(5, 40)] * 8))
    assert settle_expert_parallel(many, None) is False
    few = gather_world(make_ranks(3, 2, experts=4, idle=[(1,)] * 2))
    with pytest.raises(TopologyError, match="not clear") as error:
        settle_expert_parallel(few, None)
    assert "--expert-parallel" in error.value.fix and "--no-expert-parallel" in error.value.fix


def test_evidence_outweighs_silence_and_contradictions_are_told():
    """A manifest decides where the data say nothing; against the data, or the flag, it is an error."""
    silent = gather_world(make_ranks(4, 2, experts=4))
    assert settle_expert_parallel(silent, None, [Evidence(True, "manifest")]) is True
    assert settle_expert_parallel(silent, False) is False
    with pytest.raises(TopologyError, match="not clear"):
        settle_expert_parallel(silent, False, [Evidence(True, "manifest")])
    telling = gather_world(make_ranks(4, 2, experts=4, idle=[(0,), ()]))
    with pytest.raises(TopologyError, match="not clear"):
        settle_expert_parallel(telling, None, [Evidence(False, "manifest")])


def test_a_dense_model_takes_any_flag():
    """The reference's users pass -u always."""
    dense = gather_world([replace(rank, nodes=_drop(rank, "moe_op")) for rank in make_ranks(5, 2, experts=4)])
    assert [settle_expert_parallel(dense, flag) for flag in (None, True, False)] == [False] * 3


def _drop(rank: RankSet[Node], part: str) -> dict[str, Node]:
    return {name: node for name, node in rank.nodes.items() if part not in name}


def _without(rank: RankSet[Node], name: str) -> RankSet[Node]:
    return replace(rank, nodes={key: node for key, node in rank.nodes.items() if key != name})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ranks: [ranks[0], make_rank(0, 1, 2, experts=3)], "rank 1 of 2 has 3 experts, rank 0 has 4"),
        (lambda ranks: [_without(rank, LAYER + ".w13_list.1") for rank in ranks], "not numbered 0 to 2"),
        (lambda ranks: [_without(rank, LAYER + ".w2_list.3") for rank in ranks], "lists have 4 and 3"),
        (lambda ranks: [_without(rank, LAYER) for rank in ranks], "no token reached the layer"),
        (lambda ranks: [_short(rank) for rank in ranks], "3 maxima of experts and 4 experts"),
        (lambda ranks: [ranks[0], _without(ranks[1], "model.layers.0.block_sparse_moe.gate")], "has no node"),
    ],
    ids=["uneven", "gap", "lists differ", "op unmeasured", "op short", "node missing"],
)
def test_experts_that_cannot_be_told_apart_are_refused(damage: Callable, message: str):
    """Nothing is guessed about an uneven or incomplete layout."""
    with pytest.raises(TopologyError, match=message):
        gather_world(damage(make_ranks(0, 2, experts=4)))


def _short(rank: RankSet[Node]) -> RankSet[Node]:
    node = rank.nodes[LAYER]
    return replace(rank, nodes={**rank.nodes, LAYER: Node(node.inputs, node.outputs[:-1])})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["inputs", "outputs", "weight"])
def test_a_number_that_is_none_is_refused_by_node_and_rank(part: str, value: float):
    """A maximum would lose NaN, and spread inf."""
    ranks = make_ranks(6, 4, experts=2)
    name = "model.layers.2.self_attn.o_proj"
    node = ranks[2].nodes[name]
    bad = np.float32([value])
    damaged = replace(node, **{part: bad if part == "weight" else (bad, *getattr(node, part)[1:])})
    ranks[2] = replace(ranks[2], nodes={**ranks[2].nodes, name: damaged})
    with pytest.raises(RangeError, match=rf"{part}.* of {name} is not finite on rank 2 of 4"):
        gather_world(ranks)


def test_ranks_in_another_order_are_brought_into_line():
    """Node order is that of the first rank."""
    first, second = make_ranks(7, 2, experts=2)
    shuffled = replace(second, nodes=dict(reversed(second.nodes.items())))
    pairs = [unify([first, one], 1, expert_parallel=True)[0] for one in (second, shuffled)]
    assert is_equal(*pairs)


def test_in_place_chains_equal_the_direct_way(tmp_path: Path):
    """8 -> 4 -> 2 -> 1 in one directory: older worlds lie beside, and do not matter as they give the same."""
    source = write_world(tmp_path / "g2", make_ranks(8, 8, experts=2))
    unify_dir(source, 1, tmp_path / "direct", conversion=RANKS_ONLY)
    for world in (4, 2, 1):
        unify_dir(source, world, source, conversion=RANKS_ONLY)
    direct = snapshot(tmp_path / "direct")
    assert set(direct) == {f"inc_output_hooks_maxabs_0_1{end}" for end in (".json", ".npz", "_mod_list.json")}
    assert {name: snapshot(source)[name] for name in direct} == direct


def test_worlds_that_give_different_results_are_ambiguous(tmp_path: Path):
    """Two measurements in one directory: the message names them and the option that chooses."""
    source = write_world(tmp_path, [*make_ranks(1, 4, experts=2), *make_ranks(2, 2, experts=4)])
    with pytest.raises(CalibrationError, match="world sizes 4, 2") as error:
        unify_dir(source, 1, source, conversion=RANKS_ONLY)
    assert "--from-world" in error.value.fix
    unify_dir(source, 1, tmp_path / "out", from_world=2, conversion=RANKS_ONLY)
    assert is_equal(
        *CalibrationDir(tmp_path / "out").read_world(1), *unify(make_ranks(2, 2, experts=4), 1, expert_parallel=True)
    )


def test_two_measurements_of_one_world_are_ambiguous(tmp_path: Path):
    """Files of another dump name beside: neither is taken silently."""
    source = write_world(tmp_path, make_ranks(1, 2, experts=2))
    write_world(source, [replace(rank, dump="older") for rank in make_ranks(2, 2, experts=2)])
    with pytest.raises(CalibrationError, match="two files are ranges of rank 0 of 2"):
        unify_dir(source, 1, source, conversion=RANKS_ONLY)


def test_the_number_of_experts_tells(tmp_path: Path):
    """config.json with 8 experts: ranks with 8 hold slices, with 4 whole experts, with 5 something is wrong."""
    write_json(tmp_path / "config.json", {"text_config": {"num_experts": 8}})
    conversion = Conversion(model=tmp_path, skips_scales=True)
    for experts, expected in ((8, 8), (4, 8)):
        source = write_world(tmp_path / str(experts), make_ranks(1, 2, experts=experts))
        unify_dir(source, 1, source, conversion=conversion)
        (merged,) = CalibrationDir(source).read_world(1)
        assert len(merged.nodes[LAYER].outputs) == 1 + expected
    source = write_world(tmp_path / "5", make_ranks(1, 2, experts=5))
    with pytest.raises(TopologyError, match="5 experts are not those of a model with 8"):
        unify_dir(source, 1, source, conversion=conversion)


def test_the_channel_ranges_of_the_run_tell_the_number_of_experts(tmp_path: Path):
    """Their header is enough; damaged, it is an error and not a guess."""
    nodes = {LAYER: {"op": "dynamic_moe", "experts": {"count": 8}}, "lm_head": {"op": "linear"}}
    header = json.dumps({"__metadata__": {"channel_ranges": json.dumps({"nodes": nodes})}}).encode()
    channels = tmp_path / CHANNEL_RANGES_NAME
    channels.write_bytes(struct.pack("<Q", len(header)) + header)
    source = write_world(tmp_path / "g2", make_ranks(1, 4, experts=2))
    unify_dir(source, 1, tmp_path / "out")
    assert len(CalibrationDir(tmp_path / "out").read_world(1)[0].nodes[LAYER].outputs) == 9
    channels.write_bytes(channels.read_bytes()[:-5])
    with pytest.raises(CalibrationError, match="damaged"):
        unify_dir(source, 1, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=lambda device: device.name)
def test_scales_are_computed_from_the_merged_ranges(device, tmp_path: Path):
    """Not the maximum of scales: the method's rule on the maximum, for the nodes that had scales."""
    ranks = make_ranks(9, 4, experts=2)
    source = write_world(tmp_path / device.name, ranks)
    for rank in ranks:
        scales = compute_scales(rank, "maxabs_pow2", device, weights=lambda _: None)
        nodes = {name: node for name, node in scales.nodes.items() if "gate" not in name}
        write_rank_set(source, replace(scales, nodes=nodes), method="MAXABS_POW2")
    unify_dir(source, 2, tmp_path / "out", conversion=Conversion(expert_parallel=True))
    for merged in CalibrationDir(tmp_path / "out").read_world(2):
        expected = compute_scales(merged, "maxabs_pow2", device, weights=lambda _: None).nodes
        found = read_scales(tmp_path / "out" / f"inc_output_hooks_maxabs_MAXABS_POW2_{merged.rank}_2.json").nodes
        assert dict(found) == {name: node for name, node in expected.items() if "gate" not in name}
        assert any("w2_list.3" in name for name in found)


def test_scales_are_those_of_a_gaudi(tmp_path: Path):
    """A pair of a Llama 70B's files: INC on a CPU, which divides by 112 and 224, would have twice these scales."""
    ranks = [
        RankSet(rank, 2, {"q_proj": Node((np.float32([14.0625]),), None, np.float32([28.125]))}) for rank in (0, 1)
    ]
    source = write_world(tmp_path / "g3", ranks)
    for rank in ranks:
        write_rank_set(source, compute_scales(rank, "unit_scale", GAUDI3, weights=lambda _: None), method="MAXABS_HW")
    unify_dir(source, 1, source)
    scales = read_scales(source / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json").nodes["q_proj"]
    assert (scales.inputs[0], scales.weight, scales.outputs[0]) == (2.0**-3, 2.0**-3, 2.0**-6)
    divided = compute_scales(ranks[0], "maxabs_hw", GAUDI3, weights=lambda _: None, as_on_cpu=True).nodes["q_proj"]
    assert (divided.inputs[0], divided.weight, divided.outputs[0]) == (2.0**-2, 2.0**-2, 2.0**-4)


def test_backoffs_come_from_the_config_beside(tmp_path: Path):
    """../maxabs_quant_g3.json with other backoffs, as serving reads it."""
    form = {
        "default": {
            "weight": {"rounding_method": "HW_ALIGNED", "backoff": 0.125},
            "activation": {"rounding_method": "HW_ALIGNED", "backoff": 0.0625},
        }
    }
    config = {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": form, "dump_stats_path": "g3/inc_output"}
    write_json(tmp_path / "maxabs_quant_g3.json", config)
    ranks = [RankSet(rank, 2, {"q_proj": Node((np.float32([2.0]),), None, np.float32([2.0]))}) for rank in (0, 1)]
    source = write_world(tmp_path / "g3", ranks)
    for rank in ranks:
        write_rank_set(source, compute_scales(rank, "maxabs_hw", GAUDI3, weights=lambda _: None), method="MAXABS_HW")
    unify_dir(source, 1, source)
    scales = read_scales(source / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json").nodes["q_proj"]
    assert (scales.inputs[0], scales.weight) == (2.0**-3, 2.0**-4)


def test_scales_that_cannot_be_computed_are_left_out_with_a_command(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Unknown device, or a method that needs weights: a warning says what to run; a wrong --device is refused."""
    ranks = [RankSet(rank, 2, {"k_cache": Node((np.float32([2.0]),))}) for rank in (0, 1)]
    source = write_world(tmp_path / "measured", ranks)
    for rank in ranks:
        for method in ("MAXABS_HW", "MAXABS_HW_OPT_WEIGHT"):
            write_rank_set(source, compute_scales(rank, method, GAUDI2, weights=lambda _: None), method=method)
    assert len(unify_dir(source, 1, tmp_path / "none")) == 3
    words = f"quantize {tmp_path / 'none'} -t 1 --device DEVICE --scale-method maxabs_hw"
    assert "--device does" in caplog.text and f"`gaudi-calib {words}`" in caplog.text
    unify_dir(source, 1, tmp_path / "out/run/g2")
    words = f"quantize {tmp_path / 'out/run/g2'} -m MODEL -t 1 --device g2"
    assert f"`gaudi-calib {words} --scale-method maxabs_hw_opt_weight`" in caplog.text
    written = unify_dir(source, 1, tmp_path / "one", conversion=Conversion(device="g2"))
    assert [path.name for path in written[3:]] == [
        f"inc_output_hooks_maxabs_MAXABS_HW_0_1.{end}" for end in ("json", "npz")
    ]
    assert "they need the weights" in caplog.text
    with pytest.raises(UsageError, match="contradicts"):
        unify_dir(source.rename(tmp_path / "g2"), 1, tmp_path / "two", conversion=Conversion(device="g3"))


def test_stale_scales_are_moved_away(tmp_path: Path):
    """INC would go on using scales of the ranges that were there before."""
    source = write_world(tmp_path / "g2", make_ranks(1, 2, experts=2))
    old = make_rank(9, 0, 1, experts=4)
    write_world(source, [old])
    write_rank_set(source, compute_scales(old, "maxabs_hw", GAUDI2, weights=lambda _: None), method="MAXABS_HW")
    unify_dir(source, 1, source, conversion=RANKS_ONLY)
    assert {path.name for path in (source / "replaced").iterdir()} == {
        f"inc_output_hooks_maxabs_MAXABS_HW_0_1.{end}" for end in ("json", "npz")
    }
    assert not list(source.glob("*MAXABS_HW*"))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
def test_the_manifest_covers_the_new_world(in_place: bool, tmp_path: Path):
    """It decides how experts were split, and says afterwards what the scales were computed from."""
    ranks = make_ranks(1, 4, experts=2)
    source = write_world(tmp_path / "run", ranks)
    for rank in ranks:
        write_rank_set(source, compute_scales(rank, "maxabs_hw", GAUDI3, weights=lambda _: None), method="MAXABS_HW")
    facts = {"measured_world": 4, "worlds": {4: WorldFacts(expert_parallel=True)}, "expert_parallel": True}
    files = CalibrationDir(source).hash_files()
    with record_run(source / MANIFEST_NAME, command=["measure"], device="g3", files=files, **facts):
        pass
    out = source if in_place else tmp_path / "out"
    written = unify_dir(source, 2, out)
    manifest = read_manifest(out / MANIFEST_NAME)
    assert (manifest.status, manifest.device, manifest.expert_parallel) == ("ok", "g3", True)
    assert 2 in manifest.worlds and [step.command for step in manifest.history] == [["measure"]]
    assert {path.name for path in written} <= set(manifest.files)
    stale = [stale.path.name for stale in CalibrationDir(out).find_stale() if "_2." in stale.path.name]
    assert stale == []
    assert manifest.scales["inc_output_hooks_maxabs_MAXABS_HW_1_2.npz"].settings["device"] == "g3"
    unify_dir(out, 1, out)  # the new manifest tells it again
    assert len(CalibrationDir(out).read_world(1)[0].nodes[LAYER].outputs) == 9


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


FIRST, SECOND = "inc_output_hooks_maxabs_0_2", "inc_output_hooks_maxabs_1_2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: [path.unlink() for path in d.glob(f"{SECOND}.*")], "no ranges of rank 1 of 2"),
        (lambda d: (d / f"{SECOND}.json").write_bytes((d / f"{SECOND}.json").read_bytes()[:3000]), "not valid JSON"),
        (lambda d: (d / f"{SECOND}.npz").write_bytes((d / f"{SECOND}.npz").read_bytes()[:3000]), "damaged"),
        (lambda d: _edit(d / f"{SECOND}.json", "0.", "1."), "different values"),
        (lambda d: np.savez(d / f"{SECOND}.npz", np.array(_Bomb(), dtype=object)), "refused to load"),
        (lambda d: np.savez(d / f"{FIRST}.npz", np.array(_Bomb(), dtype=object)), "refused to load"),
        (lambda d: write_world(d, [make_rank(1, 1, 2, experts=3)]), "3 experts, rank 0 has 2"),
        (
            lambda d: write_world(d, [_without(make_rank(1, 1, 2, experts=2), LAYER + ".w2_list.1")]),
            "lists have 2 and 1",
        ),
        (lambda d: write_world(d, [make_rank(1, rank, 2, experts=2) for rank in (0, 1)]), "not clear how the experts"),
    ],
    ids=[
        "rank missing",
        "truncated json",
        "truncated npz",
        "json and npz differ",
        "pickle bomb",
        "pickle bomb on rank 0",
        "uneven experts",
        "expert missing",
        "unknown split",
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "elsewhere"])
def test_bad_input_changes_nothing(
    damage: Callable, message: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """A clear error with a fix, exit code 1, and every byte as it was."""
    monkeypatch.chdir(tmp_path)
    source = write_world(tmp_path / "g2", make_ranks(1, 2, experts=2, idle=[(0,), ()]))
    (source / "notes.json").write_text("{stray")
    damage(source)
    before = snapshot(tmp_path)
    assert main(["unify", "-m", "g2", "-r", "1", *(["-o", "out"] if elsewhere else [])]) == 1
    shown = capsys.readouterr().err
    assert message in shown and "fix:" in shown and "Traceback" not in shown
    assert snapshot(tmp_path) == before


def test_foreign_files_are_unified_under_their_name(tmp_path: Path):
    """Another dump name, LocalRank -1 and no mod_list: read as they are, and the result has a mod_list."""
    ranks = [replace(rank, dump="hqt") for rank in make_ranks(1, 2, experts=2)]
    source = write_world(tmp_path, ranks)
    for path in source.glob("*_mod_list.json"):
        path.unlink()
    for path in source.glob("*.json"):
        content = json.loads(path.read_text())
        content["LocalRank"] = -1
        path.write_text(json.dumps(content))
    unify_dir(source, 1, tmp_path / "out", conversion=RANKS_ONLY)
    merged = read_ranges(tmp_path / "out" / "hqt_hooks_maxabs_0_1.json")
    assert merged.modules == tuple(merged.nodes)
    assert json.loads((tmp_path / "out" / "hqt_hooks_maxabs_0_1_mod_list.json").read_text()) == list(merged.nodes)


def test_step_5_finds_out_what_a_forgotten_u_would_hide(tmp_path: Path, capsys):
    """The reference's command line without -u on expert-parallel files: lined up, not maximized."""
    source = write_world(tmp_path / "m", make_ranks(1, 2, experts=2, idle=[(0,), ()]))
    shutil.copytree(source, tmp_path / "copy")
    assert main(["unify", "-m", str(source), "-r", "1", "-o", str(tmp_path / "found")]) == 0
    assert main(["unify", "-m", str(source), "-r", "1", "-o", str(tmp_path / "told"), "-u"]) == 0
    assert snapshot(tmp_path / "found") == snapshot(tmp_path / "told")
    assert main(["unify", "-m", str(source), "-r", "1", "--no-expert-parallel"]) == 1
    assert "contradict" in (text := capsys.readouterr().err) or "not clear" in text


def test_ranges_alone_are_unified_without_pydantic(tmp_path: Path):
    """Only a QUANT_CONFIG or a manifest needs it, and loading it takes as long as unifying does."""
    source = write_world(tmp_path / "g3", make_ranks(1, 2, experts=2))
    code = (
        "import sys\nfrom gaudi_calib.cli.main import main\n"
        f"assert main(['unify', {str(source)!r}, '-r', '1', '-u']) == 0\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
