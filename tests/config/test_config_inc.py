"""INC itself as the judge of what a QUANT_CONFIG may say."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_calib.config.check import inspect_quant_config, parse_quant_config
from gaudi_calib.config.file import validate_file
from gaudi_calib.config.methods import SCALE_METHODS, ScaleMethod
from gaudi_calib.config.model import STATIC_TYPES, get_scales_device, to_content
from gaudi_calib.config.rules import find_warnings
from gaudi_calib.config.templates import list_templates
from gaudi_calib.errors import ConfigError
from gaudi_calib.fp8 import DEVICES, Device
from tests.support.published import read_published

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")

import torch
from neural_compressor.torch.algorithms.fp8_quant._core.patching_common import _mod_default_dict
from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import scale_method_config as inc_methods
from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import scale_method_factory as factory
from neural_compressor.torch.algorithms.fp8_quant._quant_common import quant_config as inc
from neural_compressor.torch.algorithms.fp8_quant.observer import OBSERVER_TYPES
from neural_compressor.torch.quantization import FP8Config
from neural_compressor.torch.utils.auto_accelerator import INCAcceleratorType

pytestmark = pytest.mark.inc


class _Gaudi:
    """What INC asks its accelerator while it parses a config."""

    def __init__(self, device: Device):
        self.device = device

    def current_device_name(self) -> str:
        return "hpu"

    def get_inc_accelerator_type(self) -> INCAcceleratorType:
        return INCAcceleratorType[self.device.inc_name]


def ask_inc(content: dict, device: Device) -> dict | None:
    """Return INC's parsed config, or None where INC, or vllm-gaudi before it, refuses `content` on `device`.

    vllm-gaudi asks `FP8Config` whether to measure or to quantize, and stops where it says neither.
    """
    original = inc.auto_detect_accelerator
    inc.auto_detect_accelerator = lambda: _Gaudi(device)
    try:
        config = FP8Config.from_dict(copy.deepcopy(content))
        parsed = inc.Fp8cfg.parse(copy.deepcopy(content)).cfg
        observes = config.measure and parsed["observer"] in OBSERVER_TYPES
        return parsed if observes or config.quantize else None
    except Exception:  # INC refuses with ValueError, AttributeError, KeyError or FileNotFoundError
        return None
    finally:
        inc.auto_detect_accelerator = original


def accept(content: dict, device: Device) -> bool:
    """Tell whether this package accepts `content` for serving on `device`."""
    try:
        get_scales_device(parse_quant_config(content), device)
    except ConfigError:
        return False
    return True


def scaling(granularity: str, value: str, rounding: str, **more: object) -> dict:
    return {"granularity": granularity, "scale_value_type": value, "rounding_method": rounding, **more}


def test_the_13_methods_have_the_fields_and_backoffs_of_inc():
    """The table of methods says what INC's own mapping says."""

    def ours(method: ScaleMethod) -> list:
        return [(*part.kind, part.backoff) for part in (method.weight, method.activation)]

    def theirs(parts: dict) -> list:
        return [
            (part.granularity.name, part.scale_value_type.name, part.rounding_method.name, part.backoff)
            for part in (parts[inc_methods.CfgStr.WEIGHT], parts[inc_methods.CfgStr.ACTIVATION])
        ]

    mapping = {key.name: theirs(parts) for key, parts in inc_methods.scale_method_config_mapping.items()}
    assert {name: ours(method) for name, method in SCALE_METHODS.items()} == mapping
    dynamic_only = {method.name for method in inc.SUPPORTED_DYNAMIC_QUANTIZATION_SCALES}
    assert {name for name, method in SCALE_METHODS.items() if method.is_dynamic_only} == dynamic_only


def test_what_can_be_dynamic_is_what_inc_says():
    """Of the classes that INC patches it leaves exactly these alone with dynamic quantization."""
    assert {name for name, info in _mod_default_dict.items() if not info.supports_dynamic_quantization} == STATIC_TYPES


