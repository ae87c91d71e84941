"""`gaudi-calib merge`: ranges of several runs of one model into one."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ModelError
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME
from gaudi_calib.manifest import ModelFacts, read_manifest, record_run
from gaudi_calib.ranges.channels import ChannelNode, ChannelRange, ChannelRanges, ExpertChannels
from gaudi_calib.ranges.merge import join_names, merge_channels, merge_ranks
from gaudi_calib.ranges.node import Node, Op, RankSet
from gaudi_calib.ranges.topology import Axis, Segment
from gaudi_calib.rankfiles.channel_file import read_channel_ranges, write_channel_ranges
from gaudi_calib.rankfiles.store import write_rank_set
from tests.support import paths, topologies
from tests.support.files import snapshot, write_prompts

GOLDEN = paths.GOLDEN / "llama-tiny"
MODULES = tuple(f"model.layers.{layer}.{part}" for layer in range(12) for part in ("qkv_proj", "o_proj", "moe_op"))
WEIGHTS = {name: np.float32([0.5 + i]) for i, name in enumerate(MODULES)}


def make_ranks(seed: int, *, rank: int = 0, world: int = 1, reached: float = 0.8) -> RankSet[Node]:
    """One random run: the same model for every seed, other ranges, and some nodes not reached."""
    random = np.random.default_rng(seed)
    forms = {"qkv_proj": (1, None), "o_proj": (1, 2), "moe_op": (1, 5)}
    nodes = {}
    for name in MODULES:
        inputs, outputs = forms[name.rpartition(".")[2]]
        values = [random.random(1, dtype=np.float32) for _ in range(inputs + (outputs or 0))]
        weight = None if name.endswith("moe_op") else WEIGHTS[name]
        node = Node(tuple(values[:inputs]), tuple(values[inputs:]) if outputs else None, weight)
        if random.random() < reached:
            nodes[name] = node
    return RankSet(rank, world, nodes, MODULES, int(random.integers(1, 100)))


def combine(*runs: RankSet[Node]) -> RankSet[Node]:
    return merge_ranks(runs, [f"run {i}" for i in range(len(runs))])


def describe(rank_set: RankSet[Node]) -> object:
    """Everything a rank set holds, comparable with ==, the order of its nodes included."""
    nodes = [
        (
            name,
            [one.tolist() for one in node.inputs],
            None if node.outputs is None else [one.tolist() for one in node.outputs],
            None if node.weight is None else node.weight.tolist(),
        )
        for name, node in rank_set.nodes.items()
    ]
    return (rank_set.rank, rank_set.world, nodes, rank_set.modules, rank_set.num_samples)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_merge_is_commutative_associative_and_idempotent(seed: int, world: int):
    """It does not matter how the data was split over runs, nor in which order they are merged."""
    a, b, c = (make_ranks(3 * seed + i, world=world) for i in range(3))
    together = describe(combine(a, b, c))
    assert all(describe(combine(*order)) == together for order in itertools.permutations((a, b, c)))
    assert describe(combine(combine(a, b), c)) == together == describe(combine(a, combine(b, c)))
    assert describe(combine(combine(a, b, c), a)) == together
    assert describe(combine(a, a)) == describe(combine(a))
    assert describe(combine(make_ranks(seed, world=2), make_ranks(seed, world=2))) == describe(
        make_ranks(seed, world=2)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_runs_with_the_same_nodes_are_merged_at_once_to_the_same_result(world: int):
    """The fast way for runs that reached the same nodes gives what merging node by node gives."""
    a, b = (make_ranks(seed, world=world, reached=1) for seed in (50, 51))
    extra = {"extra": Node((np.ones(1, np.float32),))}
    slow = combine(a, replace(b, nodes={**b.nodes, **extra}))
    expected = replace(slow, nodes={name: node for name, node in slow.nodes.items() if name != "extra"})
    assert describe(combine(a, b)) == describe(expected)
    other = replace(b.nodes[MODULES[0]], weight=WEIGHTS[MODULES[0]] * 2)
    with pytest.raises(ModelError, match=f"weight of {MODULES[0]} differs"):
        combine(a, replace(b, nodes={**b.nodes, MODULES[0]: other}))


@pytest.mark.parametrize("seed", range(5))
def test_every_range_is_the_largest_of_the_runs_that_reached_the_node(seed: int):
    """No run's maximum is lost, and a node that one run reached keeps its ranges and its place."""
    runs = [make_ranks(100 + 3 * seed + i, world=2) for i in range(3)]
    merged = combine(*runs)
    assert list(merged.nodes) == [name for name in MODULES if any(name in run.nodes for run in runs)]
    assert merged.num_samples == max(run.num_samples or 0 for run in runs)
    for name, node in merged.nodes.items():
        having = [run.nodes[name] for run in runs if name in run.nodes]
        assert node.inputs[0] == max(one.inputs[0] for one in having)
        for i, output in enumerate(node.outputs or ()):
            assert output == max(one.outputs[i] for one in having if one.outputs)


