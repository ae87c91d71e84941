"""Models with experts that cannot be measured: the error names the tensor, the expert or the sample."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gaudi_calib.engines.torch.experts import ColdPolicy
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.errors import ModelError, RangeError, TopologyError
from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.ranges.derive import derive_rank
from gaudi_calib.ranges.topology import Topology
from tests.support.reference_moe import record_moe_model
from tests.support.tiny import MOE_CHECKPOINTS, make_tiny_model

pytestmark = pytest.mark.torch

PROMPTS = [[5, 17, 250, 3], list(range(40)), [9, 123, 44]]
MOE = "model.layers.1.mlp"
Tensors = dict[str, torch.Tensor]
ModelDir = Callable[[str, Callable[[Tensors], object]], Path]


@pytest.fixture
def changed(tmp_path: Path, tiny_model: Callable[[str], Path]) -> ModelDir:
    """Return a copy of a checkpoint with its tensors edited by a function."""

    def copy(checkpoint: str, edit: Callable[[Tensors], object]) -> Path:
        source = tiny_model(checkpoint)
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return copy


@pytest.mark.parametrize(
    ("checkpoint", "tensor"),
    [
        ("qwen3_moe", f"{MOE}.experts.0.gate_proj.weight"),
        ("qwen3_moe", f"{MOE}.experts.5.up_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("deepseek_v3", f"{MOE}.experts.7.down_proj.weight"),
        ("deepseek_v3", f"{MOE}.gate.e_score_correction_bias"),
        ("deepseek_v3", f"{MOE}.shared_experts.down_proj.weight"),
        ("llama4_text", "model.layers.1.feed_forward.experts.down_proj"),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight"),
        ("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight"),
        ("gpt_oss", f"{MOE}.experts.gate_up_proj"),
        ("gpt_oss", f"{MOE}.experts.gate_up_proj_bias"),
        ("gpt_oss", f"{MOE}.experts.down_proj_bias"),
        ("gpt_oss", "model.layers.1.self_attn.sinks"),
    ],
)
def test_a_missing_tensor_is_named(checkpoint: str, tensor: str, changed: ModelDir):
    """Whichever part of the experts it is: no dense layer is assumed, no bias, no zeros."""
    directory = changed(checkpoint, lambda tensors: tensors.pop(tensor))
    with pytest.raises(ModelError, match="the checkpoint has no tensor") as error:
        measure_channels(directory, PROMPTS)
    name = tensor.replace("block_sparse_moe.gate", "mlp.gate")  # as transformers calls mixtral's router
    assert tensor in error.value.what or name in error.value.what
    assert error.value.fix and str(directory) in str(error.value.where)


@pytest.mark.parametrize(("claimed", "message"), [(16, "no tensor|is of 8 experts"), (4, "is of 8 experts")])
@pytest.mark.parametrize("checkpoint", ["qwen3_moe", "deepseek_v3", "llama4_text", "gpt_oss", "granitemoe"])
def test_a_number_of_experts_that_is_not_the_checkpoints_is_refused(
    checkpoint: str, claimed: int, message: str, changed: ModelDir
):
    """config.json claims more or fewer experts than there are."""
    directory = changed(checkpoint, lambda tensors: None)
    config = json.loads((directory / "config.json").read_text())
    keys = [key for key in ("n_routed_experts", "num_local_experts", "num_experts") if key in config]
    (directory / "config.json").write_text(json.dumps({**config, **dict.fromkeys(keys, claimed)}))
    with pytest.raises(ModelError, match=message) as error:
        measure_channels(directory, PROMPTS)
    assert f"calls for {claimed}" in error.value.why


@pytest.mark.parametrize(
    ("topology", "shares"),
    [(Topology(3), "channels of every expert"), (Topology(3, expert_parallel=True), "whole experts")],
    ids=["tp3", "ep3"],
)
def test_experts_that_do_not_divide_are_refused(topology: Topology, shares: str, tmp_path: Path):
    """Where all else divides over 3 ranks, the experts are to blame, before anything is measured."""
    directory = make_tiny_model(
        "mixtral", tmp_path, hidden_size=96, num_attention_heads=6, num_key_value_heads=3, intermediate_size=64,
        vocab_size=384,
    )  # fmt: skip
    with pytest.raises(TopologyError, match="the experts do not divide over 3 ranks") as error:
        measure_channels(directory, PROMPTS, required=[topology])
    assert "4 experts of 64 intermediate channels" in error.value.why and shares in error.value.why
    channels = measure_channels(directory, PROMPTS)
    with pytest.raises(TopologyError, match=r"moe_op: (4 experts|64 intermediate channels .*) do not divide over 3"):
        derive_rank(channels, 0, topology, GAUDI2)


@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_heads_that_do_not_divide_are_refused(checkpoint: str, tiny_model: Callable[[str], Path]):
    """-t 3 of 8 heads, with and without expert parallelism."""
    for topology in (Topology(3), Topology(3, expert_parallel=True)):
        with pytest.raises(TopologyError, match="the model does not divide over 3 ranks"):
            measure_channels(tiny_model(checkpoint), PROMPTS, required=[topology])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("checkpoint", "expert", "part", "node"),
    [
        ("qwen3_moe", 2, "gate_proj", "w13_list.2"),
        ("qwen3_moe", 2, "down_proj", "w2_list.2"),
        ("deepseek_v3-cold", 4, "up_proj", "w13_list.4"),
        ("deepseek_v3-cold", 4, "down_proj", "w2_list.4"),
    ],
)
def test_a_damaged_weight_names_the_expert(
    checkpoint: str, expert: int, part: str, node: str, value: float, changed: ModelDir
):
    """Also that of an expert no token reaches, which nothing else would notice."""
    name = f"{MOE}.experts.{expert}.{part}.weight"
    directory = changed(checkpoint, lambda tensors: tensors[name][3, 5].fill_(value))
    with pytest.raises(RangeError) as error:
        measure_channels(directory, PROMPTS)
    assert error.value.what == f"{MOE}.experts.routed_experts.moe_op.{node} has NaN or infinity in its weight"


def test_a_damaged_output_projection_is_found(changed: ModelDir):
    """Nothing is computed with its weight, so that only its range can tell."""
    directory = changed("qwen3_moe", lambda tensors: tensors["lm_head.weight"][3, 5].fill_(float("nan")))
    with pytest.raises(RangeError, match="lm_head has NaN or infinity in its weight"):
        measure_channels(directory, PROMPTS)


def test_an_expert_that_overflows_is_named(changed: ModelDir):
    """Finite weights, but act(gate) * up is beyond float32; behind the last layer, too."""

    def enlarge(tensors: Tensors) -> None:
        for part in ("gate_proj", "up_proj"):
            tensors[f"{MOE}.experts.2.{part}.weight"] *= 1e25

    with pytest.raises(RangeError, match=r"moe_op\.w2_list\.2 saw NaN or infinity in its input") as error:
        measure_channels(changed("qwen3_moe", enlarge), PROMPTS)
    assert "sample" in error.value.where


@pytest.mark.parametrize("checkpoint", ["qwen3_moe", "deepseek_v3", "granitemoehybrid"])
def test_a_sample_that_overflows_is_named(checkpoint: str, changed: ModelDir):
    """Token 123, in the third prompt only, has an infinite embedding."""
    directory = changed(checkpoint, lambda tensors: tensors["model.embed_tokens.weight"][123].fill_(float("inf")))
    prompts = [[token for token in prompt if token != 123] for prompt in PROMPTS[:2]] + [PROMPTS[2]]
    with pytest.raises(RangeError, match="NaN or infinity") as error:
        measure_channels(directory, prompts)
    assert "sample 2 of" in error.value.where


def test_layer_types_that_config_json_leaves_out_are_known(changed: ModelDir):
    """transformers derives which layers attend in chunks; older checkpoints do not say it."""
    directory = changed("llama4_text", lambda tensors: None)
    prompts = [list(range(60))]
    expected = measure_channels(directory, prompts)
    config = json.loads((directory / "config.json").read_text())
    del config["layer_types"]
    (directory / "config.json").write_text(json.dumps(config))
    ours = measure_channels(directory, prompts)
    assert list(ours.nodes) == list(expected.nodes)
    for name, node in expected.nodes.items():
        assert np.array_equal(ours.nodes[name].inputs[0].values, node.inputs[0].values), name


def test_correction_biases_keep_their_precision(changed: ModelDir):
    """Computed in bfloat16, a router's float32 bias is not rounded: transformers chooses the same experts."""
    generator = torch.Generator().manual_seed(0)

    def sharpen(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            tensors[name] = 1 + 0.01 * torch.randn(8, generator=generator)

    directory = changed("deepseek_v3", sharpen)
    channels = measure_channels(directory, PROMPTS, compute_dtype="bfloat16", batch_size=1)
    records = record_moe_model(directory, PROMPTS, torch.bfloat16).experts
    assert len(records) == 2
    for name, record in records.items():
        tokens = channels.nodes[f"{name}.routed_experts.moe_op"].experts.tokens
        assert tokens.tolist() == [record.count_tokens(expert) for expert in range(8)]


@pytest.mark.parametrize("min_tokens", [1, 5])
def test_a_cold_expert_is_filled_with_real_tokens(min_tokens: int, tiny_model: Callable[[str], Path]):
    """Those the router likes best for it; what they give is what the expert computes of them."""
    directory = tiny_model("deepseek_v3-cold")
    channels = measure_channels(directory, PROMPTS, cold=ColdPolicy(min_tokens, fill=True))
    left = measure_channels(directory, PROMPTS, cold=ColdPolicy(min_tokens))
    model = record_moe_model(directory, PROMPTS, torch.float32)
    for name, record in model.experts.items():
        experts, before = (measured.nodes[f"{name}.routed_experts.moe_op"].experts for measured in (channels, left))
        router = model.model.get_submodule(name.replace("experts", "gate")).weight
        for expert in range(8):
            missing = max(0, min_tokens - record.count_tokens(expert))
            assert experts.filled[expert] == missing and before.filled[expert] == 0
            chosen = (record.hidden @ router[expert]).topk(missing).indices
            gate, up = (record.hidden[chosen] @ weight[expert].T for weight in (record.gate, record.up))
            filled = record.activate(gate, up).abs().amax(0).numpy() if missing else 0
            expected = np.maximum(before.intermediate[expert], filled)
            np.testing.assert_allclose(experts.intermediate[expert], expected, rtol=1e-4, atol=1e-5)
        assert np.array_equal(experts.tokens, before.tokens) and before.tokens[4] == 0
        assert (experts.intermediate.max(1) > 0).all() and before.intermediate[4].max() == 0
