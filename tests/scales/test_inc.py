"""Scales equal those of INC's own calculators, bit for bit, dividing as a CPU does and as a Gaudi does."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gaudi_calib.config.methods import SCALE_METHODS, TensorScaling
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.errors import ConfigError
from gaudi_calib.fp8 import GAUDI2, GAUDI3, Device
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.node import Node, Op, RankSet, find_op
from gaudi_calib.scales.compute import compute_scales
from gaudi_calib.scales.precision import PRECISIONS
from gaudi_calib.scales.rounding import round_scales

pytest.importorskip("neural_compressor")

from tests.oracles.inc_scales import CLASS_OF_OP, IncScales
from tests.support.scales import to_json

pytestmark = [pytest.mark.torch, pytest.mark.inc]

NODES_PER_OP = 200
NAMES = {
    Op.LINEAR: "layers.{}.self_attn.qkv_proj",
    Op.ROW_PARALLEL_LINEAR: "layers.{}.mlp.down_proj",
    Op.MATMUL: "layers.{}.attn.matmul_qk",
    Op.B2B_MATMUL: "layers.{}.attn.batch2block_matmul",
    Op.KV_CACHE: "layers.{}.attn.k_cache",
    Op.SOFTMAX: "layers.{}.attn.softmax",
    Op.FUSED_SDPA: "layers.{}.attn.fused_scaled_dot_product_attention",
    Op.DYNAMIC_MOE: "layers.{}.experts.moe_op",
}
INPUTS = {Op.MATMUL: 2, Op.B2B_MATMUL: 2, Op.FUSED_SDPA: 3}
OUTPUTS = {Op.ROW_PARALLEL_LINEAR: 2, Op.B2B_MATMUL: 1, Op.SOFTMAX: 1, Op.FUSED_SDPA: 2, Op.DYNAMIC_MOE: 1 + 6}
WEIGHTED = (Op.LINEAR, Op.ROW_PARALLEL_LINEAR)
ARITHMETICS = pytest.mark.parametrize("as_on_cpu", [True, False], ids=["cpu", "card"])

compute_on_cpu = functools.partial(compute_scales, as_on_cpu=True)


@pytest.fixture(scope="module")
def incs() -> dict[Device, IncScales]:
    return {device: IncScales(device) for device in (GAUDI2, GAUDI3)}


@pytest.fixture(params=[GAUDI2, GAUDI3], ids=lambda device: device.name)
def inc(request, incs) -> IncScales:
    return incs[request.param]


def random_ranges(random: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """bfloat16 values from 2**-100 to 2**100; half of them near 1, one in eight next to a power of two."""
    exponent = np.where(random.random(count) < 0.5, random.uniform(-12, 12, count), random.uniform(-100, 100, count))
    near_power = random.random(count) < 0.125
    exponent = np.where(near_power, np.round(exponent), exponent)
    values = round_to_bf16(np.exp2(exponent) * np.where(near_power, 1 + random.integers(-1, 3, count) / 128, 1))
    return tuple(values.reshape(-1, 1))


def random_weight(random: np.random.Generator, index: int) -> np.ndarray:
    """A small bfloat16 weight, shape (out, in), with outlier channels; some with a channel of zeros."""
    rows, columns = random.integers(2, 17), random.integers(4, 65)
    weight = random.standard_normal((rows, columns)) * 2.0 ** random.uniform(-14, 8)
    weight[random.integers(rows)] *= 2.0 ** random.uniform(0, 8)
    weight[:, random.integers(columns)] *= 2.0 ** random.uniform(0, 6)
    if index % 10 == 0:
        weight[random.integers(rows)] = 0.0
    weight[0, 0] = 2.0**-10  # never all zeros
    return round_to_bf16(weight)


@functools.cache
def random_nodes(op: Op) -> tuple[dict[str, Node], dict[str, np.ndarray]]:
    random = np.random.default_rng(list(Op).index(op))
    nodes, weights = {}, {}
    for index in range(NODES_PER_OP):
        name = NAMES[op].format(index)
        weight = random_weight(random, index) if op in WEIGHTED else None
        outputs = random_ranges(random, OUTPUTS[op]) if op in OUTPUTS else None
        inputs = random_ranges(random, INPUTS.get(op, 1))
        nodes[name] = Node(inputs, outputs, None if weight is None else np.array([np.abs(weight).max()]))
        if weight is not None:
            weights[name] = weight
        assert find_op(name, nodes[name]) is op
    return nodes, weights


@ARITHMETICS
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.value)
@pytest.mark.parametrize("method", list(SCALE_METHODS))
def test_scales_of_random_nodes_equal_inc(method: str, op: Op, as_on_cpu: bool, inc: IncScales):
    """Every method, device and op type: inputs, outputs and weights of 200 random nodes."""
    nodes, weights = random_nodes(op)
    ours = compute_scales(RankSet(0, 1, nodes), method, inc.device, weights=weights.get, as_on_cpu=as_on_cpu).nodes
    theirs = inc.compute(nodes, method, weights, as_on_cpu=as_on_cpu)
    assert {name: to_json(node) for name, node in ours.items()} == theirs


@pytest.mark.parametrize("rounding", ["POW2", "HW_ALIGNED"])
def test_roundings_of_every_scale_equal_inc(rounding: str, inc: IncScales):
    """All 32,640 bfloat16 values that are not negative: bits equal, zero and subnormals included."""
    values = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(round_scales(values, rounding, inc.device), inc.round(values, rounding))


@ARITHMETICS
@pytest.mark.parametrize("hp_dtype", ["FP16", "FP32"])
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.value)
@pytest.mark.parametrize("method", [name for name in SCALE_METHODS if "OPT" not in name])
def test_scales_in_another_precision_equal_inc(method: str, op: Op, hp_dtype: str, as_on_cpu: bool, inc: IncScales):
    """`hp_dtype` FP16 and FP32: INC computes in it; ranges from 2**-6 to 2**15."""
    precision = PRECISIONS[hp_dtype]
    random = np.random.default_rng(0)

    def moderate(ranges: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return tuple(precision.round(np.exp2(random.uniform(-6, 15, np.shape(value)))) for value in ranges)

    found, stored = random_nodes(op)
    weights = {name: precision.round(random.standard_normal(weight.shape)) for name, weight in stored.items()}
    nodes = {}
    for name, node in found.items():
        weight = np.abs(weights[name]).max().reshape(1) if name in weights else None
        nodes[name] = Node(moderate(node.inputs), None if node.outputs is None else moderate(node.outputs), weight)
    oracle = IncScales(inc.device, getattr(torch, precision.dtype))
    arithmetic = {"hp_dtype": hp_dtype, "as_on_cpu": as_on_cpu}
    ours = compute_scales(RankSet(0, 1, nodes), method, inc.device, weights=weights.get, **arithmetic).nodes
    theirs = oracle.compute(nodes, method, weights, as_on_cpu=as_on_cpu)
    assert {name: to_json(node) for name, node in ours.items()} == theirs


@pytest.mark.parametrize("hp_dtype", ["FP16", "FP32"])
@pytest.mark.parametrize("rounding", ["POW2", "HW_ALIGNED"])
def test_roundings_in_another_precision_equal_inc(rounding: str, hp_dtype: str, inc: IncScales):
    """Every float16 value that is not negative; as many of float32."""
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    precision = PRECISIONS[hp_dtype]
    oracle = IncScales(inc.device, getattr(torch, precision.dtype))
    ours = round_scales(values, rounding, inc.device, precision)
    np.testing.assert_array_equal(ours, oracle.round(values, rounding))


def test_opt_methods_are_refused_in_another_precision(inc: IncScales):
    """Their search runs over every bfloat16 magnitude."""
    with pytest.raises(ConfigError, match="computed for bfloat16 only"):
        compute_scales(RankSet(0, 1, {}), "maxabs_hw_opt_weight", inc.device, weights=lambda _: None, hp_dtype="FP16")


@pytest.mark.parametrize("method", ["MAXABS_HW", "MAXABS_HW_OPT_WEIGHT", "ACT_MAXABS_HW_WEIGHTS_PCS_OPT_POW2"])
def test_zero_ranges_get_the_scale_of_inc(method: str, inc: IncScales):
    """An expert that saw no token, and an all-zero weight, get INC's smallest scale."""
    zero = np.zeros(1, dtype=np.float32)
    nodes = {
        "experts.moe_op": Node((np.ones(1),), (np.ones(1), zero, np.ones(1))),
        "mlp.gate": Node((zero,), None, zero),
    }
    weights = {"mlp.gate": np.zeros((3, 4), dtype=np.float32)}
    ours = compute_on_cpu(RankSet(0, 1, nodes), method, inc.device, weights=weights.get).nodes
    assert {name: to_json(node) for name, node in ours.items()} == inc.compute(nodes, method, weights)