def test_channel_maxima_of_different_runs_both_survive():
    """Ranges with several channels are merged per channel."""
    a, b = (RankSet(0, 2, {"n": Node((np.float32(values),))}, ("n",)) for values in ([1, 5], [4, 2]))
    assert combine(a, b).nodes["n"].inputs[0].tolist() == [4, 5]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("reached", ["the same", "others"])
def test_what_nobody_reads_is_no_error(world: int, reached: str):
    """A row-parallel layer's second output may be NaN with any number of ranks, whichever way runs are merged."""
    one, nan = np.float32([1]), np.float32([np.nan])
    garbage = RankSet(0, world, {"down_proj": Node((one,), (2 * one, nan), one)})
    other = RankSet(0, world, {"down_proj": Node((one,), (3 * one, one), one)})
    if reached == "others":
        other = replace(other, nodes={**other.nodes, "lm_head": Node((one,))})
    for runs in ((garbage, other), (other, garbage)):
        np.testing.assert_equal(combine(*runs).nodes["down_proj"].outputs, (3 * one, nan))
    damaged = RankSet(0, world, {"down_proj": Node((one,), (nan, one), one)})
    with pytest.raises(ValueError, match=rf"outputs\[0\] of down_proj is not finite on rank 0 of {world}"):
        combine(other, damaged)


def test_names_are_joined_in_module_order():
    """Partial lists are completed from each other; what no list orders is sorted, numbers by value."""
    full = ["embed", "layers.2.b", "layers.2.a", "layers.10.b", "head"]
    for left, right in ((full, full[1:3]), (full[:3], full[2:]), (full[:2] + full[3:], full[1:4])):
        assert join_names([left, right]) == tuple(full) == join_names([right, left])
    assert join_names([["b", "a"], ["a", "b"]]) == ("a", "b")
    assert join_names([["x.10"], ["x.9"]]) == ("x.9", "x.10")


def make_channels(seed: int, worlds: tuple[int, ...] = (1, 2)) -> ChannelRanges:
    """A random per-channel measurement of a row-parallel, a block-to-batch and a fused expert node."""
    random = np.random.default_rng(seed)

    def channels(count: int) -> ChannelRange:
        return ChannelRange(random.random(count, dtype=np.float32), Axis((Segment(count, count),)))

    weight = ChannelRange(np.arange(8, dtype=np.float32), Axis((Segment(8, 8),)))
    products = {world: random.random(world).tolist() for world in worlds}
    experts = ExpertChannels(
        intermediate=random.random((4, 8), dtype=np.float32),
        gate_up=np.ones((4, 8), np.float32),
        down=np.full((4, 8), 2, np.float32),
        tokens=random.integers(0, 9, 4),
        filled=random.integers(0, 2, 4),
        routing=float(random.random()),
        outputs={f"ep{world}": random.random(world, dtype=np.float32) for world in worlds},
    )
    nodes = {
        "o_proj": ChannelNode(
            Op.ROW_PARALLEL_LINEAR, (channels(8),), (channels(1), channels(1)), weight, partial_products=products
        ),
        "block2batch_matmul": ChannelNode(
            Op.B2B_MATMUL, (channels(1), channels(4)), (channels(4),), softmax_sums=channels(4)
        ),
        "moe_op": ChannelNode(Op.DYNAMIC_MOE, (channels(1),), experts=experts),
    }
    return ChannelRanges(nodes, tuple(nodes), int(random.integers(1, 100)))


