"""Scales of whole ranks: INC's own files, errors, and what is read of the weights."""

import json

import numpy as np
import pytest

from gaudi_calib.config.methods import SCALE_METHODS
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.errors import ConfigError, IdleExpertError, RangeError
from gaudi_calib.fp8 import GAUDI2, GAUDI3, Device, get_device
from gaudi_calib.ranges import bf16
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import Node, Op, RankSet, ScaleNode, find_op
from gaudi_calib.scales.compute import compute_scales
from gaudi_calib.scales.optimal import choose_channel_scales, choose_tensor_scale, quantization_error
from gaudi_calib.scales.tensor import scale_channels
from tests.support import paths
from tests.support.scales import to_json as describe_scales
from tests.support.scales import to_rank

GOLDEN = paths.GOLDEN / "scales"


def read_golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def to_json(node: ScaleNode) -> dict:
    """Our scales as a JSON file holds them (keys are text)."""
    return json.loads(json.dumps(describe_scales(node)))


def rank_of(**nodes: Node) -> RankSet[Node]:
    return RankSet(0, 1, {name.replace("__", "."): node for name, node in nodes.items()})


def one(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def no_weights(name: str) -> None:
    raise AssertionError(f"the weight of {name} was read")


def dense_weights(name: str) -> np.ndarray | None:
    with np.load(GOLDEN / "llama_weights.npz") as arrays:
        return (arrays[name].astype(np.uint32) << 16).view(np.float32) if name in arrays else None


@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=lambda device: device.name)
@pytest.mark.parametrize("method", list(SCALE_METHODS))
def test_scales_equal_a_golden_file_of_each_method(method: str, device: Device):
    """Layer 0 of a llama, quantized by INC on a CPU: every number, weights included."""
    golden = read_golden("llama_all_methods.json")
    expected = golden["scales"][device.name][method]
    ranges = to_rank({name: golden["ranges"][name] for name in expected})
    ours = compute_scales(ranges, method, device, weights=dense_weights, as_on_cpu=True).nodes
    assert {name: to_json(node) for name, node in ours.items()} == expected


def test_channels_that_a_gaudi_scales_otherwise_than_inc_on_a_cpu():
    """Ten of the golden llama's; which, follows from the weights."""
    golden = read_golden("llama_all_methods.json")
    written = golden["scales"]["g2"]["MAXABS_PCS_POW2"]
    ranges = to_rank({name: golden["ranges"][name] for name in written})
    different = 0
    for name, node in compute_scales(ranges, "maxabs_pcs_pow2", GAUDI2, weights=dense_weights).nodes.items():
        weight = dense_weights(name)
        if weight is not None:
            largest = np.abs(weight).max(axis=1)
            on_cpu = written[name]["params"]["weight"]["0"]
            np.testing.assert_array_equal(round_up(largest / np.float32(120)), on_cpu)
            np.testing.assert_array_equal(round_up(largest * bf16.round_to_bf16(1 / 120)), node.weight.out_channels)
            different += np.count_nonzero(node.weight.out_channels != on_cpu)
    assert different == 10


def round_up(scales: np.ndarray) -> np.ndarray:
    """To powers of two, with a logarithm in bfloat16."""
    return np.exp2(np.ceil(bf16.round_to_bf16(np.log2(bf16.round_to_bf16(scales)))))


@pytest.mark.parametrize("name", ["mixtral_maxabs_hw", "deepseek_maxabs_hw", "llama_g3_maxabs_hw"])
def test_scales_equal_golden_files_of_whole_models(name: str):
    """Routers, fused experts and their zero inputs, latent attention; garbage in unused ranges is ignored."""
    golden = read_golden(f"{name}.json")
    ((device, methods),) = golden["scales"].items()
    ranges = to_rank(golden["ranges"])
    ours = compute_scales(ranges, "maxabs_hw", get_device(device), weights=no_weights, as_on_cpu=True).nodes
    assert list(ours) == list(methods["MAXABS_HW"])
    assert {name: to_json(node) for name, node in ours.items()} == methods["MAXABS_HW"]


def test_rank_world_and_modules_are_kept():
    """The scale file of a rank is of that rank; modules that never ran stay listed."""
    ranges = RankSet(3, 8, {"k_cache": Node((one(1.0),))}, ("k_cache", "softmax"), 12)
    scales = compute_scales(ranges, "maxabs_hw", GAUDI2, weights=no_weights)
    assert (scales.rank, scales.world, scales.modules, scales.num_samples) == (3, 8, ("k_cache", "softmax"), None)


