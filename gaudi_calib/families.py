"""One row of facts per model family. The only module that may contain a model name.

A family is found by the `model_type` of config.json, never by the name of a
directory. To add one: write its row, add it to `FAMILIES`, add a tiny config of it
to `tests/tiny.py` and a line to CHANGELOG.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from typing import Any

from gaudi_calib.errors import ModelError


class Split(Enum):
    """How tensor parallelism splits a linear layer's weight (and what feeds it)."""

    QKV = "qkv"  # output rows by head; KV heads replicate when there are fewer than ranks
    QKV_GROUPED = "qkv_grouped"  # as QKV, but stored by KV head as (its q heads, k, v)
    QKV_INTERLEAVED = "qkv_interleaved"  # one part, rows head by head as (q, k, v), and kept so
    COLUMN = "column"  # each part's output rows, evenly
    ROW = "row"  # input columns, evenly; partial products are all-reduced
    NONE = "none"  # replicated


@dataclass(frozen=True)
class Linear:
    """One vLLM linear layer and the Hugging Face modules it fuses.

    Attributes:
        name: vLLM's path inside the layer.
        parts: Hugging Face paths inside the layer, in the order of fusion.
        split: the tensor-parallel rule.
    """

    name: str
    parts: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class Layout:
    """Where vLLM and Hugging Face keep the modules of a decoder.

    Attributes:
        layers: Hugging Face's path of the layer list.
        linears: linear layers of one decoder layer, in vLLM's module order.
        attention: vLLM's path of the `Attention` module inside the layer.
        attention_after: name of the linear the attention module follows in vLLM's order.
        hf_attention: Hugging Face's path of the attention module inside the layer.
        embedding: path of the token embedding, the same in both.
        lm_head: names the output projection has in checkpoints.
        vllm_layers: vLLM's path of the layer list, where it differs.
        vllm_lm_head: vLLM's name of it, or None where vLLM projects with the
            embedding module, which INC does not measure.
        outer: linear layers outside the decoder layers (absolute paths), if present.
        uses_attention_interface: False where the attention calls
            `scaled_dot_product_attention` itself.
        packs: False where positions cannot be given, so that one sequence runs at a time.
    """

    layers: str
    linears: tuple[Linear, ...]
    attention: str
    attention_after: str
    hf_attention: str
    embedding: str
    lm_head: tuple[str, ...] = ("lm_head",)
    vllm_lm_head: str | None = "lm_head"
    vllm_layers: str | None = None
    outer: tuple[Linear, ...] = ()
    uses_attention_interface: bool = True
    packs: bool = True


@dataclass(frozen=True)
class Family:
    """Facts about one architecture family.

    Attributes:
        name: family name, as printed.
        model_types: values of `model_type` in config.json.
        blocklist: node-name patterns (`re.search`) left in BF16.
        scale_format: `scale_format` of the QUANTIZE config, or None for INC's default.
        env: environment of the engine phases beside the common one.
        measure_args, quantize_args: vLLM engine arguments of the two phases.
        expert_parallel: runs expert-parallel by default.
        layout: module paths for the torch engine, or None where it cannot run the family.
    """

    name: str
    model_types: tuple[str, ...]
    blocklist: tuple[str, ...] = ()
    scale_format: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    measure_args: Mapping[str, object] = field(default_factory=dict)
    quantize_args: Mapping[str, object] = field(default_factory=dict)
    expert_parallel: bool = False
    layout: Layout | None = None


