"""`--preset field`: the lists, the format and the variables that the field has."""

import json
from pathlib import Path
from typing import Any

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.config.methods import SCALE_METHODS
from gaudi_calib.config.model import to_content
from gaudi_calib.config.presets import (
    DYNAMIC_BLOCKED_TYPES,
    apply_preset,
    change_method,
    find_failure,
    measure_config,
    quant_config,
)
from gaudi_calib.models.families import FAMILIES, find_family
from gaudi_calib.models.field import FIELD_ROWS
from tests.support.model_configs import PUBLISHED_CONFIGS

PATH = "/data/out/g3/inc_output"
ATTENTION_TYPES = ["VLLMKVCache", "Matmul", "Softmax"]
HEAD_AND_ROUTER = ["lm_head", r"mlp\.gate\b"]
FUSED = "fused_scaled_dot_product_attention"
CONST = {"VLLM_DISABLE_MARK_SCALES_AS_CONST": "true"}
# What the field's script sets: method, format, types, names, names at MEASURE, variables.
FIELD = {
    "Qwen2-7B": ("unit_scale", "scalar", ATTENTION_TYPES, [*HEAD_AND_ROUTER, FUSED], [], {"VLLM_FP32_SOFTMAX": "true"}),
    "Mixtral-8x7B": ("maxabs_hw", "CONST", ATTENTION_TYPES, [*HEAD_AND_ROUTER, FUSED], ["lm_head"], CONST),
    "Qwen3-30B-A3B": ("maxabs_hw", "CONST", ATTENTION_TYPES, [*HEAD_AND_ROUTER, FUSED], ["lm_head"], CONST),
    "Qwen3-8B": ("maxabs_hw", "scalar", ATTENTION_TYPES, [*HEAD_AND_ROUTER, FUSED], ["lm_head"], {}),
    "GLM-4.5": ("maxabs_hw", "CONST", ATTENTION_TYPES, HEAD_AND_ROUTER, [], CONST),
    "Qwen3-32B": ("maxabs_hw", "scalar", ["Softmax"], HEAD_AND_ROUTER, [], {}),
    "Llama-3.1-8B": ("maxabs_hw", "scalar", ["Softmax"], HEAD_AND_ROUTER, [], {}),
    "DeepSeek-R1": ("maxabs_hw", "scalar", ["Softmax"], HEAD_AND_ROUTER, HEAD_AND_ROUTER, {}),
}


def take_field(model: str) -> tuple[Any, dict[str, str]]:
    """Return the family of a published model with the field's settings, and their variables."""
    config = PUBLISHED_CONFIGS[model]
    preset = apply_preset("field", find_family(config["model_type"]), config)
    return preset.family, dict(preset.env)


@pytest.mark.parametrize("model", FIELD)
def test_field_writes_what_the_field_sets(model: str) -> None:
    """Both configs and the variables of each group of models."""
    method, scale_format, types, names, measured_without, env = FIELD[model]
    family, variables = take_field(model)
    assert to_content(quant_config(family, PATH)) == {
        "mode": "QUANTIZE",
        "observer": "maxabs",
        "scale_method": method,
        "scale_format": scale_format,
        "allowlist": {"types": [], "names": []},
        "blocklist": {"types": types, "names": names},
        "dump_stats_path": PATH,
    }
    assert to_content(measure_config(family, PATH))["blocklist"] == {"types": [], "names": measured_without}
    assert variables == env


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_all_that_is_quantized_is_measured(family: Any) -> None:
    """MEASURE blocks nothing that QUANTIZE does not, with either preset: INC fails where a range is missing."""
    published = [config for config in PUBLISHED_CONFIGS.values() if config["model_type"] in family.model_types]
    for config in [*published, {"model_type": family.model_types[0]}]:
        for name in ("reference", "field"):
            served = apply_preset(name, family, config).family
            measured, quantized = (make(served, PATH).blocklist for make in (measure_config, quant_config))
            assert set(measured.names) <= set(quantized.names) and not measured.types