def test_the_backoff_of_dynamic_activations_is_that_of_inc(monkeypatch: pytest.MonkeyPatch):
    """Of every method that INC takes for dynamic quantization; weights keep the method's own."""
    monkeypatch.setattr(factory, "get_device_type_for_scales", lambda mod: INCAcceleratorType.GAUDI3)
    params = {"hp_dtype": torch.bfloat16, "lp_dtype": torch.float8_e4m3fn}
    served = {"mode": "QUANTIZE", "dynamic_quantization": True}
    for key, parts in inc_methods.scale_method_config_mapping.items():
        if not SCALE_METHODS[key.name].allows_dynamic:
            continue
        theirs = factory.ScaleMethodFactory(parts, params, None, "kv_cache")
        ours = parse_quant_config({**served, "scale_method": key.name}).method_table.default
        assert ours.activation.backoff == theirs.get_scale_method(factory.QuantTensorName.INPUT, True).backoff
        assert ours.weight.backoff == theirs.get_scale_method(factory.QuantTensorName.WEIGHT_OUT_CH).backoff


HW = {
    "default": {"weight": scaling("PTS", "MAXABS", "HW_ALIGNED"), "activation": scaling("pts", "maxabs", "hw_aligned")}
}
POW2 = {"weight": scaling("PTS", "MAXABS", "POW2"), "activation": scaling("PTS", "MAXABS", "POW2")}
CASES = {
    "lower case": {"scale_method": "maxabs_pow2", "scale_format": "const", "hp_dtype": "fp16"},
    "plain": {},
    "string booleans": {"use_qdq": "True", "recalc_scales": "false", "ignore_modules_wo_measures": "TRUE"},
    "boolean as number": {"use_qdq": 1},
    "boolean as word": {"fake_quant": "yes"},
    "mode in lower case": {"mode": "quantize"},
    "mode in mixed case": {"mode": "Measure"},
    "mode of FP8Config": {"mode": "AUTO"},
    "mode of plain INC": {"mode": "LOAD"},
    "unknown observer": {"mode": "MEASURE", "observer": "fake"},
    "object under a key that nobody reads": {"int4_weights": {"group_size": 128}},
    "keys that nobody reads": {"int4_weights": "True", "dump_stats_xlsx_path": "x.xlsx", "local_rank": 3},
    "bad method": {"scale_method": "maxabs_hv"},
    "bad format": {"scale_format": "tensor"},
    "bad dtype": {"hp_dtype": "FP64"},
    "bad fp8": {"fp8_config": "E3M4"},
    "bad exclude": {"measure_exclude": "OUTPUTS"},
    "null device": {"device_for_scales": None},
    "method is a list": {"scale_method": ["maxabs_hw"]},
    "type of the device": {"device_type": "GAUDI2"},
    "g2 scales": {"device_for_scales": "GAUDI2"},
    "g3 scales": {"device_for_scales": "gaudi3"},
    "g2 scales, pow2": {"device_for_scales": "GAUDI2", "scale_method": "MAXABS_POW2"},
    "g2 scales, opt": {"device_for_scales": "GAUDI2", "scale_method": "MAXABS_HW_OPT_WEIGHT"},
    "g2 scales, dict": {"device_for_scales": "GAUDI2", "scale_method": HW},
    "g2 scales, one pow2 node": {"device_for_scales": "GAUDI2", "scale_method": {**HW, "nodes": {"lm_head": POW2}}},
    "gaudi1": {"device_for_scales": "GAUDI"},
    "dict": {"scale_method": HW},
    "dict without default": {"scale_method": {"nodes": {"lm_head": POW2}}},
    "dict with null default": {"scale_method": {"default": None}},
    "dict with null sections": {"scale_method": {**HW, "nodes": None, "layers": None, "layer_types": None}},
    "dict with null override": {"scale_method": {**HW, "nodes": {"lm_head": None}}},
    "dict with null weight": {"scale_method": {"default": {**POW2, "weight": None}}},
    "empty dict": {"scale_method": {}},
    "empty default": {"scale_method": {"default": {}}},
    "half a default": {"scale_method": {"default": {"weight": {"rounding_method": "POW2"}}}},
    "hw weight, pow2 activation": {
        "scale_method": {"default": {**POW2, "weight": scaling("PTS", "MAXABS", "HW_ALIGNED")}}
    },
    "override inherits": {"scale_method": {"default": POW2, "nodes": {"lm_head": {"weight": {"backoff": 0.25}}}}},
    "override breaks": {
        "scale_method": {"default": POW2, "layers": {"0": {"weight": {"rounding_method": "IDENTITY"}}}}
    },
    "override of a type": {"scale_method": {"default": POW2, "layer_types": {"KVCache": HW["default"]}}},
    "dummy scales": {"scale_method": {"default": {**POW2, "weight": {"scale_value_type": "DUMMY_SCALES"}}}},
    "bad granularity": {"scale_method": {"default": {**POW2, "weight": {"granularity": "per_channel"}}}},
    "candidates": {
        "scale_method": {"default": {**POW2, "weight": scaling("PTS", "OPT", "POW2", params={"weight_scales": [1.0]})}}
    },
    "null candidates": {
        "scale_method": {"default": {**POW2, "weight": scaling("PTS", "OPT", "POW2", params={"weight_scales": None})}}
    },
    "empty params": {"scale_method": {"default": {**POW2, "weight": scaling("PTS", "OPT", "POW2", params={})}}},
    "dynamic method, static": {"scale_method": "MAXABS_PCS_POW2"},
    "dynamic method, measured": {"scale_method": "MAXABS_PCS_POW2", "mode": "MEASURE"},
    "dynamic dict entry, static": {
        "scale_method": {
            "default": POW2,
            "nodes": {"lm_head": {"weight": {"granularity": "PCS"}, "activation": {"granularity": "PCS"}}},
        }
    },
    "dynamic": {"scale_method": "MAXABS_PCS_POW2", "dynamic_quantization": True},
    "dynamic, to measure": {"scale_method": "MAXABS_PCS_POW2", "dynamic_quantization": True, "mode": "MEASURE"},
    "dynamic, default method": {"dynamic_quantization": True},
    "dynamic, unit scale": {"dynamic_quantization": True, "scale_method": "UNIT_SCALE"},
    "dynamic, pow2": {"dynamic_quantization": True, "scale_method": "MAXABS_POW2"},
    "dynamic, qdq": {"dynamic_quantization": True, "scale_method": "MAXABS_PCS_POW2", "use_qdq": True},
    "dynamic, fake": {"dynamic_quantization": True, "scale_method": "MAXABS_PCS_POW2", "fake_quant": True},
    "dynamic, all-reduce": {
        "dynamic_quantization": True,
        "scale_method": "MAXABS_PCS_POW2",
        "row_parallel_linear_allreduce_quantization": True,
    },
    "no directory": {"dump_stats_path": "stats"},
    "no directory, no ranges": {"dump_stats_path": "", "scale_method": "unit_scale"},
    "no directory, dynamic": {
        "dump_stats_path": "",
        "scale_method": "maxabs_pcs_pow2",
        "dynamic_quantization": True,
    },
    "old names": {"whitelist": {"names": ["mlp"]}, "blacklist": {"types": ["Linear"], "names": []}},
    "lists of names": {"allowlist": {"types": []}, "blocklist": {"names": ["lm_head", r"mlp\.gate\b"]}},
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("content", CASES.values(), ids=CASES)
def test_inc_and_we_accept_the_same_configs(content, device, tmp_path):
    """A config is refused exactly where INC on that device refuses it."""
    content = {"mode": "QUANTIZE", "dump_stats_path": str(tmp_path / "inc_output"), **content}
    assert accept(content, device) == (ask_inc(content, device) is not None)


def test_a_config_without_a_mode_does_not_serve(tmp_path):
    """INC's parser would quantize; vllm-gaudi stops."""
    content = {"dump_stats_path": str(tmp_path / "inc_output")}
    assert not accept(content, DEVICES["g2"])
    assert ask_inc(content, DEVICES["g2"]) is None


@pytest.mark.parametrize("published", read_published(), ids=lambda published: published["from"])
def test_published_configs_are_taken_where_inc_takes_them(published, tmp_path, monkeypatch):
    """On a Gaudi 3, which takes the scales of a Gaudi 2, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert accept(published["content"], DEVICES["g3"]) == (ask_inc(published["content"], DEVICES["g3"]) is not None)


def test_what_inc_writes_itself_is_taken(tmp_path):
    """`FP8Config.to_json_file`, once it says what to do."""
    path = tmp_path / "config.json"
    config = FP8Config(dump_stats_path=str(tmp_path / "inc_output"), mode="QUANTIZE", hp_dtype="fp32")
    config.to_json_file(path)
    inspection = validate_file(path)
    assert [finding.where for finding in inspection.warnings] == ["non_tunable_params", "mod_dict", "_json_file"]
    assert inspection.config is not None and inspection.config.hp_dtype == "FP32"
    assert ask_inc(json.loads(path.read_text()), DEVICES["g2"]) is not None


def methods_as_dicts() -> st.SearchStrategy:
    """Dicts whose entries are mostly published combinations."""
    part = st.fixed_dictionaries(
        {},
        optional={
            "granularity": st.sampled_from(["PTS", "PCS"]),
            "scale_value_type": st.sampled_from(["MAXABS", "MAXABS", "FIXED_VALUE", "OPT"]),
            "rounding_method": st.sampled_from(["IDENTITY", "POW2", "POW2", "HW_ALIGNED", "SCALE_UNIT"]),
            "backoff": st.sampled_from([0.25, 1]),
        },
    )
    published = st.sampled_from(sorted(SCALE_METHODS)).map(
        lambda name: {
            "weight": scaling(*SCALE_METHODS[name].weight.kind),
            "activation": scaling(*SCALE_METHODS[name].activation.kind),
        }
    )
    entry = published | st.fixed_dictionaries({}, optional={"weight": part, "activation": part})
    items = {"nodes": "lm_head", "layers": "3", "layer_types": "KVCache"}
    return st.fixed_dictionaries(
        {"default": entry},
        optional={key: st.dictionaries(st.just(item), entry, max_size=1) for key, item in items.items()},
    )


FLAG = st.sampled_from([False, False, True, "False", "true"])
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["QUANTIZE", "QUANTIZE", "quantize", "MEASURE", "SHAPE"]),
        "scale_method": st.sampled_from(sorted(SCALE_METHODS)).map(str.lower) | methods_as_dicts(),
        "scale_format": st.sampled_from(["CONST", "scalar", "SCALAR"]),
        "dynamic_quantization": FLAG,
        "use_qdq": FLAG,
        "fake_quant": FLAG,
        "recalc_scales": FLAG,
        "device_for_scales": st.sampled_from(["GAUDI2", "GAUDI3"]),
        "measure_exclude": st.sampled_from(["NONE", "output", "ALL"]),
        "dump_stats_path": st.sampled_from(["", "stats"]),
    },
)


@settings(max_examples=300, deadline=None)
@given(content=CONFIGS, device=st.sampled_from(sorted(DEVICES)))
def test_any_combination_is_judged_as_inc_judges_it(content, device, tmp_path_factory):
    """Accepted or refused alike; and where accepted, INC uses the values this package predicts."""
    path = tmp_path_factory.getbasetemp() / "inc_output"
    content = {"mode": "QUANTIZE", "dump_stats_path": str(path), **content}
    parsed = ask_inc(content, DEVICES[device])
    assert accept(content, DEVICES[device]) == (parsed is not None)
    if parsed is None:
        return
    config = parse_quant_config(content)
    assert parsed["use_stats_files"] == config.uses_stats_files
    assert parsed["device_for_scales"].name == get_scales_device(config, DEVICES[device]).inc_name
    if config.uses_stats_files:
        assert parsed["scale_file"] == f"{path}_hooks_maxabs_{config.method_table.file_tag}"
    if "scale_format" in content:
        announced = any(finding.where == "scale_format" for finding in find_warnings(config))
        assert announced == (parsed["scale_format"].name != content["scale_format"].upper())


@pytest.mark.parametrize("value", inc.MeasureExclude.__members__)
def test_outputs_are_measured_where_inc_measures_them(value, tmp_path):
    """Whatever else measure_exclude may name, INC leaves out outputs or nothing."""
    content = {"mode": "MEASURE", "measure_exclude": value.lower(), "dump_stats_path": str(tmp_path / "inc_output")}
    excluded = ask_inc(content, DEVICES["g3"])["measure_exclude"]
    skips = bool(excluded & (inc.MeasureExclude.OUTPUT | inc.MeasureExclude.ALL))  # in register_patched_measure_modules
    assert parse_quant_config(content).measures_outputs != skips


@pytest.mark.parametrize("name", list_templates())
def test_inc_accepts_every_template(name, tmp_path, monkeypatch):
    """INC on either device parses the templates, and takes from them what this package takes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hqt_output").mkdir()
    config = list_templates()[name]
    for device in DEVICES.values():
        parsed = ask_inc(to_content(config), device)
        assert parsed is not None
        assert parsed["mode"].name == config.mode
        assert parsed["blocklist"] == config.blocklist.model_dump()
        assert parsed["dynamic_quantization"] == config.dynamic_quantization


@pytest.mark.parametrize(
    ("method", "weight_backoff"),
    [
        ("maxabs_hw", 0.75),
        ("act_maxabs_hw_weights_pcs_maxabs_pow2", 0.75),
        ("act_maxabs_hw_weights_pcs_opt_pow2", 0.75),
        ("maxabs_pow2_opt_weight", 0.5),  # chooses among candidates, whatever the backoff
    ],
)
def test_backoffs_of_scale_params_reach_inc(method, weight_backoff, tmp_path):
    """INC ignores scale_params as given, and obeys those the method uses in the form that is written."""
    content = {
        "mode": "QUANTIZE",
        "scale_method": method,
        "scale_params": {"input_backoff": 0.125, "weight_backoff": 0.75},
        "dump_stats_path": str(tmp_path / "inc_output"),
    }

    def read_backoffs(parsed: dict) -> tuple[float, float]:
        default = parsed["scale_method"][inc_methods.CfgStr.DEFAULT]
        return default[inc_methods.CfgStr.ACTIVATION].backoff, default[inc_methods.CfgStr.WEIGHT].backoff

    assert read_backoffs(ask_inc(content, DEVICES["g2"])) == (0.25, 0.5)
    parsed = ask_inc(to_content(parse_quant_config(content)), DEVICES["g2"])
    assert read_backoffs(parsed) == (0.125, weight_backoff)
    assert parsed["scale_file"].endswith(f"_hooks_maxabs_{method.upper()}")


STRICTER = {
    "unknown key": {"scale_metod": "maxabs_hw"},
    "pattern that does not compile": {"blocklist": {"names": ["mlp.(gate"]}},
    "observer": {"observer": "MAXABS"},
    "crashing all-reduce": {"row_parallel_linear_allreduce_quantization": True},
    "list instead of object": {"blocklist": ["lm_head"]},
    "letters of a name": {"blocklist": {"names": "lm_head"}},
    "unknown field of a method": {"scale_method": {"default": {"weight": {"back_off": 1}}}},
    "layer range": {"scale_method": {"default": POW2, "layers": {"0-3": POW2}}},
    "directory without prefix": {"dump_stats_path": "out/"},
    "world": {"world_size": 3},
    "modules of one's own": {"mod_dict": {"MyLinear": "linear"}},
    "list of modules": {"mod_dict": ["MyLinear"]},
}


@pytest.mark.parametrize("content", STRICTER.values(), ids=STRICTER)
def test_we_refuse_what_inc_swallows(content, tmp_path, monkeypatch):
    """INC parses these and does something else than written, or fails much later."""
    monkeypatch.chdir(tmp_path)
    content = {"mode": "QUANTIZE", "dump_stats_path": str(tmp_path / "inc_output"), **content}
    assert ask_inc(content, DEVICES["g2"]) is not None
    assert inspect_quant_config(content).errors