def test_a_weight_without_a_range_is_read():
    """`measure_exclude` can leave weights unmeasured; the largest bfloat16 value counts."""
    weight = np.array([[0.1, -3.0], [1.0, 2.0]], dtype=np.float32)
    without, measured = Node((one(1.0),)), Node((one(1.0),), None, one(3.0))
    ours = compute_scales(rank_of(lm_head=without), "maxabs_arbitrary", GAUDI3, weights={"lm_head": weight}.get)
    assert ours == compute_scales(rank_of(lm_head=measured), "maxabs_arbitrary", GAUDI3, weights=no_weights)


def test_fixed_methods_need_no_ranges():
    """UNIT_SCALE and HW_ALIGNED_SINGLE_SCALE do not look at ranges, not even at NaN."""
    node = Node((one(np.nan),), None, one(0.0))
    assert compute_scales(rank_of(gate=node), "unit_scale", GAUDI2, weights=no_weights).nodes["gate"] == ScaleNode(
        (1.0,), (1.0,), 1.0
    )
    single = compute_scales(rank_of(matmul_qk=Node(())), "hw_aligned_single_scale", GAUDI3, weights=no_weights)
    assert single.nodes["matmul_qk"] == ScaleNode((128.0, 128.0), (16384.0,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 3.4e38], ids=str)
def test_a_range_that_is_no_maximum_is_refused_with_its_node(value: float):
    """NaN, inf, a negative number, and one that bfloat16 rounds to inf."""
    ranges = rank_of(layers__0__k_cache=Node((one(1.0),)), layers__1__k_cache=Node((one(value),)))
    with pytest.raises(RangeError, match=r"inputs\[0\] of node 'layers\.1\.k_cache'"):
        compute_scales(ranges, "maxabs_hw", GAUDI2, weights=no_weights)


def test_a_block_matmul_without_outputs_is_a_plain_one():
    """As INC before 1.24 measured it: published files of that time have these scales."""
    ranges = rank_of(impl__batch2block_matmul=Node((one(1.0), one(3.5))), impl__matmul_qk=Node((one(1.0), one(3.5))))
    block, plain = compute_scales(ranges, "maxabs_hw", GAUDI3, weights=no_weights).nodes.values()
    assert block == plain == ScaleNode((2.0**-6, 2.0**-5), (2.0**-11,), None)


@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_arbitrary"])
@pytest.mark.parametrize("value", [0.0, 2.0**-130], ids=["zero", "underflow"])
def test_a_scale_of_zero_is_refused(method: str, value: float):
    """It would divide by zero when serving; a hardware-aligned method has a smallest scale instead."""
    ranges = rank_of(k_cache=Node((one(value),)))
    with pytest.raises(RangeError, match=r"inputs\[0\] of node 'k_cache'"):
        compute_scales(ranges, method, GAUDI2, weights=no_weights, allows_idle=True)
    assert compute_scales(ranges, "maxabs_hw", GAUDI2, weights=no_weights).nodes["k_cache"].inputs == (2**-8,)


@pytest.mark.parametrize("op", ["moe_op", "MoeOp", "hpu_fused_moe"])
@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_arbitrary"])
def test_idle_experts_are_refused_or_get_what_inc_writes(method: str, op: str):
    """All of them are counted; on request their scale is 0; a hardware-aligned method has a smallest one."""
    layer = Node((one(1.0),), (one(1.0), one(2.0), one(0.0), one(0.0)))
    ranges = RankSet(0, 1, {f"layers.{index}.experts.{op}": layer for index in range(2)})
    with pytest.raises(IdleExpertError, match="no token would get a scale of 0: 4 in 2 layers"):
        compute_scales(ranges, method, GAUDI2, weights=no_weights)
    allowed = compute_scales(ranges, method, GAUDI2, weights=no_weights, allows_idle=True)
    assert allowed.nodes[f"layers.1.experts.{op}"].inputs[2:] == (0.0, 0.0)
    aligned = compute_scales(ranges, "maxabs_hw", GAUDI2, weights=no_weights)
    assert aligned.nodes[f"layers.1.experts.{op}"].inputs[2:] == (2**-8, 2**-8)


@pytest.mark.parametrize("value", [2.0**-130, float("nan")], ids=["underflow", "nan"])
def test_an_expert_that_saw_tokens_is_not_idle(value: float):
    """Ranges that are wrong for another reason are refused whatever is allowed."""
    ranges = RankSet(0, 1, {"experts.moe_op": Node((one(1.0),), (one(1.0), one(value)))})
    with pytest.raises(RangeError, match=r"outputs\[1\] of node"):
        compute_scales(ranges, "maxabs_pow2", GAUDI2, weights=no_weights, allows_idle=True)


