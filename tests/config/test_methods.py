"""Published scale methods, the dict form, and backoffs."""

import pytest

from gaudi_calib.config.check import parse_quant_config
from gaudi_calib.config.method_form import spell_out
from gaudi_calib.config.methods import SCALE_METHODS, get_scale_method
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.errors import ConfigError
from gaudi_calib.fp8 import GAUDI2, GAUDI3

PAIR_HW = {
    "weight": {"rounding_method": "hw_aligned", "backoff": 0.5},
    "activation": {"rounding_method": "hw_aligned", "backoff": 0.25},
}


def test_there_are_thirteen_methods_each_of_its_own_kind():
    """The kinds of weight and activation tell them apart, as INC needs for the dict form."""
    kinds = {(method.weight.kind, method.activation.kind) for method in SCALE_METHODS.values()}
    assert len(SCALE_METHODS) == len(kinds) == 13


@pytest.mark.parametrize("name", ["maxabs_hw", "MAXABS_HW", "MaxAbs_Hw"])
def test_names_are_found_in_any_case(name: str):
    """`scale_method` is written in lower case by the reference, in upper case by INC."""
    assert get_scale_method(name) is SCALE_METHODS["MAXABS_HW"]


def test_an_unknown_name_is_refused_with_the_nearest():
    """A typing error is answered with the name that was meant."""
    with pytest.raises(ConfigError) as error:
        get_scale_method("maxabs_pwo2")
    assert "did you mean maxabs_pow2?" in str(error.value)


DYNAMIC = {"ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW", "MAXABS_PCS_POW2"}
FIXED = {"UNIT_SCALE", "HW_ALIGNED_SINGLE_SCALE"}


@pytest.mark.parametrize("name", list(SCALE_METHODS))
def test_facts_of_each_method(name: str):
    """Which are dynamic only, need a measurement, leave a file, and forbid runtime scale patching."""
    method = get_scale_method(name)
    assert method.is_fixed == (name in FIXED)
    assert method.is_dynamic_only == (name in DYNAMIC)
    assert method.allows_dynamic == (name not in FIXED and "MAXABS_HW" not in name and "ACT_MAXABS_HW" not in name)
    assert method.needs_measurement == (name not in DYNAMIC | FIXED)
    assert method.is_per_channel == ("PCS" in name)
    table = QuantConfig(scale_method=name).method_table
    assert (table.file_tag, table.methods, table.for_node("lm_head")) == (name, (method,), method)


def test_candidates_of_the_hardware_aligned_opt_method_depend_on_the_device():
    """They are the free scales, in INC's order, which decides between equal errors."""
    weight = get_scale_method("maxabs_hw_opt_weight").weight
    assert weight.find_candidates(GAUDI2) == (16.0, 1.0, 2.0**-4, 2.0**-8)
    assert weight.find_candidates(GAUDI3)[0] == 128.0


def test_a_rule_of_default_without_backoff_has_none():
    """INC's default is 1.0, not the published 0.25 or 0.5."""
    form = {"default": {"activation": {"rounding_method": "pow2"}, "weight": {"rounding_method": "pow2"}}}
    table = QuantConfig(scale_method=form).method_table
    assert table.file_tag == "MAXABS_POW2"
    assert (table.default.weight.backoff, table.default.activation.backoff) == (1.0, 1.0)


def test_nodes_win_over_layers_over_classes_over_default():
    """Each place names the same node with another backoff."""

    def override(backoff: float) -> dict:
        return {"activation": {"backoff": backoff}}

    form = {
        "default": PAIR_HW,
        "nodes": {"model.layers.3.mlp.down_proj": override(0.1)},
        "layers": {"3": override(0.2)},
        "layer_types": {"RowParallelLinear": override(0.3)},
    }
    table = QuantConfig(scale_method=form).method_table

    def backoff(name: str) -> float:
        return table.for_node(name, "RowParallelLinear").activation.backoff

    assert backoff("model.layers.3.mlp.down_proj") == 0.1
    assert backoff("model.layers.3.self_attn.o_proj") == 0.2
    assert backoff("model.layers.33.self_attn.o_proj") == 0.3
    assert table.for_node("lm_head", "ParallelLMHead").activation.backoff == 0.25
    assert table.for_node("model.layers.33.mlp.gate").activation.backoff == 0.25


def test_rules_share_the_params_of_the_default():
    """INC's way: the default's candidates hold for overrides that give none, even of another kind."""
    form = {
        "default": {
            "weight": {"scale_value_type": "opt", "rounding_method": "pow2", "backoff": 0.5},
            "activation": {"rounding_method": "pow2", "backoff": 0.25},
        },
        "layers": {"0": {"weight": {"granularity": "pcs"}}, "1": {"weight": {"granularity": "pcs", "params": {}}}},
    }
    table = QuantConfig(scale_method=form).method_table
    assert table.layers["0"].name == table.layers["1"].name == "ACT_MAXABS_POW2_WEIGHTS_PCS_OPT_POW2"
    assert table.layers["0"].weight.find_candidates(GAUDI2) == tuple(2.0**k for k in range(-10, 10))
    assert table.layers["1"].weight.find_candidates(GAUDI2) == tuple(2.0**k for k in range(-3, 5))


