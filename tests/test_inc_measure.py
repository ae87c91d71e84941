"""The torch engine measures what INC itself measures of the same Hugging Face model, to the bf16 bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from inc_measure_oracle import Measured, fuse_measured, measure_with_inc
from tiny import CHECKPOINTS

from gaudi_calib.engines.base import plan_model
from gaudi_calib.engines.torch_stream import measure_channels
from gaudi_calib.fp8 import GAUDI3
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.shard import derive_rank

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")

# On a CPU, INC patches torch.nn.Linear only; Falcon's is a subclass.
PATCHED = [name for name, config in CHECKPOINTS.items() if config["model_type"] != "falcon"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Random token ids, shorter and longer than the sliding window and than phi3-longrope's original context."""
    random = np.random.default_rng(0)
    return [[1, *random.integers(3, 300, length - 1).tolist()] for length in (3, 17, 40, 90)]


@pytest.fixture(scope="module")
def inc_ranges(tiny_model: Callable[[str], Path], prompts: list[list[int]]) -> dict[str, dict[str, Measured]]:
    """INC's own ranges of each checkpoint, by Hugging Face module name."""
    return measure_with_inc({name: tiny_model(name) for name in PATCHED}, prompts)


@pytest.mark.parametrize("checkpoint", PATCHED)
def test_ranges_equal_those_inc_measures(
    checkpoint: str,
    inc_ranges: dict[str, dict[str, Measured]],
    tiny_model: Callable[[str], Path],
    prompts: list[list[int]],
) -> None:
    """Inputs and weights of every linear node, and row-parallel outputs at world 1, are equal in bf16."""
    directory, measured = tiny_model(checkpoint), inc_ranges[checkpoint]
    channels = measure_channels(directory, prompts, worlds=(1,), compute_dtype="bfloat16", batch_size=1)
    nodes = derive_rank(channels, 0, 1, GAUDI3).nodes
    ours, incs = {}, {}
    for name, linear in plan_model(directory).linears.items():
        # The output projection has no fused parts; transformers calls it lm_head or embed_out.
        fused = fuse_measured(measured, linear.modules or measured.keys() & {"lm_head", "embed_out"})
        node = nodes[name]
        ours[name] = [node.inputs[0].item(), node.weight.item()]
        incs[name] = [fused.input, fused.weight]
        if linear.op is Op.ROW_PARALLEL_LINEAR:
            ours[name].append(node.outputs[0].item())
            incs[name].append(fused.output)
    assert ours == incs


@pytest.mark.parametrize("checkpoint", PATCHED)
def test_every_layer_inc_patches_is_a_node(
    checkpoint: str, inc_ranges: dict[str, dict[str, Measured]], tiny_model: Callable[[str], Path]
) -> None:
    """No linear layer of the model is missing among the nodes (gemma2's output projection is none in vLLM)."""
    plan = plan_model(tiny_model(checkpoint))
    named = {module for linear in plan.linears.values() for module in linear.modules}
    assert set(inc_ranges[checkpoint]) - named <= {"lm_head", "embed_out"}
