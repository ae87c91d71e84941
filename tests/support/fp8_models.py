"""Small FP8 checkpoints with everything a model's directory has, and their conversion for Gaudi 2."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gaudi_calib.checkpoints.gaudi2 import Gaudi2Converter, plan_gaudi2
from gaudi_calib.checkpoints.writer import ConversionPlan, run_conversion

BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CHANNEL_FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE_CODES = ALL_CODES[~ALL_CODES.float().isnan()]


def make_fp8(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Return E4M3 values in which each of the 254 finite codes occurs, 448 among them."""
    picks = torch.randint(0, 254, (rows * columns,), generator=torch.Generator().manual_seed(seed))
    picks[:254] = torch.arange(254)
    return FINITE_CODES[picks].reshape(rows, columns)


def make_tensors(layers: int = 2) -> dict[str, torch.Tensor]:
    """Return a checkpoint like those with block FP8: some projections quantized, others in bf16."""
    tensors = {"model.embed_tokens.weight": torch.randn(40, 256).bfloat16(), "steps": torch.arange(5)}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        tensors |= {
            f"{base}.mlp.up_proj.weight": make_fp8(300, 256, seed=layer),
            f"{base}.mlp.up_proj.weight_scale_inv": torch.rand(3, 2) + 1e-4,
            f"{base}.self_attn.o_proj.weight": torch.randn(256, 256).bfloat16(),
            f"{base}.norm.weight": torch.randn(256),
        }
    return tensors


def save_model(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    quantization: dict = BLOCK_FP8,
    *,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a checkpoint of `shards` weight files with the other files that a model has."""
    directory.mkdir(parents=True)
    metadata = metadata or {"format": "pt"}
    (directory / "config.json").write_text(json.dumps({"model_type": "any", "quantization_config": quantization}))
    others = ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_any.py", "extra/a/b.txt")
    for name in (*others, ".gitattributes", "tokenizer.model"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"content of {name}\n")
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "x.lock").write_text("")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata=metadata)
        return directory
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / name, metadata=metadata)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def convert(source: Path, out: Path) -> tuple[ConversionPlan[Gaudi2Converter], Counter[str]]:
    """Plan and run a conversion for Gaudi 2."""
    plan = plan_gaudi2(source, out)
    return plan, run_conversion(plan)


def load_model(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
