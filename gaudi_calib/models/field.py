"""What engineers in the field set per model, beyond vllm-gaudi's script: one row of facts per group of models.

A row is found by `model_type` and facts of config.json, never by the name of a directory. Fine-tuned models have the
config.json of their base: a row covers them, too, and what was found for one alone, not for its base
(DeepSeek-R1-Distill-Llama-8B), cannot be told and has no row.

Two things are not as there. Rows leave `fp8_config` out, as they all have INC's default. And Mixtral's attention is
measured: there it is not, although its linear layers are quantized, and INC fails where such a layer has no ranges.

Source: calibration/calibrate_model.sh of HabanaAI/vllm-hpu-extension, branch aice/v1.22.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gaudi_calib.models.families import Family

PresetName = Literal["reference", "field"]

_ATTENTION_TYPES = ("VLLMKVCache", "Matmul", "Softmax")
_FUSED_ATTENTION = "fused_scaled_dot_product_attention"
# Blocked in every model, also where none is called so.
HEAD_AND_ROUTER = ("lm_head", r"mlp\.gate\b")


@dataclass(frozen=True)
class FieldRow:
    """How the field measures and serves one group of models.

    Attributes:
        models: what they are called.
        model_types: values of `model_type` in config.json.
        facts: values that their config.json has.
        exception: values that the config.json of a model has which the row does not mean.
        scale_method, scale_format: of the QUANTIZE config.
        blocked_types: class names of modules left in BF16.
        blocklist: node-name patterns left in BF16.
        measure_blocklist: node-name patterns that are not measured.
        env: environment of the engine phases and of serving.
        failure: what happens where attention and the KV cache are in FP8, None where nothing is known to.
        sources: where that was reported, or mended.
    """

    models: str
    model_types: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    exception: Mapping[str, object] = field(default_factory=dict)
    scale_method: str = "maxabs_hw"
    scale_format: str = "scalar"
    blocked_types: tuple[str, ...] = _ATTENTION_TYPES
    blocklist: tuple[str, ...] = (*HEAD_AND_ROUTER, _FUSED_ATTENTION)
    measure_blocklist: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None
    sources: tuple[str, ...] = ()

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Tell whether the row means the model with this config.json."""
        excepted = bool(self.exception) and _has(config, self.exception)
        return config.get("model_type") in self.model_types and _has(config, self.facts) and not excepted


def _has(config: Mapping[str, Any], facts: Mapping[str, object]) -> bool:
    return all(config.get(name) == value for name, value in facts.items())


_CONST: dict[str, Any] = {"scale_format": "CONST", "env": {"VLLM_DISABLE_MARK_SCALES_AS_CONST": "true"}}
_WORSE = "answers get worse where attention and the KV cache are in FP8"
_EXTENSION = "HabanaAI/vllm-hpu-extension"
_QWEN3: dict[str, Any] = {
    "measure_blocklist": ("lm_head",),
    "failure": _WORSE,
    "sources": (f"{_EXTENSION}#357",),
}

FIELD_ROWS = (
    FieldRow(
        "Qwen2-7B, Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B",
        ("qwen2",),
        facts={"num_hidden_layers": 28, "hidden_size": 3584},
        scale_method="unit_scale",
        env={"VLLM_FP32_SOFTMAX": "true"},
        failure="answers are garbage with an FP8 KV cache, as the biases of the keys are huge (GSM8K 0.028 and 0.010)",
        sources=(f"{_EXTENSION}#176", f"{_EXTENSION}#280", "HabanaAI/vllm-fork#1598"),
    ),
    FieldRow(
        "Mixtral",
        ("mixtral",),
        measure_blocklist=("lm_head",),
        failure=_WORSE,
        sources=(f"{_EXTENSION}#276",),
        **_CONST,
    ),
    FieldRow("Qwen3-30B-A3B, Qwen3-235B-A22B", ("qwen3_moe",), {"num_experts": 128}, **_QWEN3, **_CONST),
    FieldRow(
        "Qwen3 but 32B",
        ("qwen3", "qwen3_moe"),
        exception={"model_type": "qwen3", "num_hidden_layers": 64, "hidden_size": 5120},
        **_QWEN3,
    ),
    FieldRow(
        "GLM-4.5",
        ("glm4_moe",),
        blocklist=HEAD_AND_ROUTER,
        failure=_WORSE,
        sources=(f"{_EXTENSION}#357", f"{_EXTENSION}#361"),
        **_CONST,
    ),
)
# Of all other models.
COMMON_ROW = FieldRow("all others", blocked_types=("Softmax",), blocklist=HEAD_AND_ROUTER)


def find_row(config: Mapping[str, Any]) -> FieldRow | None:
    """Return the row of the model with this config.json, None where the field treats it as all others.

    >>> find_row({"model_type": "glm4_moe"}).env
    {'VLLM_DISABLE_MARK_SCALES_AS_CONST': 'true'}
    """
    return next((row for row in FIELD_ROWS if row.fits(config)), None)


def list_idle(preset: str) -> tuple[str, ...]:
    """Return the patterns of a preset's blocklists that need not match a node."""
    return HEAD_AND_ROUTER if preset == "field" else ()


def serve_as_field(family: Family, row: FieldRow | None) -> Family:
    """Return a family with the settings of a row; without one, with those of all other models.

    What the family's own blocklist names stays blocked there: no engine may be able to measure it.
    """
    if row is None:
        names = tuple(dict.fromkeys((*COMMON_ROW.blocklist, *family.blocklist)))
        row = replace(COMMON_ROW, blocklist=names, measure_blocklist=family.blocklist)
    return replace(
        family,
        blocklist=row.blocklist,
        measure_blocklist=row.measure_blocklist,
        blocked_types=row.blocked_types,
        scale_format=row.scale_format,
        scale_method=row.scale_method,
    )
