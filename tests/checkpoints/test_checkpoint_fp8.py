"""Quantized checkpoints are read as the bf16 weights that vllm-gaudi serves and INC measures."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.errors import ModelError
from tests.support import paths

pytestmark = pytest.mark.torch

GOLDEN = paths.GOLDEN / "deepseek-v3-fp8-tiny"
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CHANNEL_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}
BLOCK_OF_GROUPS = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [128, 128]}}},
}


def save_checkpoint(
    directory: Path, tensors: dict[str, torch.Tensor], quantization: dict | None = None, *, shards: int = 1
) -> Checkpoint:
    """Write `tensors` over `shards` files, every other tensor in the next one, and open them."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "any"} | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return Checkpoint(directory)
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / f"part-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint(directory)


def make_fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random E4M3 values of every magnitude, subnormals and +-448 among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-10, 9, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 2.0**exponents).clamp(-448, 448).to(torch.float8_e4m3fn)


def make_scales(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return random float32 scales that bf16 cannot hold."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-5


def stretch(scale: torch.Tensor, shape: tuple[int, ...], block: int = 128) -> torch.Tensor:
    """Return one scale per element: each stands for `block` rows and columns."""
    wide = scale.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return wide[..., : shape[-2], : shape[-1]]


def read_by_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight as vllm-gaudi forms it: everything in bf16."""
    return values.to(torch.bfloat16) * stretch(scale, tuple(values.shape)).to(torch.bfloat16)


def list_sources(node: str) -> list[str]:
    """Return the checkpoint's modules that vLLM fuses into `node` of the golden model."""
    name = node.replace("mla_attn.mla_attn.impl.", "").replace("mla_attn.", "").replace("routed_experts.moe_op.", "")
    experts, _, fused = name.rpartition(".experts.")
    for key, parts in (("w13_list", ("gate_proj", "up_proj")), ("w2_list", ("down_proj",))):
        if fused.startswith(key):
            return [f"{experts}.experts.{fused.removeprefix(key + '.')}.{part}" for part in parts]
    if name.endswith("gate_up_proj"):
        return [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    return [name]


def test_every_weight_range_of_the_golden_run_is_reproduced() -> None:
    """INC measured the bf16 product of bf16 factors; a product formed in float32 misses 5 of the 47 ranges."""
    checkpoint = Checkpoint(GOLDEN / "model")
    nodes = json.loads((GOLDEN / "tp1/g2/inc_output_hooks_maxabs_0_1.json").read_text())["Nodes"]
    measured = {name: node["params"]["weight"][0][0] for name, node in nodes.items() if "params" in node}
    read = {
        name: max(
            float(weight.abs().max())
            for weight in checkpoint.read(f"{source}.weight" for source in list_sources(name)).values()
        )
        for name in measured
    }
    assert len(measured) == 47
    assert {name.split(".")[-2] for name in measured} >= {"w13_list", "w2_list", "impl", "mla_attn", "mlp"}
    assert read == measured


def test_scales_are_no_weights() -> None:
    """The names and shapes are those of the same model in bf16."""
    checkpoint = Checkpoint(GOLDEN / "model")
    stored = load_file(GOLDEN / "model" / "model.safetensors")
    assert set(checkpoint.weights) == {name for name in stored if not name.endswith("scale_inv")}
    assert checkpoint.shapes == {name: tuple(stored[name].shape) for name in checkpoint.weights}
    assert {tensor.dtype for tensor in checkpoint.read(checkpoint.weights).values()} == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (64, 32), (1, 129), (129, 1)], ids=str)
@pytest.mark.parametrize("quantization", [BLOCK_FP8, BLOCK_OF_GROUPS], ids=["fp8", "compressed-tensors"])
def test_blocks_reach_over_edges(shape: tuple[int, int], quantization: dict, tmp_path: Path) -> None:
    """The last block of a row or column may be a part of one."""
    values = make_fp8(*shape)
    scale = make_scales(*(math.ceil(size / 128) for size in shape))
    suffix = "_scale_inv" if quantization is BLOCK_FP8 else "_scale"
    checkpoint = save_checkpoint(tmp_path, {"a.weight": values, f"a.weight{suffix}": scale}, quantization)
    assert checkpoint.shapes == {"a.weight": shape}
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"], read_by_blocks(values, scale))


