"""`expand`: one rank into many, tensor- and expert-parallel, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import TopologyError
from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import WorldFacts, record_run
from gaudi_calib.ranges.unify import expand_ranks, gather_world, unify_ranks
from gaudi_calib.rankfiles.store import read_ranges, read_scales, write_rank_set
from gaudi_calib.runs.conversion import Conversion
from gaudi_calib.runs.expand import expand_dir
from gaudi_calib.runs.unify import unify_dir
from gaudi_calib.scales.compute import compute_scales
from tests.support import paths
from tests.support.files import snapshot
from tests.support.topologies import LAYER, is_equal, make_rank, make_ranks, write_world

GOLDEN = paths.GOLDEN


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    world=st.sampled_from([1, 2, 3]),
    parts=st.sampled_from([1, 2, 4]),
    local=st.integers(1, 3),
    expert_parallel=st.booleans(),
)
def test_unify_undoes_expand(seed: int, world: int, parts: int, local: int, expert_parallel: bool):
    """Whatever the layout: names, order, numbers, modules."""
    ranks = make_ranks(seed, world, experts=local * parts)
    expanded = expand_ranks(gather_world(ranks), world * parts, expert_parallel=expert_parallel)
    assert [(one.rank, one.world) for one in expanded] == [(rank, world * parts) for rank in range(world * parts)]
    back = unify_ranks(gather_world(expanded), world, expert_parallel=expert_parallel)
    assert all(is_equal(one, other) for one, other in zip(ranks, back, strict=True))


def test_experts_are_dealt_out_in_order():
    """Rank r gets experts r * local to r * local + local - 1, counted from 0; the rest is copied."""
    whole = make_rank(1, 0, 1, experts=6)
    for rank in expand_ranks(gather_world([whole]), 3, expert_parallel=True):
        node, full = rank.nodes[LAYER], whole.nodes[LAYER]
        first = 2 * rank.rank
        assert node.outputs == (full.outputs[0], *full.outputs[1 + first : 3 + first])
        assert rank.nodes[f"{LAYER}.w2_list.1"].weight == whole.nodes[f"{LAYER}.w2_list.{first + 1}"].weight
        assert f"{LAYER}.w2_list.2" not in rank.nodes and f"{LAYER}.w2_list.2" not in rank.modules
        assert (
            rank.nodes["model.layers.0.self_attn.o_proj"].inputs
            == whole.nodes["model.layers.0.self_attn.o_proj"].inputs
        )


def test_tensor_parallel_ranks_are_copies():
    """Every rank has a slice of every expert; the whole's range is an upper bound."""
    whole = make_rank(1, 0, 1, experts=5)
    for rank in expand_ranks(gather_world([whole]), 4, expert_parallel=False):
        assert repr(dict(rank.nodes)) == repr(dict(whole.nodes))


@pytest.mark.parametrize(
    ("experts", "world", "size", "message"),
    [(6, 1, 4, "6 experts do not divide over 4"), (4, 2, 3, "3 is no multiple of 2")],
)
def test_what_does_not_divide_is_refused(experts: int, world: int, size: int, message: str):
    """No expert is dropped."""
    with pytest.raises(TopologyError) as error:
        expand_ranks(gather_world(make_ranks(1, world, experts=experts)), size, expert_parallel=True)
    assert message in str(error.value)


