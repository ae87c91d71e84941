"""Quantization `gaudi_fp8` in real vLLM engines on CPU: ranges against the torch engine, FP8 against Hugging Face.

Engines run in float32, where both sides compute the same up to the order of additions, so that
ranges agree to a bfloat16 step and FP8 results to almost every bit; one runs in bfloat16.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.checkpoints.plan import ModelPlan, plan_model
from gaudi_calib.config.file import write_quant_config
from gaudi_calib.config.methods import get_scale_method
from gaudi_calib.config.presets import DYNAMIC_BLOCKED_TYPES, measure_config, quant_config
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.fp8 import get_device
from gaudi_calib.ranges.derive import derive_world
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.store import write_rank_set, write_rank_sets
from gaudi_calib.runs.unify import Conversion, unify_dir
from gaudi_calib.scales.compute import compute_scales
from tests.support.reference_fp8 import Dynamic, compute_logprobs
from tests.support.tiny import make_tiny_model

pytest.importorskip("vllm")
from tests.oracles.vllm_engine import Answer, EngineTask, run_engines

pytestmark = [pytest.mark.torch, pytest.mark.vllm]

FLOAT32 = {"dtype": "float32"}
BF16_STEP = 2.0**-7  # the largest relative step between neighbouring bfloat16 values
# What bfloat16 arithmetic does to a maximum behind four layers; the largest seen is 4.5 %.
BF16_NOISE = 0.08
NOTHING_BLOCKED = {"blocklist": {"types": [], "names": []}}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a tiny checkpoint; vLLM's attention on CPU wants heads of at least 32 channels."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            changes = {"head_dim": 32} if name == "mixtral" else {}
            made[name] = make_tiny_model(name, tmp_path_factory.mktemp("vllm") / name, **changes)
        return made[name]

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Three prompts of 24, 40 and 57 token ids."""
    generator = np.random.default_rng(0)
    return [generator.integers(2, 300, size=size).tolist() for size in (24, 40, 57)]


class Measured:
    """Ranges of one model, as the vLLM engine wrote them and as the torch engine measures them."""

    def __init__(self, model: Path, root: Path, device: str, topology: Topology, dtype: str, prompts: list[list[int]]):
        self.plan: ModelPlan = plan_model(model)
        self.model, self.topology, self.device, self.prompts = model, topology, get_device(device), prompts
        self.directory = root / device
        self.directory.mkdir(parents=True)
        self.config = measure_config(self.plan.family, self.directory / "inc_output", **NOTHING_BLOCKED)
        path = root / f"maxabs_measure_{device}.json"
        write_quant_config(path, self.config)
        engine = {"dtype": dtype, "enable_expert_parallel": topology.expert_parallel}
        self.task = EngineTask(str(model), str(path), prompts, world=topology.world, saves=True, engine=engine)
        self.answer: Answer | None = None

    @property
    def found(self) -> list[RankSet[Node]]:
        return CalibrationDir(self.directory).read_world(self.topology.world)

    @property
    def expected(self) -> list[RankSet[Node]]:
        """Ranges of the same tokens: prompts and what was generated, but for the last, which no layer sees."""
        assert self.answer is not None
        sequences = [p + g[:-1] for p, g in zip(self.prompts, self.answer.generated, strict=True)]
        channels = measure_channels(self.model, sequences, worlds=[self.topology.world])
        return derive_world(channels, self.topology, self.device, self.config)


def measure_all(cases: Sequence[Measured]) -> None:
    for case, answer in zip(cases, run_engines([case.task for case in cases]), strict=True):
        case.answer = answer