@pytest.mark.parametrize("seed", range(10))
def test_merging_channel_ranges_is_commutative_associative_and_idempotent(seed: int, tmp_path: Path):
    """Per-channel measurements merge like those of ranks, and survive being written."""
    a, b, c = (make_channels(3 * seed + i) for i in range(3))
    files = []
    for i, value in enumerate(
        (
            merge_channels([a, b, c], "abc"),
            merge_channels([c, a, b], "cab"),
            merge_channels([merge_channels([a, b], "ab"), c], "xc"),
            merge_channels([a, merge_channels([c, b], "cb"), a], "axa"),
        )
    ):
        files.append(tmp_path / f"{i}.safetensors")
        write_channel_ranges(files[-1], value)
    assert len({path.read_bytes() for path in files}) == 1
    merged = read_channel_ranges(files[0]).nodes["o_proj"]
    each = [run.nodes["o_proj"] for run in (a, b, c)]
    assert (merged.inputs[0].values == reduce(np.maximum, [one.inputs[0].values for one in each])).all()
    for rank in range(2):
        assert merged.partial_products[2][rank] == max(one.partial_products[2][rank] for one in each)


def test_partial_sums_that_one_run_lacks_are_left_out():
    """A topology's sums count as measured only where every run measured them; otherwise bounds stand in."""
    merged = merge_channels([make_channels(1, (1, 2)), make_channels(2, (1, 4))], "ab")
    assert set(merged.nodes["o_proj"].partial_products) == {1}
    assert set(merged.nodes["moe_op"].experts.outputs) == {"ep1"}


def test_experts_that_were_cold_in_one_run_take_the_other_runs_range():
    """Experts are merged per intermediate channel, and their token counts are the largest."""
    runs = [make_channels(seed) for seed in (1, 2)]
    cold = replace(runs[0].nodes["moe_op"].experts, intermediate=np.zeros((4, 8), np.float32), tokens=np.zeros(4, int))
    nodes = {**runs[0].nodes, "moe_op": replace(runs[0].nodes["moe_op"], experts=cold)}
    merged = merge_channels([replace(runs[0], nodes=nodes), runs[1]], "ab").nodes["moe_op"].experts
    warm = runs[1].nodes["moe_op"].experts
    assert (merged.intermediate == warm.intermediate).all() and (merged.tokens == warm.tokens).all()
    other = replace(runs[1].nodes["moe_op"], experts=replace(warm, down=warm.down * 2))
    with pytest.raises(ModelError, match="experts down of moe_op differs"):
        merge_channels([runs[0], replace(runs[1], nodes={**runs[1].nodes, "moe_op": other})], "ab")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda node: replace(node, op=Op.LINEAR), "op of o_proj differs"),
        (lambda node: replace(node, weight=ChannelRange(node.weight.values + 1, node.weight.axis)), "weight values of"),
        (lambda node: replace(node, weight=ChannelRange(node.weight.values)), "weight axis segments of o_proj"),
        (
            lambda node: replace(node, partial_products={1: [float("inf")]}),
            r"partial_products\[1\]\[0\] of o_proj is not fin",
        ),
        (lambda node: replace(node, softmax_sums=node.weight), "softmax_sums of o_proj has another form"),
        (lambda node: replace(node, inputs=()), "inputs of o_proj has another form"),
    ],
)
def test_channel_ranges_of_another_model_are_refused(change: Callable, complaint: str):
    """Ops, axes and weights belong to the model; inputs and outputs have one form."""
    a, b = make_channels(1), make_channels(2)
    b = replace(b, nodes={**b.nodes, "o_proj": change(b.nodes["o_proj"])})
    with pytest.raises(ValueError, match=complaint) as error:
        merge_channels([a, b], ["first.safetensors", "second.safetensors"])
    assert error.value.where == "second.safetensors"


