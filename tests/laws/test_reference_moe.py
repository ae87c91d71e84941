"""The hand-written experts and latent attention are those of transformers, and of a run of vllm-gaudi."""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import paths
from tests.support.reference_moe import ExpertsRecord, LatentRecord, MoeRecording, record_moe_model
from tests.support.tiny import COLD_EXPERTS, MOE_CHECKPOINTS

pytestmark = pytest.mark.torch

LATENT = [name for name in MOE_CHECKPOINTS if name.startswith("deepseek")]
LENGTHS = (7, 33, 50, 90)
GOLDEN = paths.GOLDEN / "deepseek-v3-fp8-tiny"
BLOCK = 128


@pytest.fixture(scope="module")
def recorded(tiny_model: Callable[[str], Path]) -> Callable[[str], MoeRecording]:
    """Return the recording of a checkpoint, made once."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 300, length).tolist() for length in LENGTHS]
    return cache(lambda checkpoint: record_moe_model(tiny_model(checkpoint), prompts, torch.float32))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("split", ["tensor_share", "expert_share"])
@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_outputs_of_all_ranks_add_up(checkpoint: str, split: str, world: int, recorded: Callable[[str], MoeRecording]):
    """The parts that ranks compute sum to what transformers' experts give."""
    layers = recorded(checkpoint).experts
    assert layers
    for record in layers.values():
        shares = [getattr(record, split)(rank, world) for rank in range(world)]
        total = sum(record.compute_output(share) for share in shares)
        torch.testing.assert_close(total, record.output, rtol=1e-4, atol=1e-5 * float(record.output.abs().max()))
        assert record.hidden.shape[0] == sum(LENGTHS)


@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_ranks_cover_every_expert_channel_once(checkpoint: str, recorded: Callable[[str], MoeRecording]):
    """Maxima of tensor-parallel ranks combine to the whole's; expert-parallel ones line up to them."""
    for record in recorded(checkpoint).experts.values():
        whole = record.find_maxima(record.tensor_share(0, 1))
        parts = [record.find_maxima(record.tensor_share(rank, 4)) for rank in range(4)]
        np.testing.assert_allclose(np.max(parts, axis=0), whole, rtol=1e-5)
        groups = [record.find_maxima(record.expert_share(rank, 4)) for rank in range(4)]
        np.testing.assert_allclose(np.concatenate(groups), whole, rtol=1e-5)
        tokens = [record.count_tokens(expert) for expert in range(len(whole))]
        assert sum(tokens) == sum(LENGTHS) * record.indices.shape[1]
        assert [count == 0 for count in tokens] == [value == 0 for value in whole]


@pytest.mark.parametrize("checkpoint", MOE_CHECKPOINTS)
def test_only_cold_experts_get_no_tokens(checkpoint: str, recorded: Callable[[str], MoeRecording]):
    """A few hundred tokens reach every expert, but for those that `COLD_EXPERTS` names."""
    cold = COLD_EXPERTS.get(checkpoint, ())
    for name, record in recorded(checkpoint).experts.items():
        for expert in range(len(record.gate)):
            assert (record.count_tokens(expert) == 0) == (expert in cold), (name, expert)


@pytest.mark.parametrize("checkpoint", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_served_weights_are_those_of_the_fused_op(checkpoint: str, recorded: Callable[[str], MoeRecording]):
    """Without the factor that follows the op (DeepSeek), and normalised where transformers' are not (Qwen)."""
    for record in recorded(checkpoint).experts.values():
        sums = record.serve_weights().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        raw = record.weights.sum(-1)
        assert torch.allclose(raw, sums) == (checkpoint == "mixtral")


@pytest.mark.parametrize("checkpoint", LATENT)
def test_absorbed_queries_and_latents_give_the_same_attention(checkpoint: str, recorded: Callable[[str], MoeRecording]):
    """Scores, probabilities and outputs in latent space are those of the expanded keys and values."""
    layers = recorded(checkpoint).latent
    assert len(layers) == MOE_CHECKPOINTS[checkpoint]["num_hidden_layers"]
    for record in layers.values():
        for prompt, length in enumerate(LENGTHS):
            scores = record.absorb_queries(prompt) @ record.latent[prompt].T * record.scale
            plain = record.query[prompt] @ record.key[prompt].transpose(1, 2) * record.scale
            torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-4)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            probabilities = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
            torch.testing.assert_close(probabilities, record.probabilities[prompt], rtol=1e-3, atol=1e-4)
            out = record.attend_latents(prompt) @ record.value_up.transpose(1, 2)
            torch.testing.assert_close(out, record.out[prompt], rtol=1e-4, atol=1e-4)