@pytest.mark.parametrize("method", ["MAXABS_POW2", "MAXABS_ARBITRARY", "MAXABS_HW"])
def test_the_dummy_input_of_expert_matmuls_gets_the_scale_of_inc(method: str, inc: IncScales):
    """`w13_list.i` is measured with an input of 0: a scale of 0 where INC writes 0."""
    name, node = "experts.moe_op.w13_list.0", Node((np.zeros(1),), None, np.array([0.25]))
    ours = compute_on_cpu(RankSet(0, 1, {name: node}), method, inc.device, weights=lambda _: None).nodes[name]
    assert to_json(ours) == inc.compute({name: node}, method, {name: np.array([[0.25]], np.float32)})[name]


def test_channels_of_a_range_count_by_their_maximum(inc: IncScales):
    """Ranges of the `maxabs_per_channel` observer give one scale."""
    nodes = {"matmul_qk": Node((np.array([1.5, 7.0, 0.25]), np.array([3.0, 2.0])))}
    ours = compute_on_cpu(RankSet(0, 1, nodes), "maxabs_pow2", inc.device, weights=lambda _: None).nodes
    assert to_json(ours["matmul_qk"]) == inc.compute(nodes, "maxabs_pow2", {})["matmul_qk"]


RULES = st.fixed_dictionaries(
    {},
    optional={
        "granularity": st.sampled_from(["pts", "PTS", "pcs"]),
        "scale_value_type": st.sampled_from(["maxabs", "MAXABS", "opt", "fixed_value"]),
        "rounding_method": st.sampled_from(["hw_aligned", "POW2", "pow2", "identity", "scale_unit"]),
        "backoff": st.sampled_from([0.125, 0.25, 0.5, 0.3, 1.0, 1]),
        "params": st.sampled_from([None, {}, {"weight_scales": [0.5, 2.0]}, {"weight_scales": None}]),
    },
)