@pytest.mark.parametrize(
    "scale_shape", [(300, 1), (300,), (1,), (), (1, 1)], ids=["channel", "vector", "one", "scalar", "1x1"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_channel_and_tensor_scales_multiply_in_float32(
    scale_shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """compressed-tensors, fbgemm and static FP8 scales have one value per row or one of all."""
    values, scale = make_fp8(300, 260), make_scales(*scale_shape).to(dtype)
    checkpoint = save_checkpoint(tmp_path, {"a.weight": values, "a.weight_scale": scale}, CHANNEL_FP8)
    wide = scale.float().reshape(-1, 1)
    expected = (values.float() * wide).to(torch.bfloat16)
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"], expected)


@pytest.mark.parametrize(
    ("scale_shape", "quantization"),
    [((4, 2, 3), BLOCK_FP8), ((4, 256, 1), CHANNEL_FP8), ((4, 1, 1), CHANNEL_FP8), ((4, 1, 384), CHANNEL_FP8)],
    ids=["block", "row", "expert", "column"],
)
def test_stacked_experts_are_read_one_by_one(scale_shape: tuple[int, ...], quantization: dict, tmp_path: Path) -> None:
    """A part equals the same part of the whole, whatever index asks for it."""
    values, scale = make_fp8(4, 256, 384), make_scales(*scale_shape)
    checkpoint = save_checkpoint(tmp_path, {"experts.up": values, "experts.up_scale": scale}, quantization)
    whole = checkpoint.read(["experts.up"])["experts.up"]
    wide = scale if quantization is CHANNEL_FP8 else stretch(scale, (256, 384))
    exact = values.double() * wide.double()
    assert torch.allclose(whole.double(), exact, rtol=2**-7, atol=0)
    for index in range(4):
        assert torch.equal(checkpoint.read_part("experts.up", index), whole[index])


def test_a_row_inside_a_block_keeps_its_scale(tmp_path: Path) -> None:
    """A part of a plain matrix is a row, wherever blocks begin."""
    tensors = {"a.weight": make_fp8(400, 130), "a.weight_scale_inv": make_scales(4, 2), "b": torch.randn(5, 3)}
    checkpoint = save_checkpoint(tmp_path, tensors, BLOCK_FP8)
    whole = checkpoint.read(["a.weight", "b"])
    for index in (0, 127, 128, 200, 399):
        assert torch.equal(checkpoint.read_part("a.weight", index), whole["a.weight"][index])
    assert torch.equal(checkpoint.read_part("b", 4), whole["b"][4])
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"no {index}"):
            checkpoint.read_part("b", index)


@pytest.mark.parametrize("kind", ["float32", "float8_e8m0fnu", "uint8"])
def test_scales_that_are_powers_of_two_are_exact(kind: str, tmp_path: Path) -> None:
    """E8M0 scales are read from every type that holds them."""
    exponents = torch.tensor([[117, 120], [127, 131]], dtype=torch.uint8)
    powers = 2.0 ** (exponents.float() - 127)
    stored = {
        "float32": powers,
        "float8_e8m0fnu": exponents.view(torch.float8_e8m0fnu),
        "uint8": exponents,
    }[kind]
    values = make_fp8(256, 200)
    tensors = {"a.weight": values, "a.weight_scale_inv": stored}
    checkpoint = save_checkpoint(tmp_path, tensors, BLOCK_FP8 | {"scale_fmt": "ue8m0"})
    exact = values.double() * stretch(powers, (256, 200)).double()
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"].double(), exact)


def test_transformers_reads_the_golden_model_alike() -> None:
    """It multiplies in float32, so up to three bf16 roundings lie between; tensors with an edge block it misreads."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "model", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    theirs = model.state_dict()
    checkpoint = Checkpoint(GOLDEN / "model")
    compared = [name for name in checkpoint.weights if name in theirs and "kv_a_proj" not in name]
    assert len(compared) > 30
    for name in compared:
        ours = checkpoint.read([name])[name]
        assert torch.allclose(ours.float(), theirs[name].float(), rtol=2**-7, atol=0), name
    for layer in (1, 2):
        stacked = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        names = [f"model.layers.{layer}.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up")]
        ours = torch.cat(list(checkpoint.read(names).values()))
        assert torch.allclose(ours.float(), stacked[5].float(), rtol=2**-7, atol=0)


def test_packed_experts_equal_those_of_transformers(tmp_path: Path) -> None:
    """MXFP4 experts have the model's own name and shape, and one is read without the others."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (4, 96, 2, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(100, 140, (4, 96, 2), generator=generator).to(torch.uint8)
    name = "layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_bias": torch.randn(4, 96), f"{name}_scales": scales}
    checkpoint = save_checkpoint(tmp_path, tensors, {"quant_method": "mxfp4"}, shards=2)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert checkpoint.shapes == {name: (4, 64, 96), f"{name}_bias": (4, 96)}
    assert torch.equal(checkpoint.read([name])[name], expected)
    assert torch.equal(checkpoint.read_part(name, 2), expected[2])


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor of dequantized values; views of the mapped file do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.bfloat16, torch.float32):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("is_packed", [True, False], ids=["mxfp4", "fp8"])
def test_reading_one_expert_leaves_the_others_alone(is_packed: bool, tmp_path: Path) -> None:
    """Nothing larger than one expert is made on the way."""
    if is_packed:
        blocks = torch.zeros(16, 64, 2, 16, dtype=torch.uint8)
        tensors = {"up_blocks": blocks, "up_scales": torch.full((16, 64, 2), 127, dtype=torch.uint8)}
    else:
        tensors = {"up": make_fp8(16, 64, 64), "up_scale": make_scales(16, 64, 1)}
    checkpoint = save_checkpoint(tmp_path, tensors)
    with LargestTensor() as largest:
        assert checkpoint.read_part("up", 7).shape == (64, 64)
    assert largest.elements == 64 * 64


