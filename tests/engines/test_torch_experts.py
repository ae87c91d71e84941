"""Experts and latent attention in the torch engine: whole models, every rank of every topology, streaming."""

import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gaudi_calib.engines.torch import experts as engine
from gaudi_calib.engines.torch import measure as measuring
from gaudi_calib.engines.torch.experts import ColdPolicy
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.errors import TopologyError
from gaudi_calib.fp8 import GAUDI2, GAUDI3, Device
from gaudi_calib.ranges.channels import ChannelRanges, ExpertChannels
from gaudi_calib.ranges.derive import derive_rank
from gaudi_calib.ranges.node import Node
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.channel_file import read_channel_ranges, write_channel_ranges
from tests.support.reference_ranks import Seen, WholeModel, record_whole_model
from tests.support.tiny import MOE_CHECKPOINTS

pytestmark = pytest.mark.torch

TOPOLOGIES = [Topology(1), *(Topology(world, split) for world in (2, 4, 8) for split in (False, True))]
# The distance of neighbouring bfloat16 values, relative to them, is at most this.
BF16_STEP = 2**-7
# transformers rounds gpt_oss' experts before and after it adds their biases, the engine once.
EXACT = [name for name in MOE_CHECKPOINTS if name != "gpt_oss"]

random = np.random.default_rng(0)
PROMPTS = [random.integers(0, 300, length).tolist() for length in (7, 33, 50, 90)]

Measure = Callable[..., ChannelRanges]
Slice = Callable[[str, str, int, Topology, Device], dict[str, Seen]]


@pytest.fixture(scope="module")
def measured(tiny_model: Callable[[str], Path]) -> Measure:
    """Return the channel ranges of a checkpoint in a compute dtype and for some worlds, measured once."""

    @cache
    def measure(checkpoint: str, dtype: str = "float32", worlds: tuple[int, ...] = (1, 2, 4, 8)) -> ChannelRanges:
        size = 32 if dtype == "float32" else 1  # in bfloat16 results depend on what a sequence is packed with
        directory = tiny_model(checkpoint)
        return measure_channels(directory, PROMPTS, compute_dtype=dtype, batch_size=size, worlds=worlds)

    return measure


@pytest.fixture(scope="module")
def whole(tiny_model: Callable[[str], Path]) -> Callable[..., WholeModel]:
    """Return what the whole Hugging Face model sees, run once per dtype."""
    return cache(
        lambda checkpoint, dtype="float32": record_whole_model(tiny_model(checkpoint), PROMPTS, getattr(torch, dtype))
    )


@pytest.fixture(scope="module")
def sliced(whole: Callable[..., WholeModel]) -> Slice:
    """Return the ranges of the tensors that a rank really holds, computed once."""
    return cache(
        lambda checkpoint, dtype, rank, topology, device: whole(checkpoint, dtype).slice_rank(rank, topology, device)
    )


def describe(node: Node) -> Seen:
    """Return a derived node as the reference has it."""
    weight = None if node.weight is None else float(node.weight[0])
    outputs = None if node.outputs is None else [float(values[0]) for values in node.outputs]
    return Seen([float(values[0]) for values in node.inputs], outputs, weight)


def divides(checkpoint: str, topology: Topology) -> bool:
    """The tiny models have 8 experts, mixtral 4."""
    return checkpoint != "mixtral" or topology != Topology(8, expert_parallel=True)


