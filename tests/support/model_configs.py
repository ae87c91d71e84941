"""What the config.json of published models says, as far as presets look at it."""

from typing import Any


def _describe(model_type: str, layers: int, hidden: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers, "hidden_size": hidden}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {"model_type": model_type, **shape, **attention, **others}


LLAMA_8B = _describe("llama", 32, 4096, 32, 8, intermediate_size=14336, vocab_size=128256, attention_bias=False)
PUBLISHED_CONFIGS = {
    "Qwen2-7B": _describe("qwen2", 28, 3584, 28, 4, intermediate_size=18944, vocab_size=152064),
    "Qwen2.5-14B": _describe("qwen2", 48, 5120, 40, 8, intermediate_size=13824, vocab_size=152064),
    "Qwen2-0.5B": _describe("qwen2", 24, 896, 14, 2, intermediate_size=4864, vocab_size=151936),
    "Qwen3-8B": _describe("qwen3", 36, 4096, 32, 8, head_dim=128, intermediate_size=12288, vocab_size=151936),
    "Qwen3-14B": _describe("qwen3", 40, 5120, 40, 8, head_dim=128, intermediate_size=17408, vocab_size=151936),
    "Qwen3-32B": _describe("qwen3", 64, 5120, 64, 8, head_dim=128, intermediate_size=25600, vocab_size=151936),
    "Qwen3-30B-A3B": _describe(
        "qwen3_moe", 48, 2048, 32, 4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    "Qwen3-235B-A22B": _describe(
        "qwen3_moe", 94, 4096, 64, 4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536
    ),
    "Qwen3-Coder-480B-A35B": _describe(
        "qwen3_moe", 62, 6144, 96, 8, head_dim=128, num_experts=160, num_experts_per_tok=8, moe_intermediate_size=2560
    ),
    "GLM-4.5": _describe(
        "glm4_moe", 92, 5120, 96, 8, head_dim=128, n_routed_experts=160, n_shared_experts=1, attention_bias=True
    ),
    "GLM-4.5-Air": _describe(
        "glm4_moe", 46, 4096, 96, 8, head_dim=128, n_routed_experts=128, n_shared_experts=1, attention_bias=True
    ),
    "Mixtral-8x7B": _describe("mixtral", 32, 4096, 32, 8, num_local_experts=8, intermediate_size=14336),
    "Mixtral-8x22B": _describe("mixtral", 56, 6144, 48, 8, num_local_experts=8, intermediate_size=16384),
    "Llama-3.1-8B": LLAMA_8B,
    "DeepSeek-R1-Distill-Llama-8B": LLAMA_8B,
    "DeepSeek-R1": _describe("deepseek_v3", 61, 7168, 128, 128, n_routed_experts=256, q_lora_rank=1536),
}