def test_params_of_the_default_serve_overrides_that_search():
    """The default gives candidates it does not use itself; only an override without own params gets them."""
    form = {
        "default": {
            "weight": {"rounding_method": "pow2", "params": {"weight_scales": [2.0, 0.5]}},
            "activation": {"rounding_method": "pow2"},
        },
        "nodes": {
            "a": {"weight": {"scale_value_type": "opt"}},
            "b": {"weight": {"scale_value_type": "opt", "params": {"weight_scales": [4.0]}}},
            "c": {"weight": {"scale_value_type": "opt", "params": None}},
        },
    }
    nodes = QuantConfig(scale_method=form).method_table.nodes
    found = {name: method.weight.find_candidates(GAUDI2) for name, method in nodes.items()}
    assert found == {"a": (2.0, 0.5), "b": (4.0,), "c": tuple(2.0**k for k in range(-10, 10))}


def test_overrides_that_match_nothing_are_found():
    """A misspelt node, a layer the model lacks, a class nobody has."""
    form = {
        "default": PAIR_HW,
        "nodes": {"lm_head": {}, "lm_haed": {}},
        "layers": {"1": {}, "70": {}},
        "layer_types": {"Matmul": {}, "Matmull": {}},
    }
    unused = QuantConfig(scale_method=form).method_table.find_unused(["lm_head", "model.layers.1.mlp.gate"], ["Matmul"])
    assert unused == ["nodes.lm_haed", "layers.70", "layer_types.Matmull"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        pytest.param({}, "default is missing", id="empty"),
        pytest.param({"default": None}, "default cannot be null", id="default-null"),
        pytest.param({"default": {}, "node": {}}, "did you mean 'nodes'?", id="misspelt-section"),
        pytest.param({"default": {"weights": {}}}, "did you mean 'weight'?", id="misspelt-side"),
        pytest.param({"default": {"weight": {"granularty": "pts"}}}, "did you mean 'granularity'?", id="misspelt-key"),
        pytest.param({"default": {"weight": {"rounding_method": "hw"}}}, "HW_ALIGNED", id="misspelt-value"),
        pytest.param({"default": {"weight": {"granularity": 3}}}, "granularity cannot be 3", id="number-for-name"),
        pytest.param({"default": {"weight": {"backoff": 0}}}, "greater than 0", id="backoff-zero"),
        pytest.param({"default": {"weight": {"backoff": True}}}, "backoff cannot be true", id="backoff-bool"),
        pytest.param({"default": {"weight": {"backoff": float("nan")}}}, "backoff cannot be NaN", id="backoff-nan"),
        pytest.param({"default": {"weight": {"params": {"weight_scales": []}}}}, "at least 1", id="no-candidates"),
        pytest.param({"default": {"weight": {"params": {"weight_scales": [-1]}}}}, "greater than 0", id="candidate"),
        pytest.param({"default": {"weight": {"params": {"scales": []}}}}, "weight_scales", id="misspelt-param"),
        pytest.param({"default": {"weight": {"granularity": "pcs"}}}, "no published", id="pair-not-published"),
        pytest.param({"default": {}, "layers": {"first": {}}}, "'first' is no layer number", id="layer-name"),
        pytest.param({"default": {}, "layers": {"03": {}}}, "'03' is no layer number", id="layer-zeros"),
        pytest.param({"default": {}, "nodes": {"lm_head": None}}, "use an object", id="override-null"),
        pytest.param({"default": {}, "nodes": ["lm_head"]}, "use an object", id="section-list"),
        pytest.param(7, "cannot be 7", id="number"),
    ],
)
def test_wrong_dict_forms_are_refused(form, message: str):
    """The error says what is wrong and where."""
    with pytest.raises(ConfigError) as error:
        parse_quant_config({"mode": "QUANTIZE", "scale_method": form})
    assert message in str(error.value)
    assert "scale_method" in str(error.value)


def test_backoffs_become_the_dict_form_that_works():
    """`scale_params` has no effect in INC; the dict has, and keeps the method's name."""
    config = QuantConfig(scale_method="maxabs_hw", scale_params={"input_backoff": 0.5, "weight_backoff": 1.0})
    content = config.explicit_method.model_dump(exclude_unset=True)
    for table in (config.method_table, QuantConfig(scale_method=content).method_table):
        assert table.file_tag == "MAXABS_HW"
        assert (table.default.activation.backoff, table.default.weight.backoff) == (0.5, 1.0)
    assert set(content) == {"default"}


def test_a_dict_form_stays_as_it_is():
    """Its backoffs are those that INC reads, the override's own included."""
    form = {"default": PAIR_HW, "layers": {"0": {"activation": {"backoff": 0.125}}, "1": {}}}
    config = QuantConfig(scale_method=form)
    assert config.explicit_method == config.scale_method
    assert [config.method_table.layers[layer].activation.backoff for layer in "01"] == [0.125, 0.25]


@pytest.mark.parametrize("name", list(SCALE_METHODS))
def test_the_dict_form_of_a_method_is_that_method(name: str):
    """Written with unchanged backoffs, each method is read back the same, candidates included."""
    content = spell_out(SCALE_METHODS[name]).model_dump(mode="json", exclude_unset=True)
    assert QuantConfig(scale_method=content).method_table.default == SCALE_METHODS[name]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        pytest.param("unit_scale", {"input_backoff": 0.5}, id="unit-input"),
        pytest.param("hw_aligned_single_scale", {"weight_backoff": 0.5}, id="single-weight"),
        pytest.param("maxabs_hw_opt_weight", {"weight_backoff": 0.5}, id="opt-weight"),
        pytest.param("maxabs_hw", {"weight_backoff": 0.5, "input_backoff": 0.25}, id="the-same"),
    ],
)
def test_backoffs_without_effect_leave_no_trace(name: str, params: dict):
    """Numbers nobody would use do not turn a name into a dict."""
    assert QuantConfig(scale_method=name, scale_params=params).explicit_method == name.upper()