def test_a_scale_may_lie_in_another_shard(tmp_path: Path) -> None:
    """A shard border between a weight and its scale changes nothing."""
    values, scale = make_fp8(130, 256), make_scales(2, 2)
    tensors = {"a.weight": values, "a.weight_scale_inv": scale}
    checkpoint = save_checkpoint(tmp_path, tensors, BLOCK_FP8, shards=2)
    assert checkpoint.tensors == {"a.weight": "part-0.safetensors", "a.weight_scale_inv": "part-1.safetensors"}
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"], read_by_blocks(values, scale))


def test_scales_of_activations_and_caches_are_passed_over(tmp_path: Path) -> None:
    """They are neither weights nor errors."""
    others = ["a.input_scale", "a.activation_scale", "attn.k_scale", "attn.v_scale", "k_proj.output_scale"]
    tensors = {"a.weight": make_fp8(8, 8), "a.weight_scale": make_scales(1)} | {
        name: torch.ones(1) for name in [*others, "a.input_scale_ub", "router.scale"]
    }
    assert list(save_checkpoint(tmp_path, tensors).weights) == ["a.weight", "router.scale"]


@pytest.mark.parametrize(
    ("tensors", "quantization", "what", "why"),
    [
        ({"a.weight": make_fp8(8, 8)}, BLOCK_FP8, "'a.weight' is FP8 and has no scale", "a.weight_scale_inv"),
        (
            {"a.weight": make_fp8(256, 256), "a.weight_scale_inv": make_scales(3, 2)},
            BLOCK_FP8,
            "the scale of 'a.weight' does not fit it",
            "scale (3, 2)",
        ),
        (
            {"qkv.weight": make_fp8(12, 8), "qkv.weight_scale": make_scales(3)},
            CHANNEL_FP8,
            "the scale of 'qkv.weight' does not fit it",
            "scale (3,)",
        ),
        ({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}, {"quant_method": "awq"}, "cannot be read", "'awq'"),
        (
            {"a.weight_packed": torch.zeros(4, 4, dtype=torch.uint8), "a.weight_scale": make_scales(4, 1)},
            {"quant_method": "compressed-tensors"},
            "cannot be read",
            "'a.weight_packed'",
        ),
        (
            {"a.weight": torch.zeros(9, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(2)},
            {"quant_method": "bitsandbytes"},
            "cannot be read",
            "absmax",
        ),
        (
            {"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": make_scales(4, 1)},
            {"quant_method": "compressed-tensors"},
            "cannot be read",
            "stored as I8 with a scale of F32",
        ),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, {"quant_method": "eetq"}, "cannot be read", "as I8"),
        (
            {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e5m2), "a.weight_scale": torch.ones(1)},
            {"quant_method": "fp8"},
            "cannot be read",
            "F8_E5M2",
        ),
    ],
    ids=["no-scale", "misfit", "fused-parts", "awq", "int4", "bitsandbytes", "int8", "int8-alone", "e5m2"],
)
def test_what_cannot_be_read_is_refused(
    tensors: dict[str, torch.Tensor], quantization: dict, what: str, why: str, tmp_path: Path
) -> None:
    """The error names a tensor and asks for another checkpoint."""
    with pytest.raises(ModelError) as caught:
        checkpoint = save_checkpoint(tmp_path, tensors, quantization)
        _ = checkpoint.shapes
    assert what in str(caught.value)
    assert caught.value.why is not None and why in caught.value.why
    assert caught.value.fix is not None and "checkpoint" in caught.value.fix


def test_multimodal_configs_state_the_block_in_their_text_part(tmp_path: Path) -> None:
    """Edge blocks of a text model inside another are read with the block size of its own config."""
    values, scale = make_fp8(192, 128), make_scales(2, 1)
    save_checkpoint(tmp_path, {"a.weight": values, "a.weight_scale_inv": scale})
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": BLOCK_FP8}}))
    read = Checkpoint(tmp_path).read(["a.weight"])["a.weight"]
    assert torch.equal(read, read_by_blocks(values, scale))