PUBLISHED_PAIRS = st.sampled_from(list(SCALE_METHODS.values())).map(
    lambda method: {"weight": method.weight.to_fields(), "activation": method.activation.to_fields()}
)
PAIRS = st.one_of(PUBLISHED_PAIRS, st.fixed_dictionaries({}, optional={"weight": RULES, "activation": RULES}))
BACKOFFS = st.sampled_from([0.125, 0.25, 0.75])
OVERRIDES = st.one_of(
    PAIRS, st.builds(lambda backoff: {"activation": {"backoff": backoff}}, BACKOFFS), st.just({"weight": {}})
)
TABLES = st.fixed_dictionaries(
    {"default": st.one_of(PUBLISHED_PAIRS, PAIRS)},
    optional={
        "nodes": st.none()
        | st.dictionaries(st.sampled_from(["model.layers.1.mlp.down_proj", "lm_head"]), OVERRIDES, max_size=2),
        "layers": st.dictionaries(st.sampled_from(["1", "12"]), OVERRIDES, max_size=2),
        "layer_types": st.dictionaries(st.sampled_from(["RowParallelLinear", "Matmul"]), OVERRIDES, max_size=2),
    },
)
PLACES = [
    ("model.layers.1.mlp.down_proj", "RowParallelLinear"),
    ("model.layers.12.attn.matmul_qk", "Matmul"),
    ("model.layers.2.attn.matmul_qk", "Matmul"),
    ("h/layers/1/mlp", "RowParallelLinear"),
    ("lm_head", "ParallelLMHead"),
]