def test_only_the_dummy_input_of_an_expert_may_be_zero():
    """Its scale is 0, as INC writes it; a weight of zeros is still refused."""
    name = "experts.moe_op.w2_list.7"
    scales = compute_scales(
        RankSet(0, 1, {name: Node((one(0.0),), None, one(1.0))}), "maxabs_pow2", GAUDI2, weights=no_weights
    )
    assert scales.nodes[name] == ScaleNode((0.0,), (0.0,), 2**-6)
    with pytest.raises(RangeError, match="weight of node"):
        compute_scales(
            RankSet(0, 1, {name: Node((one(0.0),), None, one(0.0))}), "maxabs_pow2", GAUDI2, weights=no_weights
        )


@pytest.mark.parametrize(
    ("name", "node", "part"),
    [
        pytest.param("matmul_qk", Node((one(1.0),)), r"inputs\[1\]", id="matmul-one-input"),
        pytest.param(
            "fused_scaled_dot_product_attention",
            Node((one(1.0),) * 3, (one(1.0),)),
            r"outputs\[1\]",
            id="sdpa-no-softmax-maximum",
        ),
        pytest.param("softmax", Node((one(1.0),)), r"outputs\[0\]", id="softmax-no-output"),
        pytest.param("moe_op", Node((one(1.0),)), r"outputs\[0\]", id="moe-no-output"),
    ],
)
def test_a_missing_range_is_named(name: str, node: Node, part: str):
    """The error says which of the node's ranges is missing."""
    with pytest.raises(RangeError, match=f"no range {part}"):
        compute_scales(RankSet(0, 1, {name: node}), "maxabs_hw", GAUDI2, weights=no_weights)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        pytest.param(None, "no weight", id="missing"),
        pytest.param(np.ones(4, dtype=np.float32), "1 dimensions", id="vector"),
        pytest.param(np.array([[1.0, np.nan]], dtype=np.float32), "NaN", id="nan"),
    ],
)
@pytest.mark.parametrize("method", ["maxabs_hw_opt_weight", "act_maxabs_hw_weights_pcs_maxabs_pow2"])
def test_an_unusable_weight_is_refused_with_its_node(method: str, weight: np.ndarray | None, message: str):
    """Methods that read weights say which one is bad."""
    ranges = rank_of(mlp__gate=Node((one(1.0),), None, one(1.0)))
    with pytest.raises(RangeError, match=message) as error:
        compute_scales(ranges, method, GAUDI2, weights=lambda _: weight)
    assert "mlp.gate" in str(error.value)


def test_weights_are_rounded_to_bfloat16_first():
    """A float32 checkpoint is served in bfloat16: its scales are those of the rounded weight."""
    weight = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    ranges = rank_of(gate=Node((one(1.0),), None, one(4.0)))
    for method in ("act_maxabs_pow2_weights_pcs_opt_pow2", "maxabs_pow2_opt_weight", "maxabs_pcs_pow2"):
        ours = compute_scales(ranges, method, GAUDI3, weights=lambda _: weight).nodes["gate"]
        rounded = compute_scales(ranges, method, GAUDI3, weights=lambda _: bf16.round_to_bf16(weight)).nodes["gate"]
        assert to_json(ours) == to_json(rounded)


def test_a_channel_of_zeros_gets_the_smallest_normal_scale():
    """Padded rows of the vocabulary: 2**-126, on both devices."""
    weight = np.array([[0.0, 0.0], [1.0, -2.0]], dtype=np.float32)
    for device, scale in ((GAUDI2, 2.0**-5), (GAUDI3, 2.0**-6)):
        assert scale_channels(weight, SCALE_METHODS["MAXABS_PCS_POW2"].weight, device).tolist() == [2.0**-126, scale]


@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=lambda device: device.name)
def test_table_lookups_equal_the_direct_computation(device: Device):
    """The fast search picks the scale that the error of each candidate, computed directly, picks."""
    random = np.random.default_rng(0)
    candidates = tuple(2.0**k for k in range(-8, 3))
    for _ in range(50):
        spread = 2.0 ** random.uniform(-6, 6)
        weight = bf16.round_to_bf16(random.standard_normal((6, 48)) * spread)
        norms = [bf16.round_to_bf16(np.linalg.norm(quantization_error(weight, scale, device))) for scale in candidates]
        best = candidates[len(norms) - 1 - int(np.argmin(norms[::-1]))]  # of equals the last
        assert choose_tensor_scale(weight, candidates, device) == best
        reference = np.exp2(random.integers(-6, 3, 6)).astype(np.float32)
        sums = [
            np.square(quantization_error(weight, reference[:, None] * np.float32(scale), device))
            for scale in candidates
        ]
        errors = np.array([bf16.round_to_bf16(bf16.round_to_bf16(squares).sum(axis=1)) for squares in sums])
        chosen = np.array(candidates, dtype=np.float32)[errors.argmin(axis=0)]  # of equals the first
        np.testing.assert_array_equal(choose_channel_scales(weight, reference, candidates, device), chosen * reference)


