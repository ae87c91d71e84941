"""The torch engine against an unstreamed forward of the same model, and against really sharded tensors."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gaudi_calib.checkpoints.plan import ModelPlan, plan_model
from gaudi_calib.engines.torch.linear import chain_worlds, max_signed, sum_neighbours
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.engines.torch.stream import make_batches
from gaudi_calib.errors import ModelError, RangeError, TopologyError
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.models.modules import Split
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.derive import bound_partial_product, derive_rank
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.channel_file import read_channel_ranges, write_channel_ranges
from tests.support.reference import Recording, largest, rank_heads, rank_part, record_model
from tests.support.tiny import CHECKPOINTS, MOE_CHECKPOINTS, make_tiny_model

pytestmark = pytest.mark.torch

LENGTHS = (7, 33, 50, 50, 3)


def make_prompts(vocabulary: int = 300, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


def attention_modules(plan: ModelPlan, recording: Recording) -> list[str]:
    names = [f"{layer}.{plan.layout.attention.module}" for layer in plan.layers]
    return names if plan.layout.uses_attention_interface else [f"layer{i}" for i in range(len(names))]


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, *MOE_CHECKPOINTS])
def test_streamed_and_packed_equals_whole_model(checkpoint: str, tiny_model: Callable[[str], Path]):
    """Layer by layer, with packed prompts, every channel is what the whole model sees prompt by prompt."""
    directory, prompts = tiny_model(checkpoint), make_prompts()
    channels = measure_channels(directory, prompts)
    plan, recording = plan_model(directory), record_model(directory, prompts, torch.float32)
    for name, linear in plan.linears.items():
        source = linear.modules[0] if linear.modules else _head_name(recording)
        seen = torch.cat(recording.inputs[source]).abs().amax(0).numpy()
        if linear.split is not Split.ROW:  # every rank sees all of it
            seen = seen.max(keepdims=True)
        np.testing.assert_allclose(channels.nodes[name].inputs[0].values, seen, rtol=2e-5, atol=1e-5 * seen.max())
    for index in plan.attention_layers:
        module = attention_modules(plan, recording)[index]
        sdpa = channels.nodes[plan.attention_node(index, "fused_scaled_dot_product_attention")]
        parts = [torch.cat(part, 1) for part in zip(*recording.attention[module], strict=True)]
        for measured, tensor in zip((*sdpa.inputs, sdpa.outputs[0]), parts, strict=True):
            expected = tensor.abs().amax((1, 2)).numpy()
            np.testing.assert_allclose(measured.values, expected, rtol=2e-5, atol=1e-5 * expected.max())


def _head_name(recording: Recording) -> str:
    head = recording.model.get_output_embeddings()
    return next(name for name, module in recording.model.named_modules() if module is head)


SHARDED = ["llama", "phi3", "qwen2", "gemma2", "opt", "gpt_neox", "falcon", "falcon-grouped"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("checkpoint", SHARDED)
def test_sliced_ranges_equal_ranges_of_sharded_tensors(checkpoint: str, world: int, tiny_model: Callable[[str], Path]):
    """Ranges derived for -t N are, bit for bit, those of the tensors that N ranks really hold.

    Falcon has attention of its own, which rounds elsewhere in bfloat16; it is compared in float32,
    within one unit in the last place of the bfloat16 results.
    """
    directory, prompts = tiny_model(checkpoint), make_prompts(lengths=(7, 33, 20))
    plan = plan_model(directory)
    exact = plan.layout.uses_attention_interface
    dtype, tolerance = ("bfloat16", 0) if exact else ("float32", 2**-7)
    channels = measure_channels(directory, prompts, compute_dtype=dtype, batch_size=1, worlds=(1, 2, 4), outputs=True)
    recording = record_model(directory, prompts, getattr(torch, dtype))
    for rank in range(world):
        derived = derive_rank(channels, rank, Topology(world), GAUDI3, outputs=True).nodes
        for index, layer in enumerate(plan.layers):
            pairs = [*_pair_linears(recording, plan, derived, index, layer, rank, world)]
            pairs += _pair_attention(recording, plan, derived, index, rank, world)
            for what, ours, expected in pairs:
                assert ours == pytest.approx(expected, rel=tolerance, abs=0), (index, what)


def _pair_linears(recording: Recording, plan: ModelPlan, derived, index: int, layer: str, rank: int, world: int):
    """Yield (what, derived range, range of the shard) of every linear layer."""
    for facts in plan.layout.linears:
        node = derived[plan.node_name(index, facts.name)]
        weights = [recording.model.get_submodule(f"{layer}.{part}").weight for part in facts.parts]
        inputs = recording.inputs[f"{layer}.{facts.parts[0]}"]
        if facts.split is Split.ROW:
            part = rank_part(inputs[0].shape[1], rank, world)
            yield facts.name, float(node.inputs[0][0]), largest(x[:, part] for x in inputs)
            yield facts.name, float(node.weight[0]), largest([weights[0][:, part]])
            yield facts.name, float(node.outputs[0][0]), _signed_products(inputs, weights[0], world)
        else:
            yield facts.name, float(node.inputs[0][0]), largest(inputs)
            shards = _shard_rows(plan, facts.split, facts.name, weights, rank, world)
            yield facts.name, float(node.weight[0]), largest(shards)
            products = [x @ weight.T for x in inputs for weight in weights]  # without bias, as they are multiplied
            outs = [torch.cat(products[i : i + len(weights)], 1).T for i in range(0, len(products), len(weights))]
            held = [_shard_rows(plan, facts.split, facts.name, [out], rank, world) for out in outs]
            yield facts.name, float(node.outputs[0][0]), largest(part for parts in held for part in parts)


def _signed_products(inputs: list[torch.Tensor], weight: torch.Tensor, world: int) -> float:
    """As INC records it: all-reduce with MAX over the ranks, then the magnitude."""
    parts = [rank_part(weight.shape[1], rank, world) for rank in range(world)]
    products = [torch.stack([x[:, part] @ weight[:, part].T for part in parts]) for x in inputs]
    return largest(product.amax(0) for product in products)


def _shard_rows(plan: ModelPlan, split: Split, name: str, weights: list[torch.Tensor], rank: int, world: int):
    heads, kv_heads, dim = plan.heads, plan.kv_heads, plan.head_dim
    whole = torch.cat(weights)
    if split is Split.QKV_INTERLEAVED:
        return [whole.view(heads, 3 * dim, -1)[rank_heads(heads, rank, world)]]
    if split is Split.QKV_GROUPED:
        grouped = whole.view(kv_heads, heads // kv_heads + 2, dim, -1)
        query = grouped[:, :-2].flatten(0, 1)
        keys = [grouped[:, -2], grouped[:, -1]]
    elif split is Split.QKV:
        query, *keys = (
            rows.view(-1, dim, whole.shape[1])
            for rows in whole.split([heads * dim, kv_heads * dim, kv_heads * dim])
        )  # fmt: skip
    else:
        parts = whole.chunk(2) if name.endswith("gate_up_proj") else [whole]
        return [part[rank_part(part.shape[0], rank, world)] for part in parts]
    return [query[rank_heads(heads, rank, world)], *(key[rank_heads(kv_heads, rank, world)] for key in keys)]


def _pair_attention(recording: Recording, plan: ModelPlan, derived, index: int, rank: int, world: int):
    """Yield (what, derived range, range of the rank's heads) of every attention op."""
    module = attention_modules(plan, recording)[index]
    queries, keys, values, outs = zip(*recording.attention[module], strict=True)
    mine, shared = rank_heads(plan.heads, rank, world), rank_heads(plan.kv_heads, rank, world)
    query, out = largest(x[mine] for x in queries), largest(x[mine] for x in outs)
    key, value = largest(x[shared] for x in keys), largest(x[shared] for x in values)
    scaled = largest(x[mine] * recording.scale[module] for x in queries)
    expected = {
        "fused_scaled_dot_product_attention": [query, key, value, out],
        "k_cache": [key, key],
        "v_cache": [value, value],
        "matmul_qk": [scaled, key],
        "matmul_av": [1.0, value],
        "batch2block_matmul": [1.0, scaled, scaled],
        "block2batch_matmul": [1.0, out, out],
    }
    for op, ranges in expected.items():
        node = derived[plan.attention_node(index, op)]
        measured = [float(values[0]) for values in (*node.inputs, *(node.outputs or ())[:1])]
        # What the two matmuls return is tested on its own.
        yield from ((op, *pair) for pair in zip(measured[: len(ranges)], ranges, strict=True))


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, *MOE_CHECKPOINTS])
def test_outputs_are_the_products_of_the_whole_model(checkpoint: str, tiny_model: Callable[[str], Path]):
    """Every channel of every linear layer that is not row parallel: replicated ones with their bias, others without."""
    directory, prompts = tiny_model(checkpoint), make_prompts()
    channels = measure_channels(directory, prompts, worlds=(1,), outputs=True)
    plan, recording = plan_model(directory), record_model(directory, prompts, torch.float32)
    assert channels.has_outputs
    for name, linear in plan.linears.items():
        if linear.split is Split.ROW:
            continue
        modules = linear.modules or (_head_name(recording),)
        rows = []
        for module in map(recording.model.get_submodule, modules):
            bias = getattr(module, "bias", None) if linear.split is Split.NONE else None
            inputs = torch.cat(recording.inputs[modules[0]])
            rows.append(torch.nn.functional.linear(inputs, module.weight, bias).abs().amax(0).numpy())
        seen, order = np.concatenate(rows), plan.canonical_rows(linear)
        seen = np.pad(seen if order is None else seen[order], (0, linear.padding))
        np.testing.assert_allclose(channels.nodes[name].outputs[0].values, seen, rtol=2e-5, atol=1e-5 * seen.max())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("checkpoint", ["llama", "gpt_oss", "deepseek_v3"])