@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_channels_of_experts_are_those_of_the_whole_model(
    checkpoint: str, measured: Measure, whole: Callable[..., WholeModel]
):
    """Every channel of every expert, its weights, its tokens, and the op's input and output at one rank."""
    records, channels = whole(checkpoint).experts, measured(checkpoint)
    assert records.keys() == {name for name, node in channels.nodes.items() if node.experts}
    for name, record in records.items():
        node = channels.nodes[name]
        intermediate = np.zeros(node.experts.intermediate.shape, np.float32)
        for expert in range(len(record.gate)):
            for scaled in (False, True):
                seen = record.compute_intermediate(expert, scaled=scaled).abs().numpy()
                intermediate[expert] = np.maximum(intermediate[expert], seen.max(0, initial=0))
        assert_near(node.experts.intermediate, intermediate)
        gate_up = torch.maximum(record.gate.abs().amax(2), record.up.abs().amax(2))
        np.testing.assert_array_equal(node.experts.gate_up, gate_up.numpy())
        np.testing.assert_array_equal(node.experts.down, record.down.abs().amax(1).numpy())
        assert node.experts.tokens.tolist() == [record.count_tokens(expert) for expert in range(len(record.gate))]
        assert not node.experts.filled.any()
        weights = record.weights / record.output_scale
        output = record.compute_output(record.tensor_share(0, 1), weights, scaled=False)
        assert_near(node.inputs[0].values, record.hidden.abs().max().numpy())
        assert_near(node.experts.outputs["tp1"], output.abs().max().numpy())
        assert_near(np.array(node.experts.routing), weights.sum(-1).max().numpy())
        assert node.experts.bias == (float(record.biases[2].abs().max()) if record.biases else 0.0)


def assert_near(ours: np.ndarray, expected: np.ndarray):
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5 * expected.max())


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: topology.key)
@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_a_rank_sees_the_ranges_of_the_tensors_it_holds(
    checkpoint: str, topology: Topology, measured: Measure, sliced: Slice
):
    """Every node of every rank, on both devices, is within a bfloat16 step of the really sliced tensors."""
    channels = measured(checkpoint)
    if not divides(checkpoint, topology):
        with pytest.raises(TopologyError, match="4 experts do not divide over 8 ranks"):
            derive_rank(channels, 0, topology, GAUDI2)
        return
    assert channels.is_measured(topology)
    for rank in range(topology.world):
        for device in (GAUDI2, GAUDI3):
            nodes = derive_rank(channels, rank, topology, device).nodes
            compare_nodes(nodes, sliced(checkpoint, "float32", rank, topology, device), BF16_STEP)


@pytest.mark.parametrize("topology", TOPOLOGIES[:5], ids=lambda topology: topology.key)
@pytest.mark.parametrize("checkpoint", EXACT)
def test_computed_in_bfloat16_a_rank_sees_exactly_what_it_holds(
    checkpoint: str, topology: Topology, measured: Measure, sliced: Slice
):
    """Bit for bit, on Gaudi 3 (transformers rounds the probabilities that Gaudi 2's denominators follow from)."""
    channels = measured(checkpoint, "bfloat16", (1, 2, 4))
    for rank in range(topology.world):
        nodes = derive_rank(channels, rank, topology, GAUDI3).nodes
        compare_nodes(nodes, sliced(checkpoint, "bfloat16", rank, topology, GAUDI3), 0.0)


def compare_nodes(nodes: Mapping[str, Node], expected: Mapping[str, Seen], tolerance: float):
    """Assert equal names, slots and values."""
    assert nodes.keys() == expected.keys()
    for name, node in nodes.items():
        ours, theirs = describe(node), expected[name]
        for slot in ("inputs", "outputs", "weight"):
            found, other = getattr(ours, slot), getattr(theirs, slot)
            assert found == (other if other is None else pytest.approx(other, rel=tolerance, abs=0)), (name, slot)


@pytest.mark.parametrize("topology", TOPOLOGIES[:5], ids=lambda topology: topology.key)
@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_a_rank_lists_its_own_experts_only(checkpoint: str, topology: Topology, measured: Measure):
    """Numbered from 0; other modules are the same on all ranks, and ranges come in module order."""
    channels = measured(checkpoint)
    count = next(node.experts.count for node in channels.nodes.values() if node.experts)
    local = count // topology.world if topology.expert_parallel else count
    for rank in range(topology.world):
        derived = derive_rank(channels, rank, topology, GAUDI2)
        listed = [name for name in derived.modules if "_list." in name]
        ops = [name for name, node in channels.nodes.items() if node.experts]
        assert listed == [f"{op}.{part}.{i}" for op in ops for part in ("w13_list", "w2_list") for i in range(local)]
        others = [name for name in channels.modules if "_list." not in name]
        assert [name for name in derived.modules if name not in listed] == others
        never_run = [name for name in derived.modules if name not in derived.nodes]
        assert all(
            name.endswith(".softmax") or ".mamba." in name or ("mla_attn.mla_attn." in name and ".impl." not in name)
            for name in never_run
        )
        assert set(derived.nodes) == set(derived.modules) - set(never_run)


