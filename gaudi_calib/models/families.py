"""One row of facts per model family. Beside `field`, the only module that may contain a model name.

A family is found by the `model_type` of config.json, never by the name of a
directory. To add one: write its row, add it to `FAMILIES`, add a tiny config of it
to `tests/support/tiny.py` and a line to CHANGELOG.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from gaudi_calib.errors import ModelError
from gaudi_calib.models.modules import Attention, Experts, Layout, Linear, Split, Unmeasured


@dataclass(frozen=True)
class Family:
    """Facts about one architecture family.

    Attributes:
        name: family name, as printed.
        model_types: values of `model_type` in config.json.
        blocklist: node-name patterns (`re.search`) left in BF16.
        measure_blocklist: those of the MEASURE config, None where they are the same.
        blocked_types: class names of modules left in BF16, though measured.
        scale_method: `scale_method` of the QUANTIZE config, or None for the default.
        scale_format: `scale_format` of the QUANTIZE config, or None for INC's default.
        env: environment of the engine phases beside the common one.
        measure_args, quantize_args: vLLM engine arguments of the two phases.
        expert_parallel: runs expert-parallel by default.
        layout: where the modules are.
    """

    name: str
    model_types: tuple[str, ...]
    layout: Layout
    blocklist: tuple[str, ...] = ()
    measure_blocklist: tuple[str, ...] | None = None
    blocked_types: tuple[str, ...] = ()
    scale_method: str | None = None
    scale_format: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    measure_args: Mapping[str, object] = field(default_factory=dict)
    quantize_args: Mapping[str, object] = field(default_factory=dict)
    expert_parallel: bool = False


_QKV = Linear("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Split.QKV)
_O_PROJ = Linear("self_attn.o_proj", ("self_attn.o_proj",), Split.ROW, by_head=True)
_ATTENTION = Attention("self_attn.attn", "self_attn")
_SEPARATE_ATTENTION = (_QKV, _O_PROJ, _ATTENTION)


def _mlp(path: str, *, optional: bool = False, reduces: bool = True) -> tuple[Linear, Linear]:
    """A gated MLP whose checkpoint keeps gate and up apart."""
    gate_up = (f"{path}.gate_proj", f"{path}.up_proj")
    where = gate_up[0] if optional else None
    return (
        Linear(f"{path}.gate_up_proj", gate_up, Split.COLUMN, where),
        Linear(f"{path}.down_proj", (f"{path}.down_proj",), Split.ROW, where, reduces=reduces),
    )


def _shared_experts(path: str) -> tuple[Linear, Linear]:
    return _mlp(path, optional=True, reduces=False)


def _llama_like(*modules: Linear | Attention | Experts | Unmeasured, **changes: Any) -> Layout:
    facts: dict[str, Any] = {"layers": "model.layers", "embedding": "model.embed_tokens"}
    return Layout(modules=modules or (*_SEPARATE_ATTENTION, *_mlp("mlp")), **{**facts, **changes})


_PHI3 = _llama_like(
    Linear("self_attn.qkv_proj", ("self_attn.qkv_proj",), Split.QKV),
    _O_PROJ,
    _ATTENTION,
    Linear("mlp.gate_up_proj", ("mlp.gate_up_proj",), Split.COLUMN),
    Linear("mlp.down_proj", ("mlp.down_proj",), Split.ROW),
)
_OPT = _llama_like(
    _QKV,
    Linear("self_attn.out_proj", ("self_attn.out_proj",), Split.ROW, by_head=True),
    _ATTENTION,
    Linear("fc1", ("fc1",), Split.COLUMN),
    Linear("fc2", ("fc2",), Split.ROW),
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    ties_head=True,
    outer=(
        Linear("model.decoder.project_out", ("model.decoder.project_out",), Split.NONE),
        Linear("model.decoder.project_in", ("model.decoder.project_in",), Split.NONE),
    ),
)


def _neox_like(path: str, split: Split, **facts: Any) -> Layout:
    """A layer of one fused query_key_value and an ungated MLP."""
    modules = (
        Linear(f"{path}.query_key_value", (f"{path}.query_key_value",), split),
        Linear(f"{path}.dense", (f"{path}.dense",), Split.ROW, by_head=True),
        Attention(f"{path}.attn", path),
        Linear("mlp.dense_h_to_4h", ("mlp.dense_h_to_4h",), Split.COLUMN),
        Linear("mlp.dense_4h_to_h", ("mlp.dense_4h_to_h",), Split.ROW),
    )
    return Layout(modules=modules, **facts)


# vLLM runs this family through its Transformers backend, which has names of its own.
_GPT_NEOX = _neox_like(
    "attention",
    Split.QKV_INTERLEAVED,
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    lm_head=("embed_out", "lm_head"),
    vllm_layers="model.layers",
)
_FALCON = _neox_like(
    "self_attention",
    Split.QKV_GROUPED,
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    ties_head=True,
    uses_attention_interface=False,
    packs=False,
)


def _experts(path: str, each: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"), **facts: Any) -> Experts:
    """Experts that vLLM and checkpoints keep at `path`, one set of linear layers each."""
    names = tuple(f"{path}.experts.{{}}.{name}.weight" for name in each)
    facts = {"module": f"{path}.experts", "router": f"{path}.gate", "each": names, **facts}
    return Experts(f"{path}.experts.routed_experts.moe_op", **facts)


def _router(name: str, part: str = "") -> Linear:
    """A router's gate. Newer vLLM gives it a class that INC does not patch; ranges nobody asks for do no harm."""
    return Linear(name, (part or name,), Split.NONE, where=part or name)