@pytest.mark.parametrize("method", SCALE_METHODS)
@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Llama-3.1-8B"])
def test_another_method_keeps_the_lists(method: str, model: str) -> None:
    """--scale-method changes what follows from the method: the preset's lists, format and types stay."""
    family, _ = take_field(model)
    asked, changed = quant_config(family, PATH, method), change_method(quant_config(family, PATH), family, method)
    assert to_content(asked) == to_content(changed)
    more = DYNAMIC_BLOCKED_TYPES if SCALE_METHODS[method].is_dynamic_only else ()
    assert set(asked.blocklist.types) == {*family.blocked_types, *more}
    assert asked.blocklist.names == list(family.blocklist)
    assert asked.scale_format == ("CONST" if SCALE_METHODS[method].is_per_channel else family.scale_format.upper())


def test_a_failure_is_told_of_configs_that_have_it() -> None:
    """A model with a row fails where its KV cache is quantized: neither with the field's config, nor as blocked."""
    for config in PUBLISHED_CONFIGS.values():
        family = find_family(config["model_type"])
        with_caches = quant_config(family, PATH, blocklist={"types": [], "names": []})
        failure = find_failure(config, with_caches)
        fails = apply_preset("field", family, config).family.blocked_types != ("Softmax",)
        assert (failure is not None) == fails
        assert (
            failure is None
            or find_failure(config, quant_config(apply_preset("field", family, config).family, PATH)) is None
        )
    mixtral = PUBLISHED_CONFIGS["Mixtral-8x7B"]
    assert find_failure(mixtral, quant_config(find_family("mixtral"), PATH)) is None  # the reference blocks all of it


def write_model(directory: Path, model: str) -> Path:
    """Write the config.json of a published model, of which nothing else is there."""
    path = directory / model
    path.mkdir()
    (path / "config.json").write_text(json.dumps(PUBLISHED_CONFIGS[model]))
    return path


def test_show_prints_the_configs_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """stdout has the files, stderr the variables; a method that needs no ranges has no MEASURE config."""
    model = write_model(tmp_path, "Qwen2-7B")
    words = ["config", "show", "-m", str(model), "-o", str(tmp_path), "--device", "g3"]
    assert main([*words, "--preset", "field"]) == 0
    shown, errors = capsys.readouterr()
    assert [Path(path).name for path in json.loads(shown)] == ["maxabs_quant_g3.json"]
    assert "VLLM_FP32_SOFTMAX=true" in errors
    assert main([*words, "--preset", "field", "--scale-method", "maxabs_pow2"]) == 0
    configs = json.loads(capsys.readouterr().out)
    assert [config.get("scale_method") for config in configs.values()] == [None, "maxabs_pow2"]
    assert main(words) == main([*words, "--preset", "reference"]) == 0
    unasked, asked = capsys.readouterr().out.split("}\n{")
    assert json.loads(unasked + "}") == json.loads("{" + asked) and "VLLM_" not in unasked


def test_show_refuses_the_field_of_a_family(capsys: pytest.CaptureFixture) -> None:
    """A family has models that the field serves differently: the error says what to give."""
    assert main(["config", "show", "--family", "qwen2", "--preset", "field"]) == 2
    assert "fix:   give a model directory (-m) instead" in capsys.readouterr().err


def test_presets_lists_the_rows(capsys: pytest.CaptureFixture) -> None:
    """The table and the JSON have every row with its settings, its failure and its sources."""
    assert main(["config", "presets"]) == 0
    table = capsys.readouterr().out
    assert main(["config", "presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["field"]
    assert [row["models"] for row in rows] == [*(row.models for row in FIELD_ROWS), "all others"]
    for row in rows:
        (line,) = (line for line in table.splitlines() if line.startswith(row["models"] + " "))
        for word in (row["scale_method"], *row["blocked_types"], *row["blocklist"], *row["env"], *row["sources"]):
            assert word in line
