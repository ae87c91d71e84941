"""QUANT_CONFIG: what is accepted, what an error says, what is written."""

import json
from pathlib import Path

import pytest

from gaudi_calib.config.check import inspect_quant_config, parse_quant_config
from gaudi_calib.config.file import read_quant_config, validate_file, write_quant_config
from gaudi_calib.config.methods import SCALE_METHODS
from gaudi_calib.config.model import (
    NodeFilter,
    describe_scaling,
    describe_schema,
    find_idle_patterns,
    get_scales_device,
    to_content,
    with_dump_stats_path,
)
from gaudi_calib.config.presets import choose_family, measure_config, plan_configs, quant_config
from gaudi_calib.config.rules import find_warnings
from gaudi_calib.config.templates import list_templates
from gaudi_calib.errors import ConfigError, ModelError, UsageError
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.layout import RunLayout
from gaudi_calib.models.families import FAMILIES, find_family
from tests.support.published import read_published

PATH = "/data/out/g2/inc_output"


def parse(**content):
    return parse_quant_config({"mode": "QUANTIZE", "dump_stats_path": PATH, **content})


def warn(**content):
    return {finding.where: finding for finding in find_warnings(parse(**content))}


# What the reference's calibrate_model.sh writes, key by key.
REFERENCE = {
    "llama": ([], {}),
    "mixtral": (["self_attn", "lm_head"], {"scale_format": "CONST"}),
    "deepseek_v3": (["lm_head", r"mlp\.gate\b"], {"scale_format": "scalar"}),
    "granitemoehybrid": (["mamba", "self_attn"], {}),
}