_SPLIT_QKV = Linear("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Split.QKV)
_O_PROJ = Linear("self_attn.o_proj", ("self_attn.o_proj",), Split.ROW)
_GATE_UP = Linear("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), Split.COLUMN)
_DOWN = Linear("mlp.down_proj", ("mlp.down_proj",), Split.ROW)


def _llama_like(**changes: Any) -> Layout:
    facts: dict[str, Any] = {
        "layers": "model.layers",
        "linears": (_SPLIT_QKV, _O_PROJ, _GATE_UP, _DOWN),
        "attention": "self_attn.attn",
        "attention_after": "self_attn.o_proj",
        "hf_attention": "self_attn",
        "embedding": "model.embed_tokens",
    }
    return Layout(**{**facts, **changes})


_PHI3 = _llama_like(
    linears=(
        Linear("self_attn.qkv_proj", ("self_attn.qkv_proj",), Split.QKV),
        _O_PROJ,
        Linear("mlp.gate_up_proj", ("mlp.gate_up_proj",), Split.COLUMN),
        _DOWN,
    )
)
_OPT = _llama_like(
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    linears=(
        _SPLIT_QKV,
        Linear("self_attn.out_proj", ("self_attn.out_proj",), Split.ROW),
        Linear("fc1", ("fc1",), Split.COLUMN),
        Linear("fc2", ("fc2",), Split.ROW),
    ),
    attention_after="self_attn.out_proj",
    outer=(
        Linear("model.decoder.project_out", ("model.decoder.project_out",), Split.NONE),
        Linear("model.decoder.project_in", ("model.decoder.project_in",), Split.NONE),
    ),
)
# vLLM runs this family through its Transformers backend, which has names of its own.
_GPT_NEOX = Layout(
    layers="gpt_neox.layers",
    linears=(
        Linear("attention.query_key_value", ("attention.query_key_value",), Split.QKV_INTERLEAVED),
        Linear("attention.dense", ("attention.dense",), Split.ROW),
        Linear("mlp.dense_h_to_4h", ("mlp.dense_h_to_4h",), Split.COLUMN),
        Linear("mlp.dense_4h_to_h", ("mlp.dense_4h_to_h",), Split.ROW),
    ),
    attention="attention.attn",
    attention_after="attention.dense",
    hf_attention="attention",
    embedding="gpt_neox.embed_in",
    lm_head=("embed_out", "lm_head"),
    vllm_layers="model.layers",
)
_FALCON = Layout(
    layers="transformer.h",
    linears=(
        Linear("self_attention.query_key_value", ("self_attention.query_key_value",), Split.QKV_GROUPED),
        Linear("self_attention.dense", ("self_attention.dense",), Split.ROW),
        Linear("mlp.dense_h_to_4h", ("mlp.dense_h_to_4h",), Split.COLUMN),
        Linear("mlp.dense_4h_to_h", ("mlp.dense_4h_to_h",), Split.ROW),
    ),
    attention="self_attention.attn",
    attention_after="self_attention.dense",
    hf_attention="self_attention",
    embedding="transformer.word_embeddings",
    uses_attention_interface=False,
    packs=False,
)

# Families without a layout are known to the presets (blocklists, environment) but the
# torch engine cannot measure them.
FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",), layout=_llama_like()),
    Family("mistral", ("mistral",), layout=_llama_like()),
    Family("qwen2", ("qwen2",), layout=_llama_like()),
    Family("qwen3", ("qwen3",), layout=_llama_like()),
    Family("granite", ("granite",), layout=_llama_like()),
    Family("gemma2", ("gemma2",), layout=_llama_like(vllm_lm_head=None)),
    Family("gemma3", ("gemma3_text",), layout=_llama_like()),
    Family("phi3", ("phi3",), layout=_PHI3),
    Family("opt", ("opt",), layout=_OPT),
    Family("gpt_neox", ("gpt_neox",), layout=_GPT_NEOX),
    Family("falcon", ("falcon",), layout=_FALCON),
    Family("mixtral", ("mixtral",), blocklist=("self_attn", "lm_head"), scale_format="CONST"),
    Family(
        "deepseek",
        ("deepseek_v2", "deepseek_v3"),
        blocklist=("lm_head", r"mlp\.gate\b"),
        scale_format="scalar",
        env={"VLLM_HPU_FORCE_CHANNEL_FP8": "0"},
        expert_parallel=True,
    ),
    Family(
        "granite4",
        ("granitemoehybrid",),
        blocklist=("mamba", "self_attn"),
        env={"VLLM_CONTIGUOUS_PA": "false"},
        measure_args={"gpu_memory_utilization": 0.1},
        quantize_args={"gpu_memory_utilization": 0.1, "max_model_len": 2048},
    ),
)

# Blocklists of templates that the reference ships without applying them itself.
TEMPLATE_BLOCKLISTS: Mapping[str, tuple[str, ...]] = {
    "gemma": ("lm_head",),
    "phi": ("matmul_qk", "matmul_av", "lm_head"),
}


def count_kv_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key/value heads that config.json describes.

    >>> count_kv_heads({"num_attention_heads": 71, "multi_query": True, "new_decoder_architecture": False})
    1
    """
    if config.get("num_key_value_heads"):
        return int(config["num_key_value_heads"])
    if config.get("new_decoder_architecture"):
        return int(config.get("num_kv_heads") or config["num_attention_heads"])
    return 1 if config.get("multi_query") else int(config["num_attention_heads"])


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
        fix="add a row to gaudi_calib/families.py (its docstring says how); described: " + ", ".join(sorted(known)),
    )