def test_long_weights_are_searched_in_pieces(monkeypatch):
    """The piece size does not change the result."""
    weight = bf16.round_to_bf16(np.random.default_rng(0).standard_normal((40, 64)))
    reference = np.full(40, 2.0**-6, dtype=np.float32)
    factors = (0.25, 0.5, 1.0, 2.0)
    whole = choose_channel_scales(weight, reference, factors, GAUDI3), choose_tensor_scale(weight, factors, GAUDI3)
    monkeypatch.setattr("gaudi_calib.scales.optimal._CHUNK", 150)
    pieces = choose_channel_scales(weight, reference, factors, GAUDI3), choose_tensor_scale(weight, factors, GAUDI3)
    np.testing.assert_array_equal(whole[0], pieces[0])
    assert whole[1] == pieces[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.qkv_proj", "QKVParallelLinear"),
        ("model.layers.0.mlp.gate_up_proj", "MergedColumnParallelLinear"),
        ("model.layers.0.mlp.gate", "ReplicatedLinear"),
        ("model.layers.0.experts.moe_op.w13_list.11", "MoeMatmul"),
        ("model.layers.0.attn.impl.latent_cache_k", "VLLMKVCache"),
        ("model.layers.0.experts.moe_op", "VllmMixtureOfExpertsOp"),
        ("lm_head", "ParallelLMHead"),
        ("model.layers.0.mlp.mystery", None),
    ],
)
def test_module_classes_follow_from_names(name: str, expected: str | None):
    """The classes of vLLM's modules, None where a name does not tell."""
    assert find_layer_type(name, find_op(name, Node(()))) == expected


def test_layer_types_choose_the_method_by_class():
    """By the derived class, or by the one the caller gives; an unknown class is an error, not the default."""
    form = {
        "default": {"weight": {"rounding_method": "pow2"}, "activation": {"rounding_method": "pow2"}},
        "layer_types": {"Matmul": {"activation": {"backoff": 0.25}}, "Mystery": {"activation": {"backoff": 0.5}}},
    }
    table = QuantConfig(scale_method=form).method_table
    ranges = rank_of(matmul_qk=Node((one(240.0), one(240.0))), mystery=Node((one(240.0),), None, one(240.0)))
    with pytest.raises(ConfigError, match="'mystery'"):
        compute_scales(ranges, table, GAUDI2, weights=no_weights)
    scales = compute_scales(ranges, table, GAUDI2, weights=no_weights, layer_types={"mystery": "Mystery"}).nodes
    assert (scales["matmul_qk"].inputs, scales["mystery"].inputs) == ((4.0, 4.0), (2.0,))


@pytest.mark.parametrize("method", ["maxabs_hw", "maxabs_pow2", "maxabs_arbitrary", "maxabs_pow2_opt_weight"])
def test_nodes_scaled_together_equal_nodes_scaled_alone(method: str):
    """Hundreds of nodes of all operations and shapes, with several channels here and there, in any order."""
    random = np.random.default_rng(5)
    forms = [("qkv_proj", 1, None, True), ("o_proj", 1, 2, True), ("matmul_qk", 2, None, False)]
    forms += [("batch2block_matmul", 2, 1, False), ("k_cache", 1, None, False), ("softmax", 1, 1, False)]
    forms += [
        ("fused_scaled_dot_product_attention", 3, 2, False),
        ("moe_op", 1, 9, False),
        ("w2_list.3", 1, None, True),
    ]
    nodes = {}
    for index in random.integers(len(forms), size=300).tolist():
        name, inputs, outputs, has_weight = forms[index]
        parts = [random.lognormal(0, 3, random.integers(1, 3)).astype(np.float32) for _ in range(20)]
        nodes[f"layers.{len(nodes)}.{name}"] = Node(
            tuple(parts[:inputs]),
            None if outputs is None else tuple(parts[4 : 4 + outputs]),
            parts[-1] if has_weight else None,
        )
    weights = {name: random.standard_normal((3, 4)).astype(np.float32) for name in nodes}.get
    together = compute_scales(RankSet(0, 1, nodes), method, GAUDI3, weights=weights).nodes
    assert list(together) == list(nodes)
    for name, node in nodes.items():
        alone = compute_scales(RankSet(0, 1, {name: node}), method, GAUDI3, weights=weights).nodes
        assert repr(together[name]) == repr(alone[name])


def test_every_op_has_a_class():
    """A new op type cannot be forgotten."""
    assert all(find_layer_type("lm_head", op) for op in Op)