@pytest.mark.parametrize("model_type", REFERENCE)
def test_configs_of_a_run_are_those_of_the_reference(model_type, tmp_path):
    """Keys, their order, values and spelling are what calibrate_model.sh writes for the family."""
    names, formats = REFERENCE[model_type]
    lists = {"allowlist": {"types": [], "names": []}, "blocklist": {"types": [], "names": names}}
    start = {"method": "HOOKS", "mode": "MEASURE", "observer": "maxabs"}
    end = {"quantize_weight": False, "dump_stats_path": PATH, "calibration_sample_interval": 1}
    quantize = {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw", **formats}
    expected = [start | lists | end, quantize | lists | {"dump_stats_path": PATH}]
    family = find_family(model_type)
    for config, content in zip((measure_config(family, PATH), quant_config(family, PATH)), expected):
        write_quant_config(tmp_path / "config.json", config)
        assert (tmp_path / "config.json").read_text() == json.dumps(content, indent=2) + "\n"


@pytest.mark.parametrize("method", SCALE_METHODS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_method_and_family_gives_a_config_that_reads_back(family, method, tmp_path):
    """No published combination is refused, and what is written is what is read."""
    config = quant_config(family, tmp_path / "g3" / "inc_output", method.lower())
    write_quant_config(tmp_path / "quant.json", config)
    assert read_quant_config(tmp_path / "quant.json") == config
    assert set(family.blocklist) == set(config.blocklist.names)
    assert "scale_format" not in {finding.where for finding in find_warnings(config)}


def test_dynamic_methods_leave_attention():
    """A dynamic method switches dynamic quantization on and blocks matmuls and KV caches, as the reference does."""
    content = to_content(quant_config(FAMILIES[0], PATH, "maxabs_pcs_pow2"))
    assert content["dynamic_quantization"] is True
    assert content["scale_format"] == "CONST"
    assert content["blocklist"]["types"] == ["Matmul", "B2BMatmul", "KVCache", "VLLMKVCache"]


def test_paths_of_a_run_are_absolute(tmp_path, monkeypatch):
    """A relative path is meant from the caller's directory and written as an absolute one."""
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "out" / "inc_output")
    assert quant_config(FAMILIES[0], "out/inc_output").dump_stats_path == expected
    assert with_dump_stats_path(parse(), Path("out/inc_output")).dump_stats_path == expected


def test_plan_has_no_measurement_where_none_is_needed(tmp_path):
    """Fixed and dynamic methods have only the QUANTIZE config, the others both, per device."""
    layout = RunLayout(tmp_path, "models/My-Llama")
    for method, names in {
        "unit_scale": ["quant"],
        "maxabs_pcs_pow2": ["quant"],
        "maxabs_hw": ["measure", "quant"],
    }.items():
        plan = plan_configs(FAMILIES[0], layout, ["g2", "g3"], method)
        expected = [f"my-llama/maxabs_{name}_{device}.json" for device in ("g2", "g3") for name in names]
        assert [str(path.relative_to(tmp_path)) for path in plan] == expected


UNKNOWN = {
    "key": ({"blocklst": {}}, "'blocklst'", "'blocklist'"),
    "capitals": ({"Mode": "MEASURE"}, "'Mode'", "'mode'"),
    "in a list": ({"blocklist": {"name": ["lm_head"]}}, "'name' in blocklist", "'names'"),
    "in scale_params": (
        {"scale_params": {"inputs_backoff": 0.5}},
        "'inputs_backoff' in scale_params",
        "'input_backoff'",
    ),
    "in a method": ({"scale_method": {"defaults": {}}}, "'defaults' in scale_method", "'default'"),
    "in an entry": ({"scale_method": {"default": {"weights": {}}}}, "'weights' in scale_method.default", "'weight'"),
    "in a tensor": (
        {"scale_method": {"default": {}, "nodes": {"lm_head": {"weight": {"rounding": "POW2"}}}}},
        "'rounding' in scale_method.nodes.lm_head.weight",
        "'rounding_method'",
    ),
}


@pytest.mark.parametrize(("content", "key", "nearest"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_key_names_the_nearest_known_one(content, key, nearest):
    """A misspelt key fails, at any depth, and says what was probably meant."""
    errors = inspect_quant_config({"mode": "QUANTIZE", "dump_stats_path": PATH, **content}).errors
    assert any(key in finding.what and f"did you mean {nearest}?" in finding.what for finding in errors)


REFUSED = {
    "mode": ({"mode": "QUANTISE"}, 'write "mode": "QUANTIZE", or "MEASURE"'),
    "mode in lower case": ({"mode": "measure"}, 'write "mode": "MEASURE"'),
    "mode of INC only": ({"mode": "LOAD"}, 'write "mode": "QUANTIZE", or "MEASURE"'),
    "modules of one's own": ({"mod_dict": {"MyLinear": "linear"}}, "remove it"),
    "observer in capitals": ({"observer": "MAXABS"}, "use one of maxabs, maxabs_per_channel, shape, save"),
    "method": ({"scale_method": "maxabs_hv"}, "MAXABS_HW is the nearest"),
    "method that is a number": ({"scale_method": 3}, "use one of UNIT_SCALE"),
    "flag": ({"use_qdq": 1}, "use true or false"),
    "null": ({"device_for_scales": None}, "use one of GAUDI2, GAUDI3"),
    "null backoff": ({"scale_params": {"input_backoff": None}}, "leave the key out"),
    "negative backoff": ({"scale_params": {"input_backoff": -1}}, "greater than 0"),
    "list for an object": ({"blocklist": ["lm_head"]}, '{"types": [], "names": ["lm_head"]}'),
    "text for a list": ({"blocklist": {"names": "lm_head"}}, "valid list"),
    "interval": ({"calibration_sample_interval": -1}, "greater than or equal to 0"),
    "pattern": ({"blocklist": {"names": ["mlp.(gate"]}}, "escape special characters"),
    "type of the device": ({"device_type": "GAUDI3"}, "remove it"),
    "both names": ({"blacklist": {}, "blocklist": {}}, "remove blacklist"),
    "two backoffs": (
        {"scale_params": {"input_backoff": 0.5}, "scale_method": {"default": {"weight": {}, "activation": {}}}},
        '"backoff" into weight and activation',
    ),
    "no published method": ({"scale_method": {"default": {"weight": {"rounding_method": "POW2"}}}}, "presets"),
    "no default": ({"scale_method": {"layers": {}}}, "needs a default"),
    "null for an object": ({"scale_method": {"default": None}}, "use an object"),
    "range of layers": ({"scale_method": {"default": {}, "layers": {"0-3": {}}}}, 'use "0", "1"'),
    "dynamic only": ({"scale_method": "maxabs_pcs_pow2"}, '"dynamic_quantization": true'),
    "dynamic qdq": (
        {"scale_method": "maxabs_pcs_pow2", "dynamic_quantization": True, "use_qdq": True},
        "remove use_qdq",
    ),
    "all-reduce": ({"row_parallel_linear_allreduce_quantization": True}, "remove it"),
    "path": ({"dump_stats_path": "stats"}, "write a path such as"),
    "observer without ranges": ({"observer": "save"}, '"observer": "maxabs"'),
}


@pytest.mark.parametrize(("content", "fix"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_how_to_repair_it(content, fix):
    """Each bad value or impossible combination fails with a remedy that fits."""
    with pytest.raises(ConfigError) as error:
        parse(**content)
    assert fix in error.value.fix
    assert error.value.exit_code == 1


def test_a_config_says_what_to_do():
    """Without a mode INC would quantize, and vllm-gaudi refuses the file."""
    errors = inspect_quant_config({"dump_stats_path": PATH}).errors
    assert [(finding.where, finding.fix) for finding in errors] == [
        ("mode", 'add "mode": "QUANTIZE", or "MEASURE" to measure')
    ]


UNREAD = {
    "_json_file": None,
    "non_tunable_params": ["white_list"],
    "mod_dict": {},
    "local_rank": 0,
    "global_rank": None,
    "int4_weights": "True",
    "dump_stats_xlsx_path": "out/stats.xlsx",
}


def test_keys_that_inc_takes_and_does_not_read_are_warnings():
    """INC writes some of them itself, older ones read others; each is told with its reason, and not written again."""
    content = {"mode": "QUANTIZE", "dump_stats_path": PATH}
    inspection = inspect_quant_config({**content, **UNREAD})
    assert {finding.where: finding.fix for finding in inspection.warnings} == dict.fromkeys(UNREAD, "remove it")
    assert all(finding.why for finding in inspection.warnings)
    assert to_content(inspection.config) == content


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"dump_stats_paths": "out/x"}, "dump_stats_path"),
        ({"blocklst": {}, "blacklist": {}}, "blocklist"),
        ({"allowlist": {"names": [], "name": ["mlp"]}}, "names"),
    ],
    ids=["beside it", "beside its old name", "in a list"],
)
def test_a_fix_makes_no_second_key_of_one_name(content, key):
    """Where the key that was meant is there, the misspelt one is one too many."""
    errors = inspect_quant_config({"mode": "QUANTIZE", "dump_stats_path": PATH, **content}).errors
    assert [finding.fix for finding in errors] == [f"remove it: '{key}' is given, too"]


@pytest.mark.parametrize("published", read_published(), ids=lambda published: published["from"])
def test_published_configs(published):
    """The settings of every public QUANT_CONFIG: what is wrong with them, and what is surprising."""
    inspection = inspect_quant_config(published["content"])
    assert [finding.where for finding in inspection.errors] == published["errors"]
    assert [finding.where for finding in inspection.warnings] == published["warnings"]


def test_all_problems_are_found_at_once():
    """One wrong key does not hide the others; the exception counts them."""
    content = {"mode": "QUANTIZE", "use_qdq": "maybe", "blocklst": {}, "scale_format": "vector"}
    assert [finding.where for finding in inspect_quant_config(content).errors] == [
        "scale_format",
        "use_qdq",
        "blocklst",
    ]
    with pytest.raises(ConfigError, match=r"and 2 more: `gaudi-calib config validate 'my config.json'` lists all"):
        parse_quant_config(content, where=Path("my config.json"))
    with pytest.raises(ConfigError, match=r"and 2 more\)"):
        parse_quant_config(content)


def test_every_entry_of_a_method_dict_is_judged():
    """Each entry that is no published method is named, beside what else is wrong."""
    form = {
        "default": {},
        "nodes": {"lm_head": {"weight": {"granularity": "PCS"}}},
        "layers": {"0": {}, "7": {"activation": {"rounding_method": "pow2"}}},
    }
    findings = inspect_quant_config({"mode": "QUANTIZE", "scale_method": form, "use_qdq": 1}).errors
    assert [finding.where for finding in findings] == ["scale_method.nodes.lm_head", "scale_method.layers.7", "use_qdq"]
    assert "PCS/MAXABS/IDENTITY" in findings[0].why


BROKEN_FILES = {
    "comma": ('{"mode": "QUANTIZE",\n "observer": "maxabs",\n}', r"not valid JSON \(line 3, column 1\)"),
    "duplicate": ('{"mode": "QUANTIZE", "mode": "MEASURE"}', "'mode' is given twice"),
    "duplicate inside": ('{"blocklist": {"names": [], "names": ["lm_head"]}}', "'names' is given twice"),
    "list": ("[]", "is a JSON object"),
    "empty": ("", "not valid JSON"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_named_with_its_line(text, message, tmp_path):
    """Reading says which file, and where in it."""
    path = tmp_path / "quant.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_quant_config(path)
    assert str(path) in error.value.where


def test_unreadable_files_are_config_errors(tmp_path):
    """A missing file, a directory and a binary file fail with their path."""
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary.json"):
        with pytest.raises(ConfigError) as error:
            read_quant_config(path)
        assert str(path) in error.value.where


def test_spelling_of_the_file_does_not_matter():
    """Case (but for mode and observer), string booleans and the old names of the lists mean the same."""
    loose = parse_quant_config(
        {
            "mode": "QUANTIZE",
            "scale_method": "Maxabs_Hw",
            "scale_format": "CONST",
            "use_qdq": "True",
            "whitelist": {"names": ["mlp"]},
            "blacklist": {"types": ["Linear"]},
            "dump_stats_path": PATH,
        }
    )
    strict = parse(
        scale_method="MAXABS_HW",
        scale_format="const",
        use_qdq=True,
        allowlist={"types": [], "names": ["mlp"]},
        blocklist={"types": ["Linear"], "names": []},
    )
    assert loose == strict
    assert to_content(loose) == to_content(strict)


WARNED = {
    "backoffs": ({"scale_params": {"input_backoff": 0.5}}, "scale_params"),
    "backoff of a fixed scale": (
        {"scale_method": "unit_scale", "scale_params": {"input_backoff": 0.5}},
        "scale_params.input_backoff",
    ),
    "backoff of a searched weight": (
        {"scale_method": "maxabs_hw_opt_weight", "scale_params": {"weight_backoff": 0.75}},
        "scale_params.weight_backoff",
    ),
    "scalar per channel": (
        {"scale_method": "act_maxabs_hw_weights_pcs_opt_pow2", "scale_format": "scalar"},
        "scale_format",
    ),
    "scalar fake": ({"fake_quant": True, "scale_format": "scalar"}, "scale_format"),
    "per channel": ({"scale_method": "act_maxabs_hw_weights_pcs_opt_pow2"}, "scale_method"),
    "backoff of a dynamic activation": (
        {"scale_method": "maxabs_pcs_pow2", "dynamic_quantization": True, "scale_params": {"input_backoff": 0.5}},
        "scale_params.input_backoff",
    ),
    "backoff of a dynamic dict": (
        {
            "dynamic_quantization": True,
            "scale_method": {"default": {"weight": {"backoff": 0.5}, "activation": {"backoff": 0.25}}},
        },
        "scale_method.default.activation.backoff",
    ),
    "dynamic caches": ({"scale_method": "maxabs_pcs_pow2", "dynamic_quantization": True}, "dynamic_quantization"),
    "exclude": ({"measure_exclude": "INPUT"}, "measure_exclude"),
    "exclude all": ({"measure_exclude": "ALL"}, "measure_exclude"),
    "dotted type": ({"blocklist": {"types": ["torch.nn.Linear"]}}, "blocklist.types"),
    "unmeasured modules": ({"ignore_modules_wo_measures": True}, "ignore_modules_wo_measures"),
    "e5m2": ({"fp8_config": "E5M2"}, "fp8_config"),
    "tensors": ({"mode": "MEASURE", "observer": "save"}, "observer"),
    "per channel observer": ({"mode": "MEASURE", "observer": "maxabs_per_channel"}, "observer"),
    "old scales": (
        {"scale_method": {"default": {"weight": {}, "activation": {}}}, "recalc_scales": False},
        "recalc_scales",
    ),
    "dict without backoff": (
        {"scale_method": {"default": {"weight": {"backoff": 0.5}, "activation": {}}}},
        "scale_method.default.activation.backoff",
    ),
}


@pytest.mark.parametrize(("content", "key"), WARNED.values(), ids=WARNED)
def test_what_inc_changes_silently_is_a_warning(content, key):
    """A valid config with a surprise in it is accepted with a warning; the plain one has none."""
    assert find_warnings(parse()) == []
    found = warn(**content)
    assert key in found
    assert all(finding.fix for finding in found.values())


def test_warnings_about_spelling():
    """Old names and a truthy "False" are told, and written correctly."""
    inspection = inspect_quant_config(
        {
            "mode": "MEASURE",
            "whitelist": {"names": ["mlp"]},
            "seperate_measure_files": "False",
            "dump_stats_path": PATH,
        }
    )
    assert [finding.where for finding in inspection.warnings] == ["whitelist", "seperate_measure_files"]
    assert to_content(inspection.config) == {
        "mode": "MEASURE",
        "allowlist": {"types": [], "names": ["mlp"]},
        "dump_stats_path": PATH,
        "seperate_measure_files": False,
    }


def test_backoffs_are_written_as_inc_reads_them():
    """scale_params becomes a dict; backoffs a method cannot use, or has anyway, leave no trace."""
    content = to_content(parse(scale_method="maxabs_pow2", scale_params={"weight_backoff": 0.75}))
    assert "scale_params" not in content
    assert content["scale_method"]["default"]["weight"]["backoff"] == 0.75
    assert content["scale_method"]["default"]["activation"]["backoff"] == 0.25
    for method, backoff in {"unit_scale": 0.9, "maxabs_hw_opt_weight": 0.9, "maxabs_hw": 0.5}.items():
        same = parse(scale_method=method, scale_params={"weight_backoff": backoff})
        assert to_content(same)["scale_method"] == method
    content = to_content(parse(scale_params={"input_backoff": 0.125}))
    assert content["scale_method"]["default"]["activation"]["backoff"] == 0.125
    assert to_content(parse_quant_config(content)) == content


def test_required_environment():
    """Static per-channel methods need runtime scale patching off; dynamic caches are announced to vllm-gaudi."""
    needs = {method for method in SCALE_METHODS if quant_config(FAMILIES[0], PATH, method).list_required_env()}
    assert needs == {name for name in SCALE_METHODS if "WEIGHTS_PCS" in name}
    everything = list_templates()["maxabs_quant_dynamic_quantization_all_layers.json"]
    assert everything.list_required_env() == {"VLLM_DYNAMIC_KV_QUANT": "1"}
    assert everything.list_required_env(["a.k_cache"]) == {"VLLM_DYNAMIC_KV_QUANT": "1"}
    assert everything.list_required_env([]) == {}
    for lists in ({"types": ["VLLMKVCache"]}, {"names": ["self_attn"]}):
        assert everything.model_copy(update={"blocklist": NodeFilter(**lists)}).list_required_env() == {}


def test_backoff_of_dynamic_activations():
    """It is INC's own, whatever the config says; that of weights, and of static activations, is not touched."""
    pow2 = {"granularity": "PTS", "scale_value_type": "MAXABS", "rounding_method": "POW2", "backoff": 0.125}
    both = {"weight": pow2, "activation": pow2}
    for dynamic, backoff in ((True, 0.5), (False, 0.125)):
        config = parse(scale_method={"default": both, "nodes": {"lm_head": both}}, dynamic_quantization=dynamic)
        for method in config.method_table.methods:
            assert (method.activation.backoff, method.weight.backoff) == (backoff, 0.125)
        short = parse(scale_method="maxabs_pow2", dynamic_quantization=dynamic, scale_params={"input_backoff": 0.125})
        assert short.method_table.default.activation.backoff == backoff
        assert (to_content(short)["scale_method"] == "maxabs_pow2") == dynamic


def test_what_cannot_be_dynamic_is_left_alone():
    """Softmax and the fused op stay as they are in a dynamic config; attention's matmuls and caches do not."""
    content = {"scale_method": "maxabs_pcs_pow2", "dynamic_quantization": True}
    for class_name, is_left in {
        "ModuleFusedSDPA": True,
        "Softmax": True,
        "Matmul": False,
        "VLLMKVCache": False,
    }.items():
        assert parse(**content).is_blocked("model.layers.0", class_name) == is_left
        assert not parse().is_blocked("model.layers.0", class_name)


def test_scales_device():
    """Gaudi 2 scales may serve on Gaudi 3 with maxabs_hw; nothing else may cross."""
    assert get_scales_device(parse(), GAUDI3) is GAUDI3
    assert get_scales_device(parse(device_for_scales="GAUDI2"), GAUDI3) is GAUDI2
    for content, device in [
        ({"device_for_scales": "GAUDI3"}, GAUDI2),
        ({"device_for_scales": "GAUDI2", "scale_method": "maxabs_pow2"}, GAUDI3),
    ]:
        with pytest.raises(ConfigError, match="does not work on"):
            get_scales_device(parse(**content), device)


def test_scaling_description_tells_configs_of_one_method_apart():
    """Backoff, device and precision are told, although the scale file's name hides them."""
    settings = [
        describe_scaling(parse(), GAUDI2),
        describe_scaling(parse(), GAUDI3),
        describe_scaling(parse(scale_params={"input_backoff": 0.5}), GAUDI2),
        describe_scaling(parse(hp_dtype="FP32"), GAUDI2),
    ]
    assert len({json.dumps(setting) for setting in settings}) == 4
    assert describe_scaling(parse(device_for_scales="GAUDI2"), GAUDI3) == settings[0]


NODES = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.o_proj"]


def test_lists_select_as_inc_does():
    """Names are searched as regular expressions, types compared whole; a block beats an allow."""
    blocked = parse(blocklist={"names": ["lm_head", r"mlp\.gate\b"]})
    assert [name for name in NODES if blocked.is_blocked(name)] == NODES[:2]
    allowed = parse(allowlist={"names": ["mlp"], "types": ["KVCache"]}, blocklist={"names": ["gate_up"]})
    assert [name for name in NODES if not allowed.is_blocked(name)] == [NODES[1]]
    assert not allowed.is_blocked("model.layers.0.self_attn.attn.impl.k_cache", "KVCache")
    assert parse(blocklist={"types": ["Matmul"]}).is_blocked("x.matmul_qk", "Matmul")
    assert not parse(blocklist={"types": ["Matmul"]}).is_blocked("x.matmul_qk", "B2BMatmul")


def test_patterns_that_match_nothing_are_reported():
    """Each idle pattern is named; one that occurs anywhere in a node's name is not idle."""
    config = parse(blocklist={"names": ["lm_head", "mamba"]}, allowlist={"names": ["self_atn", "mlp"]})
    assert [finding.what for finding in find_idle_patterns(config, NODES)] == [
        "pattern 'self_atn' matches no node of the model",
        "pattern 'mamba' matches no node of the model",
    ]


def test_the_most_specific_entry_of_a_method_dict_wins():
    """Node before layer before type before default; absent fields come from the default."""
    table = parse(
        scale_method={
            "default": {"weight": {"backoff": 0.5}, "activation": {"backoff": 0.25}},
            "nodes": {"model.layers.1.mlp.down_proj": {"activation": {"backoff": 0.1}}},
            "layers": {"1": {"activation": {"backoff": 0.2}}},
            "layer_types": {"KVCache": {"activation": {"backoff": 0.3}}},
        }
    ).method_table
    chosen = {
        ("model.layers.1.mlp.down_proj", "KVCache"): 0.1,
        ("model.layers.1.mlp.gate_up_proj", "KVCache"): 0.2,
        ("model.layers.11.attn.impl.k_cache", "KVCache"): 0.3,
        ("lm_head", "ParallelLMHead"): 0.25,
    }
    for (node, layer_type), backoff in chosen.items():
        method = table.for_node(node, layer_type)
        assert (method.weight.backoff, method.activation.backoff) == (0.5, backoff)


def test_schema_describes_what_is_accepted():
    """The JSON schema takes valid configs in either case and refuses misspelt ones."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(describe_schema())
    good = to_content(quant_config(find_family("deepseek_v3"), PATH, "maxabs_hw", use_qdq="True"))
    table = {"mode": "QUANTIZE", "scale_method": {"default": {"weight": {"rounding_method": "pow2"}}}}
    for content in (good, table, {"mode": "MEASURE"}):
        assert list(validator.iter_errors(content)) == []
    for content in (
        {"mode": "QUANTISE"},
        {"mode": "measure"},
        {"modes": "QUANTIZE"},
        {"blocklist": ["lm_head"]},
        {"use_qdq": 1.5},
    ):
        assert list(validator.iter_errors(content)) != []


def test_family_comes_from_config_json_or_its_name(tmp_path):
    """The directory's name plays no role; a missing, broken or unknown config.json is told."""
    model = tmp_path / "mixtral-like"
    model.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        choose_family(model, None)
    (model / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model_type"):
        choose_family(model, None)
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert choose_family(model, None).name == "llama"
    assert choose_family(None, "granite4").name == "granite4"
    for arguments in [(None, None), (model, "llama"), (None, "lama")]:
        with pytest.raises(UsageError):
            choose_family(*arguments)


@pytest.mark.parametrize("directory", ["/data/a\0b", "/data/\ud800", "/" + "x" * 300], ids=["NUL", "half", "long"])
def test_a_path_that_cannot_be_is_an_error(directory: str) -> None:
    """No file of ranges can be there, so it is said before one is looked for."""
    with pytest.raises(ConfigError, match="no file can be at dump_stats_path"):
        parse(dump_stats_path=f"{directory}/inc_output")


def test_opt_methods_in_another_dtype_are_warned_of(tmp_path: Path):
    """INC computes them, gaudi-calib refuses: `config validate` says so before a run does."""
    content = {"mode": "QUANTIZE", "scale_method": "maxabs_hw_opt_weight", "dump_stats_path": "/out/g3/inc_output"}
    path = tmp_path / "quant.json"
    for dtype, told in (("FP16", ["gaudi-calib computes maxabs_hw_opt_weight for hp_dtype BF16 only"]), ("BF16", [])):
        path.write_text(json.dumps({**content, "hp_dtype": dtype}))
        found = validate_file(path)
        assert found.errors == () and [finding.what for finding in found.warnings] == told