def test_matmul_outputs_are_those_of_decode_block_by_block(
    checkpoint: str, world: int, tiny_model: Callable[[str], Path]
):
    """Scores as multiplied, and sums over the 128 keys of one cache block before they are normalised."""
    directory, prompts = tiny_model(checkpoint), make_prompts(lengths=(7, 150))
    channels = measure_channels(directory, prompts, worlds=(1, 2), outputs=True)
    plan, recording = plan_model(directory), record_model(directory, prompts, torch.float32)
    for index in plan.attention_layers:
        module = recording.model.get_submodule(attention_modules(plan, recording)[index])
        scores, sums = decode_by_block(recording, module, plan)
        for rank in range(world):
            nodes = derive_rank(channels, rank, Topology(world), GAUDI3, outputs=True).nodes
            mine = rank_heads(plan.heads, rank, world)
            for op, expected in (("matmul_qk", scores), ("matmul_av", sums)):
                (output,) = nodes[plan.attention_node(index, op)].outputs
                assert float(output[0]) == pytest.approx(float(expected[mine].max()), rel=2**-7), (index, op)


def decode_by_block(recording: Recording, module: torch.nn.Module, plan: ModelPlan) -> tuple[torch.Tensor, ...]:
    """Return the largest score, and the largest sum over a block's values, of each head: as vllm-gaudi decodes."""
    window, sinks = getattr(module, "sliding_window", None), getattr(module, "sinks", None)
    best = [torch.zeros(plan.heads), torch.zeros(plan.heads)]
    latents = iter(recording.inputs.get(f"{module.recorded_as}.kv_b_proj", []))
    for query, key, value, _ in recording.attention[module.recorded_as]:
        if plan.layout.attention.latent:
            value = next(latents)[None]
        key, value = (x.repeat_interleave(plan.heads // x.shape[0], 0) for x in (key, value))
        for position in range(query.shape[1]):
            scores = (key @ query[:, position, :, None]).squeeze(-1) * recording.scale[module.recorded_as]
            visible = torch.arange(key.shape[1]) <= position
            if window:
                visible &= torch.arange(key.shape[1]) > position - window
            best[0] = torch.maximum(best[0], scores[:, visible].abs().amax(1))
            for start in range(0, position + 1, 128):
                block = torch.arange(start, min(start + 128, key.shape[1]))[visible[start : start + 128]]
                if not len(block):
                    continue
                highest = scores[:, block].amax(1, keepdim=True)
                highest = highest if sinks is None else torch.maximum(highest, sinks[:, None])
                weights = (scores[:, block] - highest).exp()
                total = torch.einsum("hk,hkd->hd", weights, value[:, block])
                best[1] = torch.maximum(best[1], total.abs().amax(1))
    return best[0], best[1]


@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=["g2", "g3"])
def test_block_matmuls_carry_softmax_sums_on_gaudi_2_only(device, tiny_model: Callable[[str], Path]):
    """On Gaudi 2 the softmax denominators pass through the block matmuls, too."""
    channels = measure_channels(tiny_model("llama"), make_prompts())
    nodes = derive_rank(channels, 0, Topology(1), device).nodes
    name = "model.layers.0.self_attn.attn.impl.batch2block_matmul"
    sums = channels.nodes[name].softmax_sums.values
    assert 1 < sums.max() <= max(LENGTHS)
    scaled = nodes["model.layers.0.self_attn.attn.impl.matmul_qk"].inputs[0][0]
    expected = max(round_to_bf16(sums).max(), scaled) if device is GAUDI2 else scaled
    assert nodes[name].outputs[0][0] == nodes[name].inputs[1][0] == expected
    assert round_to_bf16(sums).max() > scaled


def test_unmeasured_world_is_bounded_from_above(tiny_model: Callable[[str], Path]):
    """Where partial products were not measured, the stand-in is never smaller than the truth."""
    directory, prompts = tiny_model("llama"), make_prompts()
    measured = measure_channels(directory, prompts, worlds=(1, 2, 4, 8))
    for node in measured.nodes.values():
        if node.op is Op.ROW_PARALLEL_LINEAR:
            for world in (1, 2, 4, 8):
                assert node.partial_products[world][0] <= bound_partial_product(node, world)
    fewer = measure_channels(directory, prompts, worlds=(1, 2))
    assert [fewer.is_measured(Topology(world)) for world in (1, 2, 4)] == [True, True, False]


def test_sharded_checkpoint_equals_single_file(tmp_path: Path):
    """A checkpoint in two shards with an index gives the ranges of the same one in one file."""
    single, sharded = (make_tiny_model("llama", tmp_path / str(shards), shards=shards) for shards in (1, 2))
    first, second = (measure_channels(directory, make_prompts()) for directory in (single, sharded))
    _assert_same(first, second)


def test_channel_file_keeps_everything(tmp_path: Path, tiny_model: Callable[[str], Path]):
    """What is read from channel_ranges.safetensors is what was written."""
    channels = measure_channels(tiny_model("falcon-grouped"), make_prompts())
    write_channel_ranges(tmp_path / "channel_ranges.safetensors", channels)
    read = read_channel_ranges(tmp_path / "channel_ranges.safetensors")
    _assert_same(channels, read)
    assert read.modules == channels.modules and list(read.nodes) == list(channels.nodes)
    assert all(read.is_measured(Topology(world)) for world in (1, 2, 4, 8))


def test_a_channel_file_holds_outputs_where_they_were_measured(tmp_path: Path, tiny_model: Callable[[str], Path]):
    """With them ranks follow with and without; without them nothing differs, and asking for them is an error."""
    with_outputs, without = (measure_channels(tiny_model("llama"), [[1, 2, 3]], outputs=on) for on in (True, False))
    for name, channels in (("with", with_outputs), ("without", without)):
        write_channel_ranges(tmp_path / name, channels)
    _assert_same(with_outputs, read_channel_ranges(tmp_path / "with"), outputs=True)
    _assert_same(with_outputs, without)
    with safe_open(tmp_path / "without", framework="numpy") as file:
        column_parallel = [key for key in file.keys() if "qkv_proj|" in key or "matmul_qk|" in key]
    assert not any("outputs" in key for key in column_parallel)
    with pytest.raises(RangeError, match="were not measured"):
        derive_rank(read_channel_ranges(tmp_path / "without"), 0, Topology(1), GAUDI3, outputs=True)


def _assert_same(first: ChannelRanges, second: ChannelRanges, *, outputs: bool = False):
    for world in (1, 4):
        ours, theirs = (
            derive_rank(channels, world - 1, Topology(world), GAUDI2, outputs=outputs).nodes
            for channels in (first, second)
        )
        assert list(ours) == list(theirs)
        for name, node in ours.items():
            assert repr(node) == repr(theirs[name]), name


def test_float32_weights_are_rounded_to_the_served_dtype(tmp_path: Path):
    """A checkpoint stored in float32 but served in bfloat16 is measured with bfloat16 weights."""
    from safetensors.torch import load_file, save_file

    directory = make_tiny_model("llama", tmp_path / "model")
    tensors = {name: tensor.float() + 1e-4 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    weights = {
        dtype: measure_channels(directory, make_prompts(), dtype=dtype).nodes[name].weight.values
        for dtype in ("bfloat16", "float32")
    }
    assert np.array_equal(weights["bfloat16"], round_to_bf16(weights["float32"]))
    assert not np.array_equal(weights["bfloat16"], weights["float32"])


def test_a_sample_that_overflows_is_named(tmp_path: Path):
    """NaN in an activation is an error with node and sample, not a range."""
    from safetensors.torch import load_file, save_file

    directory = make_tiny_model("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][123] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    prompts = [[1, 2, 3], [4, 123, 5], [6, 7]]
    with pytest.raises(RangeError, match=r"model\.layers\.0\.self_attn\.qkv_proj saw NaN") as error:
        measure_channels(directory, prompts)
    assert "sample 1 of" in error.value.where


def test_an_overflow_behind_the_last_layer_is_found(tmp_path: Path):
    """Infinity that only the last norm makes is an error, too."""
    from safetensors.torch import load_file, save_file

    directory = make_tiny_model("llama", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(RangeError, match="the output projection saw NaN or infinity"):
        measure_channels(directory, [[1, 2, 3]])


def test_world_that_does_not_divide_is_refused(tiny_model: Callable[[str], Path]):
    """-t 3 of a model with 8 heads fails before anything is measured."""
    with pytest.raises(TopologyError, match="does not divide over 3 ranks") as error:
        measure_channels(tiny_model("llama"), [[1, 2]], required=[Topology(3)])
    assert "8 attention heads, 4 KV heads" in error.value.why


@pytest.mark.parametrize(
    ("break_checkpoint", "message"),
    [
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "no safetensors"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 100), "cannot read model.safetensors"),
        (lambda path: _edit(path / "config.json", '"llama"', '"lama"'), "unknown model family: model_type 'lama'"),
        (lambda path: _edit(path / "config.json", '"mlp_bias": false', '"mlp_bias": true'), "no tensor"),
        (lambda path: _edit(path / "config.json", '"num_key_value_heads": 4', '"num_key_value_heads": 2'), "rows"),
    ],
    ids=["only .bin", "no config", "damaged", "unknown family", "missing tensor", "wrong heads"],
)
def test_unusable_checkpoints_are_refused(tmp_path: Path, break_checkpoint, message: str):
    """Each way a checkpoint can be wrong has an error that says so, and a fix."""
    directory = make_tiny_model("llama", tmp_path / "model")
    break_checkpoint(directory)
    with pytest.raises(ModelError, match=message) as error:
        measure_channels(directory, [[1, 2, 3]])
    assert error.value.fix


def _edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_batches_bound_sequences_and_tokens():
    """A batch holds at most `batch_size` prompts and `max_tokens` tokens, or one longer prompt."""
    prompts = [[0] * length for length in (500, 500, 100, 3000, 1, 1, 1)]
    batches = make_batches(prompts, batch_size=2, max_tokens=1024)
    assert [batch.bounds for batch in batches] == [[0, 500, 1000], [0, 100], [0, 3000], [0, 1, 2], [0, 1]]
    assert batches[0].positions[0, [0, 499, 500]].tolist() == [0, 499, 0]


def test_signed_maximum_sees_values_negative_on_every_rank():
    """The magnitude of an element that is negative on all ranks counts, as after an all-reduce with MAX."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        parts = torch.randn(4, 3, 5, generator=generator) - 2.0
        assert max_signed(parts, 0.0) == pytest.approx(float(parts.amax(0).abs().max()))
        assert max_signed(parts, 9.0) == 9.0
    assert chain_worlds([1, 2, 3, 4, 6, 8]) == [[8, 4, 2], [6, 3]]


@pytest.mark.parametrize("chain", [[8, 4, 2], [6, 3], [12, 4, 2], [5]], ids=str)
def test_partial_products_sum_to_those_of_coarser_worlds(chain: list[int]):
    """Summing neighbours in place gives, at every world of a chain, the sums of consecutive ranks."""
    parts = torch.arange(1.0, chain[0] + 1).view(-1, 1, 1).expand(-1, 2, 3).clone()
    whole = parts.clone()
    for world in [*chain, 1]:
        parts = sum_neighbours(parts, world)
        assert torch.equal(parts, whole.unflatten(0, (world, -1)).sum(1))