_MIXTRAL = _llama_like(
    *_SEPARATE_ATTENTION,
    _router("block_sparse_moe.gate", "mlp.gate"),
    _experts("block_sparse_moe", ("w1", "w3", "w2"), module="mlp.experts", router="mlp.gate"),
    renames=((".mlp.", ".block_sparse_moe."),),
)
_QWEN_MOE = _llama_like(
    *_SEPARATE_ATTENTION,
    _router("mlp.gate"),
    _router("mlp.shared_expert_gate"),
    *_shared_experts("mlp.shared_expert"),
    *_mlp("mlp", optional=True),
    _experts("mlp"),
)
_GLM4_MOE = _llama_like(
    *_SEPARATE_ATTENTION,
    _router("mlp.gate"),
    *_shared_experts("mlp.shared_experts"),
    *_mlp("mlp", optional=True),
    _experts("mlp", late_factor="routed_scaling_factor"),
)
# The heads of latent attention are those of the queries; keys and values expand from one latent.
_DEEPSEEK = _llama_like(
    Linear("self_attn.mla_attn.kv_a_proj_with_mqa", ("self_attn.kv_a_proj_with_mqa",), Split.NONE, "self_attn.q_proj"),
    Linear("self_attn.mla_attn.q_proj", ("self_attn.q_proj",), Split.COLUMN, "self_attn.q_proj"),
    Linear("self_attn.mla_attn.q_b_proj", ("self_attn.q_b_proj",), Split.COLUMN, "self_attn.q_b_proj"),
    Linear("self_attn.mla_attn.o_proj", ("self_attn.o_proj",), Split.ROW, by_head=True),
    Linear("self_attn.mla_attn.mla_attn.impl.kv_b_proj", ("self_attn.kv_b_proj",), Split.COLUMN),
    Attention("self_attn.mla_attn.mla_attn", "self_attn", latent=True),
    _router("mlp.gate"),
    *_shared_experts("mlp.shared_experts"),
    *_mlp("mlp", optional=True),
    _experts("mlp", late_factor="routed_scaling_factor"),
)
_LLAMA4 = _llama_like(
    *_SEPARATE_ATTENTION,
    _router("feed_forward.router"),
    *_shared_experts("feed_forward.shared_expert"),
    *_mlp("feed_forward", optional=True),
    _experts(
        "feed_forward",
        router="feed_forward.router",
        stacked=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        transposed=True,
        scales_input=True,
    ),
)
_VISION = ("vision_model", "multi_modal_projector")
_LLAMA4_WITH_VISION = replace(
    _LLAMA4,
    text_prefix="language_model.",
    others=_VISION,
    vllm_layers="language_model.model.layers",
    vllm_lm_head="language_model.lm_head",
)
_GPT_OSS = _llama_like(
    Linear("attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Split.QKV),
    Linear("attn.o_proj", ("self_attn.o_proj",), Split.ROW, by_head=True),
    Attention("attn.attn", "self_attn"),
    _router("mlp.router"),
    _experts(
        "mlp",
        router="mlp.router",
        each=(),
        stacked=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        biased=True,
        transposed=True,
        interleaved=True,
    ),
)
_GRANITE_EXPERTS = Experts(
    "block_sparse_moe.experts.routed_experts.moe_op",
    "block_sparse_moe.experts",
    "block_sparse_moe.router",
    stacked=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)
_GRANITE_ROUTER = _router("block_sparse_moe.gate", "block_sparse_moe.router")
_GRANITE_RENAMES = ((".router.", ".router.layer."),)
_GRANITE_MOE = _llama_like(*_SEPARATE_ATTENTION, _GRANITE_ROUTER, _GRANITE_EXPERTS, renames=_GRANITE_RENAMES)
_GRANITE4 = _llama_like(
    *(Unmeasured(f"mamba.{name}", "mamba") for name in ("conv1d", "in_proj", "out_proj")),
    replace(_QKV, where="self_attn.q_proj"),
    replace(_O_PROJ, where="self_attn.q_proj"),
    _ATTENTION,
    _GRANITE_ROUTER,
    _GRANITE_EXPERTS,
    Linear("shared_mlp.input_linear", ("shared_mlp.input_linear",), Split.COLUMN),
    Linear("shared_mlp.output_linear", ("shared_mlp.output_linear",), Split.ROW),
    renames=_GRANITE_RENAMES,
    packs=False,
)

# What the torch engine runs, and how the reference serves it.
FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",), _llama_like()),
    Family("mistral", ("mistral",), _llama_like()),
    Family("qwen2", ("qwen2",), _llama_like()),
    Family("qwen3", ("qwen3",), _llama_like()),
    Family("granite", ("granite",), _llama_like()),
    Family("gemma2", ("gemma2",), _llama_like(vllm_lm_head=None, ties_head=True)),
    Family("gemma3", ("gemma3_text",), _llama_like(ties_head=True)),
    Family("phi3", ("phi3",), _PHI3),
    Family("opt", ("opt",), _OPT),
    Family("gpt_neox", ("gpt_neox",), _GPT_NEOX),
    Family("falcon", ("falcon",), _FALCON),
    Family("mixtral", ("mixtral",), _MIXTRAL, blocklist=("self_attn", "lm_head"), scale_format="CONST"),
    Family("qwen_moe", ("qwen2_moe", "qwen3_moe"), _QWEN_MOE),
    Family(
        "deepseek",
        ("deepseek_v2", "deepseek_v3"),
        _DEEPSEEK,
        blocklist=("lm_head", r"mlp\.gate\b"),
        scale_format="scalar",
        env={"VLLM_HPU_FORCE_CHANNEL_FP8": "0"},
        expert_parallel=True,
    ),
    Family("llama4", ("llama4_text",), _LLAMA4),
    Family("llama4_vision", ("llama4",), _LLAMA4_WITH_VISION, blocklist=_VISION),
    # INC's fused attention takes neither sinks nor windows: patched, it fails at the first prompt.
    Family("gpt_oss", ("gpt_oss",), _GPT_OSS, blocklist=("fused_scaled_dot_product_attention",)),
    Family("granitemoe", ("granitemoe",), _GRANITE_MOE),
    Family(
        "granite4",
        ("granitemoehybrid",),
        _GRANITE4,
        blocklist=("mamba", "self_attn"),
        env={"VLLM_CONTIGUOUS_PA": "false"},
        measure_args={"gpu_memory_utilization": 0.1},
        quantize_args={"gpu_memory_utilization": 0.1, "max_model_len": 2048},
    ),
    Family("glm4_moe", ("glm4_moe",), _GLM4_MOE),
)

