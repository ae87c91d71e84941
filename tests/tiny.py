"""Tiny random-weight Hugging Face checkpoints of every family the torch engine measures.

Weights are seeded, and spread so that activations look like a trained model's: unit
variance after each matmul, a few outlier channels, norms and biases off their initial
values (a bias of zero or a norm of one would hide a mistake).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizer import LLAMA3_TEMPLATE, save_tokenizer

_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 307,
}
_FALCON = {
    "model_type": "falcon",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
_OPT = {
    "model_type": "opt",
    "hidden_size": 256,
    "ffn_dim": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "vocab_size": 307,
    "word_embed_proj_dim": 256,
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 2

# Checkpoints by name: a family, or a family and what is different about it.
CHECKPOINTS: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **_SHAPE},
    "llama-tied": {"model_type": "llama", **_SHAPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_SHAPE, "sliding_window": 8, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", **_SHAPE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SHAPE, "head_dim": 64},
    "granite": {
        "model_type": "granite",
        **_SHAPE,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "gemma2": {
        "model_type": "gemma2",
        **_SHAPE,
        "vocab_size": 320,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "sliding_window": 8,
        "layer_types": _SLIDING_THEN_FULL,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_SHAPE,
        "vocab_size": 320,
        "head_dim": 64,
        "query_pre_attn_scalar": 40,
        "sliding_window": 8,
        "layer_types": _SLIDING_THEN_FULL,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", **_SHAPE, "pad_token_id": 0},
    "phi3-longrope": {
        "model_type": "phi3",
        **_SHAPE,
        "pad_token_id": 0,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
        },
    },
    "opt": dict(_OPT),
    "opt-postnorm": {**_OPT, "do_layer_norm_before": False},
    "opt-projected": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 128},
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"},
    },
    "gpt_neox-sequential": {
        "model_type": "gpt_neox",
        **{key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"},
        "num_hidden_layers": 2,
        "use_parallel_residual": False,
    },
    "falcon": {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": False},
    "falcon-grouped": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "bias": False},
    "falcon-alibi": {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
}


def make_tiny_model(
    checkpoint: str,
    directory: Path,
    *,
    shards: int = 1,
    tokenizer: bool = True,
    seed: int = 0,
    **config_changes: object,
) -> Path:
    """Write a tiny bfloat16 checkpoint and return its directory.

    Args:
        checkpoint: a key of `CHECKPOINTS`.
        directory: created; holds config.json, safetensors and the tokenizer.
        shards: number of safetensors files; above 1 with `model.safetensors.index.json`.
        tokenizer: also write a byte-level BPE tokenizer with a chat template.
        seed: of the weights.
        config_changes: fields of config.json to change.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = {"bos_token_id": 0, "eos_token_id": 1, **CHECKPOINTS[checkpoint], **config_changes}
    config = AutoConfig.for_model(**facts)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _spread_weights(model, torch.Generator().manual_seed(seed))
    model.to(torch.bfloat16).save_pretrained(directory)
    if shards > 1:
        _split_safetensors(directory, shards)
    if tokenizer:
        save_tokenizer(directory, LLAMA3_TEMPLATE)
    return directory


@torch.no_grad()
def _spread_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraw every parameter in place; see the module docstring."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(0.2 * noise)
            continue
        rows = torch.exp(0.5 * torch.randn(parameter.shape[0], 1, generator=generator))
        columns = torch.exp(0.5 * torch.randn(1, parameter.shape[1], generator=generator))
        parameter.copy_(noise * rows * columns / parameter.shape[1] ** 0.5)


def _split_safetensors(directory: Path, shards: int) -> None:
    """Replace model.safetensors by `shards` files and an index."""
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