@pytest.mark.parametrize("topology", TOPOLOGIES[1:5], ids=lambda topology: topology.key)
@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_a_world_that_was_not_measured_is_bounded_from_above(
    checkpoint: str, topology: Topology, measured: Measure, sliced: Slice
):
    """Measured for one rank only, sums of ranks are finite and never smaller than the truth."""
    channels = measured(checkpoint, "float32", (1,))
    assert channels.is_measured(Topology(1)) and not channels.is_measured(topology)
    for rank in range(topology.world):
        nodes = derive_rank(channels, rank, topology, GAUDI2).nodes
        for name, expected in sliced(checkpoint, "float32", rank, topology, GAUDI2).items():
            ours, theirs = np.array(describe(nodes[name]).outputs or 0), np.array(expected.outputs or 0)
            assert np.isfinite(ours).all()
            assert (ours >= theirs * (1 - BF16_STEP / 2)).all(), name


@pytest.mark.parametrize("worlds", [(1,), (1, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_ranks_derived_from_the_file_are_the_same(
    checkpoint: str, worlds: tuple[int, ...], tmp_path: Path, measured: Measure
):
    """channel_ranges.safetensors keeps experts in bfloat16, and yet every rank is the same to the bit."""
    channels = measured(checkpoint, "float32", worlds)
    write_channel_ranges(tmp_path / "channel_ranges.safetensors", channels)
    read = read_channel_ranges(tmp_path / "channel_ranges.safetensors")
    for topology in [topology for topology in TOPOLOGIES if divides(checkpoint, topology)]:
        assert read.is_measured(topology) == channels.is_measured(topology) == (topology.world in worlds)
        device = GAUDI3 if topology.expert_parallel else GAUDI2
        ours, theirs = (derive_rank(measured, topology.world - 1, topology, device) for measured in (channels, read))
        assert ours.modules == theirs.modules
        compare_nodes(ours.nodes, {name: describe(node) for name, node in theirs.nodes.items()}, 0.0)


@pytest.fixture(scope="module")
def uncut(tiny_model: Callable[[str], Path]) -> Callable[[str], ChannelRanges]:
    """Return ranges of one batch with all experts in memory; cold ones get some of 50 tokens."""

    @cache
    def measure(checkpoint: str) -> ChannelRanges:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_SPARE_TOKENS", 50)
            return measure_channels(tiny_model(checkpoint), PROMPTS, cold=ColdPolicy(min_tokens=12, fill=True))

    return measure


CHANGES: dict[str, tuple[Any, dict[str, int], int]] = {
    "no cache": (engine, {"_CACHE_BYTES": 0}, 32),
    "cache for some experts": (engine, {"_CACHE_BYTES": 300_000}, 32),
    "one prompt at a time": (engine, {}, 1),
    "batches of 60 tokens": (measuring, {"_MAX_EXPERT_TOKENS": 60, "_MAX_TOKENS": 60}, 32),
    "few sums at once": (measuring, {"_MAX_EXPERT_SUMS": 128 * 17 * 60, "_MAX_TOKENS": 60}, 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("checkpoint", ["mixtral", "deepseek_v3-cold", "llama4_text", "gpt_oss", "granitemoehybrid"])
def test_ranges_do_not_depend_on_how_the_work_is_cut(
    checkpoint: str,
    change: str,
    uncut: Callable[[str], ChannelRanges],
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
):
    """Neither the cache of experts nor the batches change a range, that of a filled expert included."""
    directory, cold = tiny_model(checkpoint), ColdPolicy(min_tokens=12, fill=True)
    expected = uncut(checkpoint)
    monkeypatch.setattr(engine, "_SPARE_TOKENS", 50)
    module, constants, batch_size = CHANGES[change]
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    ours = measure_channels(directory, PROMPTS, cold=cold, batch_size=batch_size)
    assert ours.modules == expected.modules
    for topology in (Topology(4), Topology(4, expert_parallel=True)):
        nodes, others = (derive_rank(channels, 1, topology, GAUDI2).nodes for channels in (ours, expected))
        compare_nodes(nodes, {name: describe(node) for name, node in others.items()}, BF16_STEP)
    for name, node in ours.nodes.items():
        if node.experts:
            before = expected.nodes[name].experts
            assert_near(node.experts.intermediate, before.intermediate)
            assert node.experts.tokens.tolist() == before.tokens.tolist()
            assert node.experts.filled.tolist() == before.filled.tolist()


@pytest.mark.parametrize("held", [0, 3, 8])
def test_no_more_experts_are_in_memory_than_the_cache_holds(
    held: int, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """Beside them one that runs and one that is read; those in the cache are read once."""
    size_bytes = 3 * 64 * 128 * 4
    alive: list[weakref.ref[Any]] = []
    reads: list[tuple[str, int]] = []
    most = 0
    read = engine.ObservedExperts._read

    def count(self: engine.ObservedExperts, expert: int) -> Any:
        nonlocal most
        loaded = read(self, expert)
        alive[:] = [expert for expert in alive if expert() is not None] + [weakref.ref(loaded)]
        assert loaded.size_bytes == size_bytes
        reads.append((self.weights.node, expert))
        most = max(most, len(alive))
        return loaded

    monkeypatch.setattr(engine.ObservedExperts, "_read", count)
    monkeypatch.setattr(engine, "_CACHE_BYTES", held * size_bytes)
    measure_channels(tiny_model("qwen3_moe"), [PROMPTS[3]] * 3, batch_size=1)
    layers, experts = 2, 8
    assert len(set(reads)) == layers * experts
    assert most == held if held == experts else held < most <= held + 2, most
    assert sum(reads.count(read) == 1 for read in set(reads)) >= layers * held
    assert max(reads.count(read) for read in set(reads)) == (1 if held == experts else 3)


def test_sinks_that_dominate_leave_keys_less_than_one(tmp_path: Path, tiny_model: Callable[[str], Path]):
    """Where a sink always is the largest term, what multiplies the values in decode stays below 1."""
    shutil.copytree(tiny_model("gpt_oss"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("sinks")]:
        tensors[name] += 20.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    nodes = derive_rank(measure_channels(tmp_path, PROMPTS[:2]), 0, Topology(4), GAUDI2).nodes
    expected = record_whole_model(tmp_path, PROMPTS[:2], torch.float32).slice_rank(0, Topology(4), GAUDI2)
    compare_nodes(nodes, expected, BF16_STEP)
    assert min(seen.inputs[0] for name, seen in expected.items() if name.endswith("matmul_av")) < 1


@pytest.mark.parametrize("topology", [Topology(1), Topology(2), Topology(2, expert_parallel=True)], ids=str)
def test_a_bound_counts_routing_and_bias(topology: Topology):
    """No token gets more than all routing weights times the largest output of one expert, its bias included."""
    intermediate = np.array([[1.0, 2.0], [3.0, 0.5]], np.float32)
    tokens = np.ones(2, np.int64)
    experts = ExpertChannels(intermediate, intermediate, intermediate, tokens, 0 * tokens, routing=2.5, bias=4.0)
    truth = {"tp1": [9.25], "tp2": [9.0, 4.0], "ep2": [5.0, 9.25]}[topology.key]
    for rank, largest in enumerate(truth):
        assert experts.output(rank, topology) == pytest.approx(2.5 * (largest + 4.0), rel=0.01)
        assert experts.output(rank, topology) >= 2.5 * (largest + 4.0)