# Blocklists of templates that the reference ships without applying them itself.
TEMPLATE_BLOCKLISTS: Mapping[str, tuple[str, ...]] = {
    "gemma": ("lm_head",),
    "phi": ("matmul_qk", "matmul_av", "lm_head"),
}


def find_kv_heads_key(config: Mapping[str, Any]) -> str | None:
    """Return the key of config.json that states the number of key/value heads, None where there is one head.

    >>> find_kv_heads_key({"num_attention_heads": 71, "multi_query": True, "new_decoder_architecture": False})
    >>> find_kv_heads_key({"num_attention_heads": 8, "num_key_value_heads": 2})
    'num_key_value_heads'
    """
    if config.get("num_key_value_heads"):
        return "num_key_value_heads"
    if config.get("new_decoder_architecture") and config.get("num_kv_heads"):
        return "num_kv_heads"
    return None if config.get("multi_query") and not config.get("new_decoder_architecture") else "num_attention_heads"


def find_family(model_type: str) -> Family:
    """Return the family of `model_type` (from config.json).

    Raises:
        ModelError: no row for it; names the nearest and how to add one.
    """
    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type in known:
        return known[model_type]
    near = get_close_matches(model_type, known, n=1)
    raise ModelError(
        f"unknown model family: model_type {model_type!r}",
        why="its module names and sharding rules are not described"
        + (f" (the nearest described one is {near[0]!r})" if near else ""),
        fix="add a row to gaudi_calib/models/families.py (its docstring says how); described: "
        + ", ".join(sorted(known)),
    )
