"""What engineers in the field set per model, beyond vllm-gaudi's script: one row of facts per group of models.

A row is found by facts of config.json, never by the name of a directory. Fine-tuned models have the config.json of
their base: what was found for one alone (DeepSeek-R1-Distill-Llama-8B, which needs its attention in BF16) cannot be
told from its base, and has no row.

Source: calibration/calibrate_model.sh of HabanaAI/vllm-hpu-extension, branch aice/v1.22.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gaudi_calib.models.families import Family

# Modules of attention that work on scores, probabilities and the KV cache.
_ATTENTION_TYPES = ("VLLMKVCache", "Matmul", "Softmax")
_FUSED_ATTENTION = "fused_scaled_dot_product_attention"
_HEAD_AND_ROUTER = ("lm_head", r"mlp\.gate\b")
_NO_CONST_SCALES = {"VLLM_DISABLE_MARK_SCALES_AS_CONST": "true"}


@dataclass(frozen=True)
class Preset:
    """How a model is served.

    Attributes:
        scale_method: published name.
        scale_format: of the QUANTIZE config, or None for INC's default.
        blocked_types: class names of modules left in BF16.
        blocked_names: patterns of node names left in BF16.
        measure_blocklist: patterns of node names that are not measured.
        env: environment variables.
        failure: what happens with the reference's settings, None where nothing is known to.
        sources: where that was reported.
    """

    scale_method: str = "MAXABS_HW"
    scale_format: str | None = "scalar"
    blocked_types: tuple[str, ...] = ("Softmax",)
    blocked_names: tuple[str, ...] = _HEAD_AND_ROUTER
    measure_blocklist: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class FieldRow:
    """One row: which models, and how they are served.

    Attributes:
        name: of the models, as printed.
        model_types: values of `model_type` in config.json.
        preset: how they are served.
        facts: values of config.json that they have.
        exception: values of config.json of a model that the row does not mean.
    """

    name: str
    model_types: tuple[str, ...]
    preset: Preset
    facts: Mapping[str, int] = field(default_factory=dict)
    exception: Mapping[str, int] = field(default_factory=dict)

    def fits(self, model_type: str, config: Mapping[str, Any]) -> bool:
        """Tell whether the row means the model with this config.json."""
        if model_type not in self.model_types:
            return False
        is_excepted = bool(self.exception) and _has_facts(config, self.exception)
        return _has_facts(config, self.facts) and not is_excepted


def _has_facts(config: Mapping[str, Any], facts: Mapping[str, int]) -> bool:
    return all(config.get(name) == value for name, value in facts.items())


_BF16_ATTENTION: dict[str, Any] = {
    "blocked_types": _ATTENTION_TYPES,
    "blocked_names": (*_HEAD_AND_ROUTER, _FUSED_ATTENTION),
}
_QWEN3_MISSES = {
    "failure": "accuracy falls where attention and the KV cache are in FP8",
    "sources": ("vllm-hpu-extension#357",),
    "measure_blocklist": ("lm_head",),
}

FIELD_ROWS = (
    FieldRow(
        "Qwen2-7B, Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B",
        ("qwen2",),
        Preset(
            scale_method="UNIT_SCALE",
            env={"VLLM_FP32_SOFTMAX": "true"},
            failure="huge biases of the keys: with an FP8 KV cache answers are garbage (GSM8K 0.028 and 0.010)",
            sources=("vllm-hpu-extension#176", "vllm-hpu-extension#280", "vllm-fork#1598"),
            **_BF16_ATTENTION,
        ),
        facts={"num_hidden_layers": 28, "hidden_size": 3584},
    ),
    FieldRow(
        "Mixtral",
        ("mixtral",),
        Preset(
            scale_format="CONST", env=_NO_CONST_SCALES, measure_blocklist=("lm_head",),
            failure="accuracy falls where attention and the KV cache are in FP8", **_BF16_ATTENTION,
        ),
    ),
    FieldRow(
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        ("qwen3_moe",),
        Preset(scale_format="CONST", env=_NO_CONST_SCALES, **_QWEN3_MISSES, **_BF16_ATTENTION),
        facts={"num_experts": 128},
    ),
    FieldRow(
        "Qwen3 but 32B",
        ("qwen3", "qwen3_moe"),
        Preset(**_QWEN3_MISSES, **_BF16_ATTENTION),
        exception={"num_hidden_layers": 64, "hidden_size": 5120},
    ),
    FieldRow(
        "GLM-4.5",
        ("glm4_moe",),
        Preset(
            scale_format="CONST",
            blocked_types=_ATTENTION_TYPES,
            env=_NO_CONST_SCALES,
            failure="accuracy falls where the KV cache and the attention matmuls are in FP8",
            sources=("vllm-hpu-extension#361",),
        ),
    ),
)  # fmt: skip


def reference_preset(family: Family) -> Preset:
    """Return how vllm-gaudi's own script serves a family."""
    return Preset(
        scale_format=family.scale_format,
        blocked_types=(),
        blocked_names=family.blocklist,
        measure_blocklist=family.blocklist,
    )


def field_preset(family: Family, model_type: str, config: Mapping[str, Any]) -> Preset:
    """Return how the field serves the model with this config.json; what no engine measures stays blocked."""
    row = find_row(model_type, config)
    if row is not None:
        return row.preset
    others = Preset()
    names = tuple(dict.fromkeys((*others.blocked_names, *family.blocklist)))
    return Preset(blocked_names=names, measure_blocklist=family.blocklist)


def find_row(model_type: str, config: Mapping[str, Any]) -> FieldRow | None:
    """Return the first row that means the model, None where the field treats it as all others."""
    return next((row for row in FIELD_ROWS if row.fits(model_type, config)), None)
