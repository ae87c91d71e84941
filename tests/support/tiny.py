"""Tiny random-weight Hugging Face checkpoints of every family the torch engine measures.

Weights are seeded, and spread so that activations look like a trained model's: unit
variance after each matmul, a few outlier channels, norms and biases off their initial
values (a bias of zero or a norm of one would hide a mistake). Routers send some of a few
hundred tokens to each expert, except where `COLD_EXPERTS` says otherwise.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_tokenizer import LLAMA3_TEMPLATE, save_tokenizer

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

# A quarter of each size is whole, so that ranks of 2 and 4 get equal parts of heads,
# KV heads, experts and experts' intermediate channels.
_MOE_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 307,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = {
    **_MOE_SHAPE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_DEEPSEEK_YARN = {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
_DEEPSEEK_V3 = {"model_type": "deepseek_v3", **_DEEPSEEK, "num_nextn_predict_layers": 0, "num_mtp_layers": 0}
_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    **_MOE_SHAPE,
    "head_dim": 32,
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.11,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
_GLM4_MOE = {
    "model_type": "glm4_moe",
    **_MOE_SHAPE,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "num_mtp_layers": 0,
}

# Mixture-of-experts checkpoints, as `CHECKPOINTS`.
MOE_CHECKPOINTS: dict[str, dict[str, object]] = {
    "mixtral": {"model_type": "mixtral", **_MOE_SHAPE, "num_local_experts": 4},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_MOE_SHAPE,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe-dense": {**_QWEN3_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False},
    "qwen3_moe-sparse_step": {**_QWEN3_MOE, "decoder_sparse_step": 2},
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "topk_method": "group_limited_greedy",
        "rope_parameters": _DEEPSEEK_YARN,
    },
    "deepseek_v2-lite": {
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**_DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {**_DEEPSEEK_V3, "rope_parameters": _DEEPSEEK_YARN},
    "deepseek_v3-cold": _DEEPSEEK_V3,
    "llama4_text": {
        "model_type": "llama4_text",
        **_MOE_SHAPE,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "intermediate_size": 96,
        "intermediate_size_mlp": 192,
        "num_local_experts": 8,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 16,
        "floor_scale": 16,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_MOE_SHAPE,
        "head_dim": 32,
        "intermediate_size": 96,
        "num_local_experts": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 1.5,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "granitemoe": {
        "model_type": "granitemoe",
        **_MOE_SHAPE,
        **_GRANITE_MULTIPLIERS,
        "intermediate_size": 96,
        "num_local_experts": 8,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        **_MOE_SHAPE,
        **_GRANITE_MULTIPLIERS,
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "shared_intermediate_size": 96,
        "num_local_experts": 8,
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "glm4_moe": _GLM4_MOE,
    "glm4_moe-cold": _GLM4_MOE,
}

# Experts of every layer that the router of a checkpoint never chooses.
COLD_EXPERTS: dict[str, tuple[int, ...]] = {"deepseek_v3-cold": (4, 5), "glm4_moe-cold": (0, 3)}


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
        checkpoint: a key of `CHECKPOINTS` or `MOE_CHECKPOINTS`.
        directory: created; holds config.json, safetensors and the tokenizer.
        shards: number of safetensors files; above 1 with `model.safetensors.index.json`.
        tokenizer: also write a byte-level BPE tokenizer with a chat template.
        seed: of the weights.
        config_changes: fields of config.json to change.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = {"bos_token_id": 0, "eos_token_id": 1, **{**CHECKPOINTS, **MOE_CHECKPOINTS}[checkpoint], **config_changes}
    config = AutoConfig.for_model(**facts)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _spread_weights(model, torch.Generator().manual_seed(seed))
    _bias_routers(model, COLD_EXPERTS.get(checkpoint, ()), torch.Generator().manual_seed(seed))
    model.to(torch.bfloat16).save_pretrained(directory)
    if shards > 1:
        _split_safetensors(directory, shards)
    if tokenizer:
        save_tokenizer(directory, LLAMA3_TEMPLATE)
    return directory


@torch.no_grad()
def _spread_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Redraw every parameter in place; see the module docstring."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(0.2 * noise)
        elif name.endswith("_proj_bias"):
            parameter.copy_(0.2 * noise)
        elif parameter.ndim == 3:
            parameter.copy_(noise * _spread_experts(model, name, parameter, generator))
        else:
            rows = torch.exp(0.5 * torch.randn(parameter.shape[0], 1, generator=generator))
            columns = torch.exp(0.5 * torch.randn(1, parameter.shape[1], generator=generator))
            parameter.copy_(noise * rows * columns / parameter.shape[1] ** 0.5)


def _spread_experts(
    model: torch.nn.Module, name: str, parameter: torch.nn.Parameter, generator: torch.Generator
) -> torch.Tensor:
    """Return what to scale a (experts, out, in) or (experts, in, out) weight by: fan-in, and outlier outputs.

    A depthwise convolution's (channels, 1, kernel) weight counts as the first form. Experts
    differ, as trained ones do, by a factor of their own.
    """
    transposed = model.config.model_type in ("llama4_text", "gpt_oss")
    count, fan_in = parameter.shape[0], parameter.shape[1 if transposed else 2]
    outputs = (count, 1, parameter.shape[2]) if transposed else (count, parameter.shape[1], 1)
    experts = torch.exp(0.3 * torch.randn(count, 1, 1, generator=generator))
    return experts * torch.exp(0.5 * torch.randn(outputs, generator=generator)) / fan_in**0.5


@torch.no_grad()
def _bias_routers(model: torch.nn.Module, cold: tuple[int, ...], generator: torch.Generator) -> None:
    """Give every router's correction bias a value, so low for `cold` experts that none of them is chosen."""
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(0.05 * torch.randn(bias.shape, generator=generator))
            bias[list(cold)] = -10.0


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