def describe_inc_rule(rule) -> tuple:
    scales = rule.params.get("weight_scales") if rule.scale_value_type.name == "OPT" else None
    return (
        rule.granularity.name,
        rule.scale_value_type.name,
        rule.rounding_method.name,
        rule.backoff,
        None if scales is None else tuple(scales),
    )


def describe_rule(rule: TensorScaling, device: Device) -> tuple:
    candidates = rule.find_candidates(device) if rule.scale_value_type == "OPT" else None
    return (*rule.kind, rule.backoff, candidates)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=TABLES)
def test_dict_forms_are_read_as_inc_reads_them(form: dict, inc: IncScales):
    """Inheritance, shared params and precedence; what INC refuses is refused."""
    try:
        theirs = inc.parse(form)
    except ValueError:
        with pytest.raises(ValidationError):
            QuantConfig(scale_method=form)
        return
    ours = QuantConfig(scale_method=form).method_table
    assert ours.file_tag == inc.config.get_scale_method_from_config(theirs[inc.config.CfgStr.DEFAULT]).name
    for name, layer_type in PLACES:
        rules = inc.find_rules(theirs, name, layer_type)
        method = ours.for_node(name, layer_type)
        assert describe_rule(method.weight, inc.device) == describe_inc_rule(rules[inc.config.CfgStr.WEIGHT])
        assert describe_rule(method.activation, inc.device) == describe_inc_rule(rules[inc.config.CfgStr.ACTIVATION])


@ARITHMETICS
def test_scales_of_a_dict_form_equal_inc(as_on_cpu: bool, inc: IncScales):
    """A backoff bfloat16 cannot hold, per-channel weights for one class, fixed scales for one layer."""
    form = {
        "default": {
            "weight": {"rounding_method": "hw_aligned", "backoff": 0.3},
            "activation": {"rounding_method": "hw_aligned", "backoff": 0.7},
        },
        "layers": {
            "3": {
                "weight": {"scale_value_type": "fixed_value", "rounding_method": "scale_unit"},
                "activation": {"scale_value_type": "fixed_value", "rounding_method": "scale_unit"},
            }
        },
        "layer_types": {
            "RowParallelLinear": {"weight": {"granularity": "pcs", "rounding_method": "pow2", "backoff": 0.9}}
        },
    }
    for op in Op:
        nodes, weights = random_nodes(op)
        table = QuantConfig(scale_method=form).method_table
        ours = compute_scales(RankSet(0, 1, nodes), table, inc.device, weights=weights.get, as_on_cpu=as_on_cpu).nodes
        theirs = inc.compute(nodes, form, weights, as_on_cpu=as_on_cpu)
        assert {name: to_json(node) for name, node in ours.items()} == theirs


def test_module_classes_are_those_inc_knows(inc: IncScales):
    """The classes the oracle uses are in INC's table, with the op type we give them."""
    from neural_compressor.torch.algorithms.fp8_quant._core.patching_common import _mod_default_dict

    assert {name: _mod_default_dict[name].type for name in CLASS_OF_OP.values()} == {
        name: op.value for op, name in CLASS_OF_OP.items()
    }
