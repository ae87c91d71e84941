"""`quantization_config/`: the files are what the generator makes, and serve."""

import json

import pytest

from gaudi_calib.config.file import read_quant_config
from gaudi_calib.config.methods import SCALE_METHODS
from gaudi_calib.config.model import to_content
from gaudi_calib.config.templates import list_templates, write_templates_dir
from gaudi_calib.models.families import FAMILIES
from tests.support import paths

DIRECTORY = paths.ROOT / "quantization_config"
STORED = {path.name: path for path in sorted(DIRECTORY.glob("*.json"))}


def test_the_directory_holds_exactly_the_generated_files(tmp_path):
    """No template is missing, left over or edited by hand (`python -m gaudi_calib.config.templates` repairs)."""
    generated = {path.name: path.read_text() for path in write_templates_dir(tmp_path)}
    assert {name: path.read_text() for name, path in STORED.items()} == generated


@pytest.mark.parametrize("name", STORED)
def test_a_template_is_a_valid_config(name):
    """Each file reads as it was generated, and the README says what it is for."""
    assert read_quant_config(STORED[name]) == list_templates()[name]
    assert f"`{name}`" in (DIRECTORY / "README.md").read_text()


def test_readme_names_no_other_file():
    """The README does not describe templates that are not there."""
    words = (DIRECTORY / "README.md").read_text().split("`")[1::2]
    assert {word for word in words if word.endswith(".json")} == set(STORED)


def test_every_published_method_has_a_template():
    """13 methods, each by itself in one file."""
    methods = {config.scale_method for config in list_templates().values() if config.mode == "QUANTIZE"}
    assert methods == set(SCALE_METHODS)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.blocklist], ids=lambda family: family.name)
def test_every_family_rule_has_its_two_templates(family):
    """A family with a rule of its own has a MEASURE and a QUANTIZE file with the same blocklist."""
    for phase in ("measure", "quant"):
        content = json.loads(STORED[f"maxabs_{phase}_{family.name}.json"].read_text())
        assert content["blocklist"]["names"] == list(family.blocklist)


# Names and meaning of the reference's templates; lists it leaves out are empty.
SHARED = {"observer": "maxabs", "allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": []}}
STATIC = {"mode": "QUANTIZE", "dump_stats_path": "./hqt_output/measure"}
DYNAMIC = {"mode": "QUANTIZE", "dump_stats_path": "", "scale_format": "CONST", "dynamic_quantization": True}
BLOCKED = {"blocklist": {"types": ["Matmul", "B2BMatmul", "KVCache", "VLLMKVCache"], "names": []}}
PER_TOKEN = "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw"
REFERENCE = {
    "act_maxabs_pow2_weights_pcs_opt_pow2_quant": {**STATIC, "scale_method": "act_maxabs_pow2_weights_pcs_opt_pow2"},
    "maxabs_quant": {**STATIC, "scale_method": "maxabs_hw"},
    "maxabs_quant_arbitrary": {**STATIC, "scale_method": "maxabs_arbitrary"},
    "maxabs_quant_dynamic_quantization": {**DYNAMIC, **BLOCKED, "scale_method": PER_TOKEN},
    "maxabs_quant_dynamic_quantization_all_layers": {**DYNAMIC, "scale_method": PER_TOKEN},
    "maxabs_quant_dynamic_quantization_weight_pcs_pow2": {**DYNAMIC, **BLOCKED, "scale_method": "maxabs_pcs_pow2"},
    "maxabs_quant_gemma": {
        **STATIC,
        "scale_method": "maxabs_hw",
        "blocklist": {"types": [], "names": ["lm_head"]},
    },
    "maxabs_quant_phi": {
        **STATIC,
        "scale_method": "maxabs_hw",
        "blocklist": {"types": [], "names": ["matmul_qk", "matmul_av", "lm_head"]},
    },
    "maxabs_quant_qdq": {**STATIC, "scale_method": "maxabs_hw", "scale_format": "scalar", "use_qdq": True},
    "maxabs_quant_scalar_scales": {**STATIC, "scale_method": "maxabs_hw", "scale_format": "scalar"},
    "pow2_quant": {**STATIC, "scale_method": "maxabs_pow2"},
    "unit_scale_quant": {**STATIC, "scale_method": "unit_scale"},
    "weight_opt_quant": {**STATIC, "scale_method": "maxabs_hw_opt_weight"},
}


@pytest.mark.parametrize("name", REFERENCE)
def test_templates_with_the_reference_names_mean_the_same(name):
    """Someone who copies a template by the name they know gets what they know."""
    assert to_content(list_templates()[f"{name}.json"]) == {**SHARED, **REFERENCE[name]}