def test_expand_asks_how_experts_are_split(tmp_path: Path, capsys):
    """One rank does not tell; the flag or the manifest does, and the flag wins over the manifest's earlier world."""
    source = write_world(tmp_path / "run", [make_rank(1, 0, 1, experts=4)])
    before = snapshot(source)
    assert main(["expand", "-m", str(source), "-w", "2"]) == 1
    assert "--no-expert-parallel" in capsys.readouterr().err
    assert snapshot(source) == before
    facts = {"measured_world": 1, "worlds": {1: WorldFacts(expert_parallel=True)}, "expert_parallel": True}
    with record_run(source / MANIFEST_NAME, command=[], **facts):
        pass
    assert main(["expand", "-m", str(source), "-w", "2", "-o", str(tmp_path / "ep")]) == 0
    assert len(CalibrationDir(tmp_path / "ep").read_world(2)[0].nodes[LAYER].outputs) == 3
    assert main(["expand", "-m", str(source), "-w", "2", "-o", str(tmp_path / "tp"), "--no-expert-parallel"]) == 0
    assert len(CalibrationDir(tmp_path / "tp").read_world(2)[0].nodes[LAYER].outputs) == 5
    for name in ("ep", "tp"):  # each result knows how it was made
        assert main(["unify", "-m", str(tmp_path / name), "-r", "1"]) == 0
        assert is_equal(CalibrationDir(tmp_path / name).read_world(1)[0], CalibrationDir(source).read_world(1)[0])


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tp", "ep"])
def test_scales_of_every_rank_are_computed(expert_parallel: bool, tmp_path: Path):
    """With the method of the source, for the experts the rank has."""
    whole = make_rank(3, 0, 1, experts=4)
    source = write_world(tmp_path / "g2", [whole])
    write_rank_set(source, compute_scales(whole, "maxabs_hw", GAUDI2, weights=lambda _: None), method="MAXABS_HW")
    written = expand_dir(source, 2, tmp_path / "out", conversion=Conversion(expert_parallel=expert_parallel))
    assert len(written) == 2 * 5
    for rank in CalibrationDir(tmp_path / "out").read_world(2):
        expected = compute_scales(rank, "maxabs_hw", GAUDI2, weights=lambda _: None).nodes
        path = tmp_path / "out" / f"inc_output_hooks_maxabs_MAXABS_HW_{rank.rank}_2.json"
        assert dict(read_scales(path).nodes) == dict(expected)
        assert json.loads(path.read_text())["LocalRank"] == rank.rank


@pytest.mark.parametrize("model", ["mixtral-tiny", "deepseek-v3-fp8-tiny"])
@pytest.mark.parametrize("flag", ["--expert-parallel", "--no-expert-parallel"])
def test_real_files_survive_the_way_out_and_back(model: str, flag: str, tmp_path: Path):
    """Files of vllm-gaudi's run, expanded and unified: byte for byte what they were, module lists included."""
    source = GOLDEN / model / "tp1" / "g2"
    assert main(["expand", "-m", str(source), "-w", "4", "-o", str(tmp_path), flag]) == 0
    assert len(list(tmp_path.glob("*_MAXABS_HW_*_4.npz"))) == 4
    assert main(["unify", "-m", str(tmp_path), "-r", "1", "--device", "g2", flag]) == 0
    name = "inc_output_hooks_maxabs_0_1"
    for end in (".json", "_mod_list.json"):
        assert (tmp_path / f"{name}{end}").read_bytes() == (source / f"{name}{end}").read_bytes()
    left, right = (np.load(one / f"{name}.npz", allow_pickle=True)["arr_0"].item() for one in (tmp_path, source))
    assert repr(left) == repr(right)
    scales = "inc_output_hooks_maxabs_MAXABS_HW_0_1.json"
    assert (tmp_path / scales).read_bytes() == (source / scales).read_bytes()


def test_expand_in_place_keeps_the_source(tmp_path: Path):
    """Worlds 1, 2 and 4 side by side; a second expansion takes the one it means."""
    source = write_world(tmp_path, [make_rank(1, 0, 1, experts=4)])
    before = snapshot(source)
    conversion = Conversion(expert_parallel=True)
    expand_dir(source, 2, source, conversion=conversion)
    expand_dir(source, 4, source, from_world=2, conversion=conversion)
    expand_dir(source, 4, tmp_path / "direct", conversion=conversion)
    assert {name: snapshot(source)[name] for name in before} == before
    assert {name: snapshot(source)[name] for name in snapshot(tmp_path / "direct")} == snapshot(tmp_path / "direct")
    unify_dir(source, 1, tmp_path / "back", conversion=conversion)
    assert is_equal(
        read_ranges(tmp_path / "back/inc_output_hooks_maxabs_0_1.json"), CalibrationDir(source).read_world(1)[0]
    )