@pytest.fixture(scope="session")
def one_rank(models, prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Measurements with one rank, each in an engine of its own."""
    root = tmp_path_factory.mktemp("one_rank")
    cases = {
        "llama": Measured(models("llama"), root / "llama", "g2", Topology(1), "float32", prompts),
        "mixtral": Measured(models("mixtral"), root / "mixtral", "g3", Topology(1), "float32", prompts),
        "qwen3": Measured(models("qwen3"), root / "qwen3", "g2", Topology(1), "bfloat16", prompts),
    }
    measure_all(list(cases.values()))
    return cases


@pytest.fixture(scope="session")
def two_ranks(models, prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Measurements with two ranks: processes of their own, tensor parallel and expert parallel."""
    root = tmp_path_factory.mktemp("two_ranks")
    cases = {
        "llama": Measured(models("llama"), root / "llama", "g2", Topology(2), "float32", prompts),
        "mixtral": Measured(models("mixtral"), root / "mixtral", "g3", Topology(2), "float32", prompts),
        "mixtral-ep": Measured(models("mixtral"), root / "ep", "g3", Topology(2, True), "float32", prompts),
    }
    measure_all(list(cases.values()))
    return cases


def compare_ranges(
    found: RankSet[Node], expected: RankSet[Node], tolerance: float, *, atol: float = 0.0
) -> Iterator[str]:
    """Yield what differs by more than `tolerance`; names, order and structure must be equal."""
    assert list(found.nodes) == list(expected.nodes)
    assert found.modules == expected.modules
    for name, node in found.nodes.items():
        other = expected.nodes[name]
        assert (node.outputs is None, node.weight is None) == (other.outputs is None, other.weight is None), name
        ours = [*node.inputs, *(node.outputs or ())]
        theirs = [*other.inputs, *(other.outputs or ())]
        assert len(ours) == len(theirs), name
        if node.weight is not None and other.weight is not None:
            np.testing.assert_array_equal(node.weight, other.weight, err_msg=name)
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if not np.allclose(mine, other, rtol=tolerance, atol=atol):
                yield f"{name}[{index}]: {mine} != {other}"


@pytest.mark.parametrize(
    ("case", "tolerance"), [("llama", BF16_STEP), ("mixtral", BF16_STEP), ("qwen3", BF16_NOISE)], ids=str
)
def test_one_rank_measures_what_the_torch_engine_measures(one_rank, case: str, tolerance: float):
    """Nodes, their order, modules never run, and every range, over prefill and decode; weights exactly."""
    measured = one_rank[case]
    assert list(compare_ranges(measured.found[0], measured.expected[0], tolerance)) == []
    assert measured.found[0].num_samples == 4  # forward calls: one prefills all prompts, three decode


@pytest.mark.parametrize("case", ["llama", "mixtral", "mixtral-ep"])
def test_every_rank_measures_its_own_part(two_ranks, case: str):
    """Two ranks, by heads and channels or by experts; partial products as INC reduces them."""
    measured = two_ranks[case]
    for found, expected in zip(measured.found, measured.expected, strict=True):
        assert list(compare_ranges(found, expected, BF16_STEP)) == []
    ranks = [[Path(name).name for name in names] for names in measured.answer.files]
    assert ranks[1] == [
        "inc_output_hooks_maxabs_1_2.json",
        "inc_output_hooks_maxabs_1_2.npz",
        "inc_output_hooks_maxabs_1_2_mod_list.json",
    ]


@pytest.mark.parametrize("case", ["llama", "mixtral", "mixtral-ep"])
def test_two_ranks_unify_to_what_one_rank_measures(one_rank, two_ranks, tmp_path: Path, case: str):
    """All but the sums of which each rank has a part, which one rank alone does not see."""
    conversion = Conversion(expert_parallel=case.endswith("-ep"))
    unify_dir(two_ranks[case].directory, 1, tmp_path, conversion=conversion)
    alone = one_rank[case.removesuffix("-ep")].found[0]
    unified = CalibrationDir(tmp_path).read_world(1)[0]
    different = list(compare_ranges(_drop_partial_sums(unified), _drop_partial_sums(alone), BF16_STEP))
    assert different == []


def _drop_partial_sums(ranks: RankSet[Node]) -> RankSet[Node]:
    def drop(name: str, node: Node) -> Node:
        partial = name.endswith("moe_op") or (node.weight is not None and node.outputs)
        return replace(node, outputs=node.outputs[1:]) if partial and node.outputs else node

    return replace(ranks, nodes={name: drop(name, node) for name, node in ranks.nodes.items()}, rank=0)


class Quantized:
    """A run directory with ranges (and scales), and what a Gaudi would make of it."""

    def __init__(
        self,
        model: Path,
        root: Path,
        device: str,
        method: str,
        prompts: list[list[int]],
        *,
        writes_scales: bool = False,
        factor: float = 1.0,
        world: int = 1,
        **content: object,
    ):
        """Measure `model` and compute its scales; those of qkv_proj's inputs are multiplied with `factor`.

        All ranks get the ranges of one, so that one computation predicts what they do together. `content` is that of
        the config; nothing is blocked by itself.
        """
        plan = plan_model(model)
        self.model, self.device, self.prompts = model, get_device(device), prompts
        directory = root / device
        directory.mkdir(parents=True)
        config = quant_config(plan.family, directory / "inc_output", method, **{**NOTHING_BLOCKED, **content})
        self.dynamic: Dynamic = None
        if config.dynamic_quantization:
            self.dynamic = "channel" if get_scale_method(method).is_dynamic_only else "tensor"
        path = root / f"maxabs_quant_{device}.json"
        write_quant_config(path, config)
        one = Topology(1)
        ranks = derive_world(measure_channels(model, prompts, worlds=[1]), one, self.device, config)[0]
        if not self.dynamic:
            write_rank_sets(directory, [replace(ranks, rank=rank, world=world) for rank in range(world)])
        scales = compute_scales(ranks, method, self.device, weights=lambda name: plan.read_rank_weight(name, 0, one))
        nodes = {name: _spoil(name, node, factor) for name, node in scales.nodes.items()}
        if writes_scales:
            write_rank_set(directory, replace(scales, nodes=nodes), method=method.upper())
        # Routers are of a class that INC does not patch.
        self.scales = {name: node for name, node in nodes.items() if not name.endswith("block_sparse_moe.gate")}
        self.task = EngineTask(str(model), str(path), prompts, world=world, engine=FLOAT32)
        self.answer: Answer | None = None

    def predict(self, *, quantized: bool = True) -> list[np.ndarray]:
        """Log-probabilities of the plain computation, over the engine's own tokens."""
        assert self.answer is not None
        sequences = [p + g[:-1] for p, g in zip(self.prompts, self.answer.generated, strict=True)]
        lengths = [len(prompt) for prompt in self.prompts]
        scales = self.scales if quantized else None
        return compute_logprobs(self.model, sequences, lengths, scales, self.device, dynamic=self.dynamic)


def _spoil(name: str, node: ScaleNode, factor: float) -> ScaleNode:
    if factor == 1.0 or not name.endswith("qkv_proj"):
        return node
    return replace(node, inputs=(node.inputs[0] * factor,))


@pytest.fixture(scope="session")
def quantized(models, prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quantized]:
    """Engines that quantize, one behind the other in one process."""
    root = tmp_path_factory.mktemp("quantized")

    def make(case: str, model: str, device: str, method: str, **options) -> Quantized:
        return Quantized(models(model), root / case, device, method, prompts, **options)

    def alone(case: str, model: str, device: str, method: str, **options) -> Quantized:
        return Quantized(models(model), root / case, device, method, prompts[-1:], **options)

    pcs = "act_maxabs_hw_weights_pcs_maxabs_pow2"
    cases = {
        "scale files": make("scale files", "llama", "g3", "maxabs_hw", writes_scales=True),
        "wrong scales": make("wrong scales", "llama", "g3", "maxabs_hw", writes_scales=True, factor=2.0**-5),
        "experts": make("experts", "mixtral", "g2", "maxabs_hw"),
        "per channel": make("per channel", "qwen3", "g2", pcs, writes_scales=True),
        "tied": make("tied", "llama-tied", "g2", "maxabs_pow2"),
        "dynamic": make("dynamic", "llama", "g3", "maxabs_pcs_pow2", blocklist={"types": list(DYNAMIC_BLOCKED_TYPES)}),
        "dynamic attention": alone("dynamic attention", "llama", "g2", "maxabs_pcs_pow2"),
        "dynamic tensors": alone(
            "dynamic tensors", "llama", "g3", "maxabs_pow2", dynamic_quantization=True, blocklist={"names": ["lm_head"]}
        ),
    }
    for case, answer in zip(cases.values(), run_engines([case.task for case in cases.values()]), strict=True):
        case.answer = answer
    parallel = make("two ranks", "llama", "g2", "maxabs_hw", world=2)
    (parallel.answer,) = run_engines([parallel.task])
    return cases | {"two ranks": parallel}


def find_distance(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Mean absolute difference of log-probabilities."""
    return float(np.mean([np.abs(logprobs - wanted).mean() for logprobs, wanted in zip(found, expected, strict=True)]))


@pytest.mark.parametrize(
    "case",
    [
        "scale files",
        "wrong scales",
        "experts",
        "per channel",
        "tied",
        "dynamic",
        "dynamic attention",
        "dynamic tensors",
        "two ranks",
    ],
)
def test_quantized_logprobs_are_those_of_a_plain_computation(quantized, case: str):
    """Prefill and decode, over the whole vocabulary, bit for bit at most positions; unquantized ones are far away.

    Where additions in another order push a value over a rounding boundary, its position and
    some later ones differ a little.
    """
    run = quantized[case]
    expected = run.predict()
    largest = [np.abs(found - wanted).max(-1) for found, wanted in zip(run.answer.logprobs, expected, strict=True)]
    assert np.median(np.concatenate(largest)) < 1e-4
    assert np.median([differences[-3:] for differences in largest]) < 1e-4  # decoded
    assert find_distance(run.answer.logprobs, expected) < 0.02
    assert find_distance(run.answer.logprobs, run.predict(quantized=False)) > 0.1


def test_wrong_scales_change_the_result(quantized):
    """An engine reads the scales that are there: saturated inputs are far from those of right scales."""
    right, wrong = quantized["scale files"], quantized["wrong scales"]
    size = min(len(logprobs) for logprobs in right.prompts)
    pairs = zip(right.answer.logprobs, wrong.answer.logprobs, strict=True)
    assert np.mean([np.abs(mine[:size] - other[:size]).mean() for mine, other in pairs]) > 0.1
