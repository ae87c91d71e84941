"""The torch engine, and the scales, against files INC wrote for models with experts and latent attention."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.models.families import find_family
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.derive import derive_rank
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.store import read_ranges, read_scales
from gaudi_calib.scales.compute import compute_scales
from tests.support import paths
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch

GOLDEN = paths.GOLDEN
MODELS = ("mixtral-tiny", "deepseek-v3-fp8-tiny")
# Two ways of rounding to bfloat16 in every layer lie between a run and ours.
NOISE = 0.03
BLOCK = 128


def read_prompts(model: str) -> list[list[int]]:
    """What the golden run's model saw: prompts, and what it generated but for the last token."""
    tokens = json.loads((GOLDEN / model / "tp1" / "tokens.json").read_text())
    pairs = zip(tokens["prompt_token_ids"], tokens["generated_token_ids"], strict=True)
    return [prompt + generated[:-1] for prompt, generated in pairs]


def block(ranges: RankSet[Node], model: str) -> RankSet[Node]:
    """Return what INC patches of a rank with the blocklist of the model's family."""
    config = json.loads((GOLDEN / model / "model" / "config.json").read_text())
    pattern = "|".join(find_family(config["model_type"]).blocklist)
    nodes = {name: node for name, node in ranges.nodes.items() if not re.search(pattern, name)}
    return replace(ranges, nodes=nodes, modules=tuple(name for name in ranges.modules if not re.search(pattern, name)))


@pytest.fixture(scope="module")
def measured() -> Callable[[str], RankSet[Node]]:
    """Return our ranges of a golden model, measured once."""

    @cache
    def measure(model: str) -> RankSet[Node]:
        channels = measure_channels(GOLDEN / model / "model", read_prompts(model), worlds=(1,))
        return block(derive_rank(channels, 0, Topology(1), GAUDI2), model)

    return measure


def read_golden(model: str) -> RankSet[Node]:
    return read_ranges(GOLDEN / model / "tp1" / "g2" / "inc_output_hooks_maxabs_0_1.json")


@pytest.mark.parametrize("model", MODELS)
def test_nodes_and_modules_are_those_of_inc(model: str, measured: Callable[[str], RankSet[Node]]):
    """Names in the same order, the same numbers of inputs and outputs, weights of the same nodes."""
    ours, real = measured(model), read_golden(model)
    assert list(ours.nodes) == list(real.nodes)
    assert ours.modules == real.modules
    for name, node in real.nodes.items():
        assert _describe_slots(ours.nodes[name]) == _describe_slots(node), name


def _describe_slots(node: Node) -> tuple[list[tuple[int, ...]], ...]:
    slots = (node.inputs, node.outputs or (), () if node.weight is None else (node.weight,))
    return tuple([values.shape for values in slot] for slot in slots)


@pytest.mark.parametrize("model", MODELS)
def test_ranges_are_those_of_inc(model: str, measured: Callable[[str], RankSet[Node]]):
    """Weights exactly; what prefill and decode feed within bfloat16 noise; what only one of them feeds not below it."""
    ours = measured(model).nodes
    for name, node in read_golden(model).nodes.items():
        assert ours[name].weight == node.weight, name
        for ours_one, real in zip(ours[name].inputs, node.inputs, strict=True):
            _compare(name, float(ours_one[0]), float(real[0]))
        # The second output of a row-parallel layer is uninitialised memory at one rank.
        outputs = () if node.outputs is None else node.outputs[:1] if node.weight is not None else node.outputs
        for ours_one, real in zip(ours[name].outputs or (), outputs, strict=False):
            _compare(name, float(ours_one[0]), float(real[0]))


def _compare(name: str, ours: float, real: float):
    assert ours >= real * (1 - NOISE), name
    is_fed_by_one_phase = "matmul" in name or "fused_scaled_dot_product_attention" in name
    assert is_fed_by_one_phase or ours <= real * (1 + NOISE), name


@pytest.mark.parametrize("model", MODELS)
def test_scales_of_golden_ranges_are_those_of_inc(model: str):
    """Of the same ranges, scales are equal to the bit."""
    real = read_scales(GOLDEN / model / "tp1" / "g2" / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json")
    ours = compute_scales(read_golden(model), "maxabs_hw", GAUDI2, weights=_no_weights, as_on_cpu=True)
    assert list(ours.nodes) == list(real.nodes)
    assert repr(ours.nodes) == repr(dict(real.nodes))


@pytest.mark.parametrize("model", MODELS)
def test_scales_of_measured_ranges_fit_those_of_inc(model: str, measured: Callable[[str], RankSet[Node]]):
    """With the caches' ranges in the matmuls, all but one scale: ours saw the queries of prefill, too."""
    real = read_scales(GOLDEN / model / "tp1" / "g2" / "inc_output_hooks_maxabs_MAXABS_HW_0_1.json")
    ours = compute_scales(apply_kv_cache(measured(model)), "maxabs_hw", GAUDI2, weights=_no_weights, as_on_cpu=True)
    assert list(ours.nodes) == list(real.nodes)
    for name, node in real.nodes.items():
        mine = ours.nodes[name]
        assert (len(mine.inputs), len(mine.outputs)) == (len(node.inputs), len(node.outputs))
        if name.endswith("matmul_qk"):
            assert mine.inputs[0] >= node.inputs[0] and mine.inputs[1] == node.inputs[1]
        else:
            assert (mine.inputs, mine.outputs, mine.weight) == (node.inputs, node.outputs, node.weight), name


def _no_weights(name: str) -> None:
    raise AssertionError(f"the weight of {name} was read")


def test_fp8_weights_give_the_ranges_of_their_bfloat16_copy(tmp_path: Path):
    """Block-scaled experts, latent projections and shared experts are dequantized where they are read."""
    source = GOLDEN / "deepseek-v3-fp8-tiny" / "model"
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors.pop(name).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        weight = tensors[name.removesuffix("_scale_inv")]
        stretched = scale[: weight.shape[0], : weight.shape[1]].to(torch.bfloat16)  # as vllm-gaudi multiplies
        tensors[name.removesuffix("_scale_inv")] = weight.to(torch.bfloat16) * stretched
    save_file(tensors, tmp_path / "model.safetensors")
    _assert_same_ranks(source, tmp_path, read_prompts("deepseek-v3-fp8-tiny"))


def test_mxfp4_experts_give_the_ranges_of_their_bfloat16_copy(tmp_path: Path):
    """Packed experts, with biases, are unpacked one at a time."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, plain = (make_tiny_model("gpt_oss", tmp_path / name, tokenizer=False) for name in ("packed", "plain"))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (packed / "config.json").write_text(json.dumps(config))
    tensors = load_file(packed / "model.safetensors")
    copy = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(122, 125, (experts, out, width // 32), generator=generator).to(torch.uint8)
        copy[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, packed / "model.safetensors")
    save_file(copy, plain / "model.safetensors")
    _assert_same_ranks(packed, plain, [[5, 7, 250, 100], list(range(60))])


def _assert_same_ranks(first: Path, second: Path, prompts: list[list[int]]):
    channels: list[ChannelRanges] = [measure_channels(model, prompts, worlds=(1, 2)) for model in (first, second)]
    for topology in (Topology(1), Topology(2), Topology(2, expert_parallel=True)):
        ours, theirs = (derive_rank(measured, topology.world - 1, topology, GAUDI2) for measured in channels)
        assert ours.modules == theirs.modules
        assert repr(ours.nodes) == repr(theirs.nodes)