# Directories.


def write_run(directory: Path, seed: int, ranks: dict[int, tuple[int, ...]], **arguments: float) -> Path:
    """Write random ranges of `ranks` by world."""
    for world, present in ranks.items():
        for rank in present:
            rank_set = make_ranks(seed + 1000 * world + rank, rank=rank, world=world, **arguments)
            write_rank_set(directory, rank_set)
    return directory


def run(*words: object) -> int:
    return main(["merge", *map(str, words)])


def test_runs_on_different_data_give_the_maximum_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Every world that all directories hold is merged, and the order of the directories does not show in the files."""
    a, b = (write_run(tmp_path / name, seed, {1: (0,), 2: (0, 1)}) for seed, name in enumerate("ab"))
    assert run(a, b, "-o", tmp_path / "ab") == 0
    printed = capsys.readouterr().out.splitlines()
    assert run(b, a, b, "-o", tmp_path / "ba") == 0
    names = sorted(path.name for path in (tmp_path / "ab").iterdir() if path.name != MANIFEST_NAME)
    assert sorted(Path(line).name for line in printed) == names and len(names) == 9
    for name in names:
        left, right = ((tmp_path / out / name) for out in ("ab", "ba"))
        assert left.read_bytes() == right.read_bytes()
    for world in (1, 2):
        each = zip(*(CalibrationDir(path).read_world(world) for path in (a, b, tmp_path / "ab")), strict=True)
        assert all(describe(combine(one, two)) == describe(merged) for one, two, merged in each)


def test_ranks_of_one_world_come_from_different_machines(tmp_path: Path):
    """Four machines with one or two ranks each make a whole world; what they hold is not changed."""
    parts = [(0, 3), (1,), (2,)]
    directories = [write_run(tmp_path / str(i), 7, {4: ranks}) for i, ranks in enumerate(parts)]
    whole = write_run(tmp_path / "whole", 7, {4: (0, 1, 2, 3)})
    assert run(*directories, "-o", tmp_path / "out") == 0
    assert [describe(one) for one in CalibrationDir(tmp_path / "out").read_world(4)] == [
        describe(one) for one in CalibrationDir(whole).read_world(4)
    ]


def test_how_experts_are_shared_is_not_made_up(tmp_path: Path):
    """Where no manifest says it, that of the merged ranges does not either: unify finds out, or is told."""
    idle = topologies.make_ranks(1, 2, experts=2, idle=[(0,), ()])
    busy = topologies.make_ranks(1, 2, experts=2)
    for name, ranks, flags in (("found", idle, []), ("told", busy, ["-u"])):
        run_dir = topologies.write_world(tmp_path / name, ranks)
        assert run(run_dir, run_dir, "-o", tmp_path / f"merged {name}") == 0
        assert main(["unify", "-m", str(tmp_path / f"merged {name}"), "-r", "1", *flags]) == 0
        (unified,) = CalibrationDir(tmp_path / f"merged {name}").read_world(1)
        assert len([node for node in unified.nodes if ".w2_list." in node]) == 2 * 4


def test_a_missing_rank_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    """At the end every rank of the world must be there."""
    directories = [write_run(tmp_path / str(rank), 1, {4: (rank,)}) for rank in (0, 1, 3)]
    assert run(*directories, "-o", tmp_path / "out") == 1
    assert "no ranges of rank 2 of 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rank_that_fewer_runs_measured_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Rank 1 of the second run is lost: its data is in rank 0's ranges and not in rank 1's."""
    a, b = write_run(tmp_path / "a", 1, {2: (0, 1)}), write_run(tmp_path / "b", 2, {2: (0,)})
    assert run(a, b, "-o", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "rank 1 of 2 is in fewer directories than other ranks" in error and str(b) in error


def test_a_world_of_some_runs_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    """It would lack what the other run measured; without any world in common the error lists what is there."""
    a, b = write_run(tmp_path / "a", 1, {1: (0,), 2: (0, 1)}), write_run(tmp_path / "b", 2, {2: (0, 1)})
    assert run(a, b, "-o", tmp_path / "out") == 0
    assert list(CalibrationDir(tmp_path / "out").worlds) == [2]
    assert f"ranges of world size 1 are left out: {b} has none" in capsys.readouterr().err
    c = write_run(tmp_path / "c", 3, {1: (0,)})
    assert run(b, c, "-o", tmp_path / "none") == 1
    assert f"{b} has world size 2; {c} has world size 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_merging_in_place_moves_stale_scales_and_worlds_away(tmp_path: Path, capsys: pytest.CaptureFixture):
    """-o may be an input; INC must not find scales of the ranges that were there before."""
    a = tmp_path / "a"
    shutil.copytree(GOLDEN / "tp2" / "g2", a)
    write_run(a, 1, {1: (0,)})
    assert run(a, GOLDEN / "tp2" / "g2", "-o", a) == 0
    assert sorted(CalibrationDir(a).worlds) == [2] and CalibrationDir(a).list_methods(2) == []
    assert CalibrationDir(a / "replaced").list_methods(2) == ["MAXABS_HW"] and list(
        CalibrationDir(a / "replaced").worlds
    ) == [1]
    error = capsys.readouterr().err
    assert str(a / "replaced") in error and "Scales are not merged." in error
    before = [describe(one) for one in CalibrationDir(GOLDEN / "tp2" / "g2").read_world(2)]
    assert [describe(one) for one in CalibrationDir(a).read_world(2)] == before


def make_model_run(
    root: Path,
    seed: int,
    devices: tuple[str, ...] = ("g2", "g3"),
    fingerprint: str = "sha256:1",
    dtype: str | None = None,
) -> Path:
    """A run directory with channel ranges, device directories and their manifests."""
    write_channel_ranges_dir = root / CHANNEL_RANGES_NAME
    root.mkdir()
    write_channel_ranges(write_channel_ranges_dir, make_channels(seed))
    for device in devices:
        write_run(root / device, seed, {1: (0,)})
        path = root / device / MANIFEST_NAME
        model = ModelFacts(name="model", fingerprint=fingerprint)
        placed = CalibrationDir(root / device)
        measurement, files = placed.identify(write_channel_ranges_dir), placed.hash_files()
        facts = {"device": device, "model": model, "dtype": dtype, "measurement": measurement, "files": files}
        with record_run(path, command=["gaudi-calib", "measure", str(seed)], **facts):
            pass
    return root


def test_whole_runs_are_merged_with_their_channel_ranges_and_history(tmp_path: Path):
    """Every device and the channel ranges are merged; the manifest tells which commands they come from."""
    a, b = (make_model_run(tmp_path / name, seed) for seed, name in enumerate("ab"))
    assert run(a, b, "-o", tmp_path / "out") == 0
    for device in ("g2", "g3"):
        (merged,) = CalibrationDir(tmp_path / "out" / device).read_world(1)
        assert describe(merged) == describe(combine(*(CalibrationDir(one / device).read_world(1)[0] for one in (a, b))))
        manifest = read_manifest(tmp_path / "out" / device / MANIFEST_NAME)
        assert (manifest.status, manifest.device, manifest.model and manifest.model.name) == ("ok", device, "model")
        assert sorted(step.command[-1] for step in manifest.history) == ["0", "1"]
        assert len(manifest.files) == 3
    channels = read_channel_ranges(tmp_path / "out" / CHANNEL_RANGES_NAME)
    assert channels.num_samples == max(make_channels(seed).num_samples for seed in (0, 1))
    assert run(tmp_path / "out", a, "-o", tmp_path / "again") == 0
    name = CHANNEL_RANGES_NAME
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    history = read_manifest(tmp_path / "again" / "g3" / MANIFEST_NAME).history
    assert [step.command[-1] for step in history].count("0") == 1


def test_a_device_of_some_runs_is_left_out_and_moved_away_in_place(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Ranges of g2 that lack the second run's data must not stay where they would be served."""
    a, b = make_model_run(tmp_path / "a", 0), make_model_run(tmp_path / "b", 1, ("g3",))
    (b / CHANNEL_RANGES_NAME).unlink()
    assert run(a, b, "-o", a) == 0
    error = capsys.readouterr().err
    assert "ranges of g2 are left out" in error and "channel ranges are left out" in error
    assert CalibrationDir(a / "g2").worlds == {} and list(CalibrationDir(a / "g2" / "replaced").worlds) == [1]
    assert not (a / CHANNEL_RANGES_NAME).exists() and (a / "replaced" / CHANNEL_RANGES_NAME).is_file()
    assert list(CalibrationDir(a / "g3").worlds) == [1]


def _edit(part: str, value: object) -> Callable[[Path], None]:
    """Change one part of one node of world 2's rank 1, in json and npz alike."""

    def edit(directory: Path) -> None:
        rank_set = CalibrationDir(directory).read_world(2)[1]
        name = next(
            name for name, node in rank_set.nodes.items() if node.outputs is not None and len(node.outputs) == 2
        )
        node = replace(rank_set.nodes[name], **{part: value})
        write_rank_set(directory, replace(rank_set, nodes={**rank_set.nodes, name: node}))

    return edit


def _damage(pattern: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: next(directory.glob(pattern)).write_bytes(content) and None


BAD_INPUTS = {
    "nan": (_edit("inputs", (np.float32([np.nan]),)), "is not finite on rank 1 of 2"),
    "inf": (_edit("outputs", (np.float32([np.inf]), np.float32([1]))), "outputs[0] of model.layers"),
    "more inputs": (_edit("inputs", (np.float32([1]),) * 2), "has another form in different runs on rank 1 of 2"),
    "no outputs": (_edit("outputs", None), "has another form"),
    "more channels": (_edit("inputs", (np.float32([1, 2]),)), "has another form"),
    "other weights": (_edit("weight", np.float32([123])), "differs between the runs on rank 1 of 2"),
    "truncated json": (_damage("*_1_2.json", b'{"Nodes": {'), "not valid JSON"),
    "truncated npz": (_damage("*_1_2.npz", b"PK"), "damaged"),
    "no manifest": (_damage("*manifest.json", b"[]"), "not a calibration manifest"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_a_clear_error_and_nothing_is_written(case: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The error names the directory; neither the output nor, in place, the inputs change."""
    damage, complaint = BAD_INPUTS[case]
    a, b = (write_run(tmp_path / name, seed, {2: (0, 1)}, reached=1) for seed, name in enumerate("ab"))
    path = b / MANIFEST_NAME
    with record_run(path, command=["x"]):
        pass
    damage(b)
    before = snapshot(tmp_path)
    assert run(a, b, "-o", tmp_path / "out") == run(a, b, "-o", a) == 1
    error = capsys.readouterr().err
    assert complaint in error and str(b) in error and "fix:" in error
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def test_runs_for_different_types_of_the_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Their weights were rounded differently; of one type, the result has it, too."""
    a, b = (make_model_run(tmp_path / name, seed, dtype="float16") for seed, name in enumerate("ab"))
    assert run(a, b, "-o", tmp_path / "out") == 0
    assert read_manifest(tmp_path / "out" / "g2" / MANIFEST_NAME).dtype == "float16"
    c = make_model_run(tmp_path / "c", 2, dtype="bfloat16")
    assert run(a, c, "-o", tmp_path / "out") == 1
    assert "different types of the model: bfloat16, float16" in capsys.readouterr().err


def test_runs_of_different_checkpoints_or_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The manifests' fingerprints and devices are compared, and without manifests the directories' names."""
    a, b = make_model_run(tmp_path / "a", 0), make_model_run(tmp_path / "b", 1, fingerprint="sha256:2")
    assert run(a, b, "-o", tmp_path / "out") == 1
    assert "different checkpoints" in capsys.readouterr().err
    assert run(a / "g2", a / "g3", "-o", tmp_path / "out") == 1
    assert "different devices: g2, g3" in capsys.readouterr().err
    (a / "g2").rename(tmp_path / "x")
    assert run(tmp_path / "x", a / "g3", "-o", tmp_path / "out") == 1
    assert "different devices: g2, g3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture):
    """One directory, directories of different kinds, an output of another kind and an empty directory are refused."""
    whole, device = make_model_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, {1: (0,)})
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    assert run(device, "-o", tmp_path / "out") == 2
    assert run(device, whole, "-o", tmp_path / "out") == 2
    assert run(device, device, "-o", whole) == 2
    assert run(whole, whole, "-o", device) == 2
    assert run(device, device) == 2
    assert run(device, tmp_path / "empty", "-o", tmp_path / "out") == 1
    assert "neither a device directory (OUT/<model>/g3) nor a run" in capsys.readouterr().err
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def test_stray_files_are_not_taken_for_ranges(tmp_path: Path):
    """Notes, other worlds' names that contain `_0_1`, and hidden directories do not disturb."""
    a, b = (write_run(tmp_path / name, seed, {1: (0,)}) for seed, name in enumerate("ab"))
    (a / "notes_0_1.json").write_text(json.dumps({"Nodes": 1}))
    (b / "inc_output_hooks_maxabs_0_1.json.bak").write_text("x")
    assert run(a, b, "-o", tmp_path / "out") == 0
    assert list(CalibrationDir(tmp_path / "out").worlds) == [1]


def test_two_measurements_in_one_directory_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Files of another dump name, or without a rank in their name, may be the same rank: which one is meant?"""
    a, b = (write_run(tmp_path / name, seed, {1: (0,)}) for seed, name in enumerate("ab"))
    shutil.copy(b / "inc_output_hooks_maxabs_0_1.json", b / "inc_output_hooks_maxabs.json")
    assert run(a, b, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "two files are ranges of rank 0 of 1" in error and str(b) in error and not (tmp_path / "out").exists()


@pytest.mark.torch
def test_merging_measurements_of_shards_equals_measuring_all_of_the_data(tmp_path: Path):
    """Channel ranges and every rank's ranges of two halves of the prompts give, merged, those of all prompts."""
    prompts = json.loads((GOLDEN / "tp1" / "tokens.json").read_text())["prompt_token_ids"]
    for name, part in {"a": prompts[:1], "b": prompts[1:], "all": prompts}.items():
        data = write_prompts(tmp_path / f"{name}.jsonl", part)
        words = ("-m", GOLDEN / "model", "-d", data, "-o", tmp_path / name, "-t", 2, "-r", 1, "-b", 1)
        assert main(["measure", *map(str, words)]) == 0
    assert run(tmp_path / "a" / "model", tmp_path / "b" / "model", "-o", tmp_path / "merged") == 0
    merged, whole = (
        read_channel_ranges(one / CHANNEL_RANGES_NAME) for one in (tmp_path / "merged", tmp_path / "all/model")
    )
    assert list(merged.nodes) == list(whole.nodes)
    for name, node in whole.nodes.items():
        other = merged.nodes[name]
        assert node.partial_products == other.partial_products
        for mine, theirs in zip(other.inputs, node.inputs, strict=True):
            assert (mine.values == theirs.values).all(), name
    for device, world in (("g2", 1), ("g3", 2)):
        ranks = zip(
            *(CalibrationDir(one / device).read_world(world) for one in (tmp_path / "merged", tmp_path / "all/model")),
            strict=True,
        )
        assert all(describe(replace(one, num_samples=0)) == describe(replace(two, num_samples=0)) for one, two in ranks)