def test_the_oracle_reproduces_ranges_of_vllm_gaudi(tmp_path: Path):
    """What it calls input, output and latent tensors have the ranges of the golden run, within bf16 noise.

    So the factor on the routed output is applied behind the fused op, and decode absorbs the queries.
    """
    _dequantize(GOLDEN / "model", tmp_path)
    tokens = json.loads((GOLDEN / "tp1" / "tokens.json").read_text())
    starts = [len(prompt) for prompt in tokens["prompt_token_ids"]]
    pairs = zip(tokens["prompt_token_ids"], tokens["generated_token_ids"], strict=True)
    recording = record_moe_model(tmp_path, [prompt + generated[:-1] for prompt, generated in pairs], torch.bfloat16)
    nodes = json.loads((GOLDEN / "tp1" / "g2" / "inc_output_hooks_maxabs_0_1.json").read_text())["Nodes"]
    for name, experts in recording.experts.items():
        node = nodes[f"{name}.routed_experts.moe_op"]
        golden = [node["inputs"][0][0][0], node["outputs"][0][0][0]]
        assert _list_fused_ranges(experts) == pytest.approx(golden, rel=0.03)
        assert len(node["outputs"]) == 1 + len(experts.gate)
    for name, latent in recording.latent.items():
        golden = {op: nodes[f"{name}.mla_attn.mla_attn.impl.{op}"]["inputs"] for op in _LATENT_INPUTS}
        ours = _find_latent_ranges(latent, starts)
        for op, slots in _LATENT_INPUTS.items():
            assert [ours[slot] for slot in slots] == pytest.approx([one[0][0] for one in golden[op]], rel=0.03), op


_LATENT_INPUTS = {
    "latent_cache_k": ("latent",),
    "kv_b_proj": ("kv",),
    "matmul_qk": ("absorbed", "latent"),
    "matmul_av": ("one", "kv"),
    "fused_scaled_dot_product_attention": ("query", "key", "value"),
}


def _list_fused_ranges(experts: ExpertsRecord) -> list[float]:
    """Input and output of the fused op on one rank."""
    output = experts.compute_output(experts.tensor_share(0, 1), experts.serve_weights(), scaled=False)
    return [_largest([experts.hidden]), _largest([output])]


def _find_latent_ranges(latent: LatentRecord, starts: list[int]) -> dict[str, float]:
    """Return ranges as a device sees them: decode after `starts`, prefill before; caches everything."""
    scaled = [latent.absorb_queries(prompt)[:, start:] * latent.scale for prompt, start in enumerate(starts)]
    prefill = {
        name: _largest(tensor[:, :start] for tensor, start in zip(getattr(latent, name), starts, strict=True))
        for name in ("query", "key", "value")
    }
    width = latent.key_up.shape[2]
    kv = _largest(one[:, :width] for one in latent.latent)
    return {**prefill, "absorbed": _largest(scaled), "latent": _largest(latent.latent), "kv": kv, "one": 1.0}


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def _dequantize(source: Path, target: Path) -> None:
    """Write a block-FP8 checkpoint as the bf16 one it stands for."""
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, scale in scales.items():
        weight = tensors[name.removesuffix("_scale_inv")].float()
        stretched = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name.removesuffix("_scale_inv")] = (weight * stretched).to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
