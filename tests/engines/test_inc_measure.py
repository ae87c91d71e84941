"""The torch engine measures what INC itself measures of the same Hugging Face model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.fp8 import GAUDI3
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.derive import derive_rank
from gaudi_calib.ranges.topology import Topology
from tests.oracles.inc_measure import Job, Measured, fuse_measured, measure_with_inc
from tests.support.tiny import CHECKPOINTS, make_tiny_model

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")

pytestmark = [pytest.mark.torch, pytest.mark.inc]

Ranges = dict[str, list[float]]

FALCON = [name for name, config in CHECKPOINTS.items() if config["model_type"] == "falcon"]
# The distance of neighbouring bf16 values, relative to them, is at most this.
BF16_STEP = 2**-7


def make_prompts(checkpoint: str) -> list[list[int]]:
    """Random token ids, shorter and longer than the sliding window; for longrope, longer than its original context.

    Below it transformers rotates by the short factors, which vLLM does only if it serves no longer contexts.
    """
    random = np.random.default_rng(0)
    lengths = (66, 90) if checkpoint == "phi3-longrope" else (3, 17, 40, 90)
    return [random.integers(0, 300, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def inc_ranges(tiny_model: Callable[[str], Path]) -> dict[tuple[str, str], dict[str, Measured]]:
    """INC's own ranges by (checkpoint, data type) and Hugging Face module name.

    Falcon runs with SDPA attention: transformers' eager one adds ALiBi twice (5.19), and its
    softmax rounds to bf16.
    """
    jobs = {
        (name, dtype): Job(tiny_model(name), make_prompts(name), dtype, "sdpa" if name in FALCON else "eager")
        for name in CHECKPOINTS
        for dtype in ("bfloat16", "float32")
    }
    return measure_with_inc(jobs)


def pair_ranges(directory: Path, channels: ChannelRanges, measured: dict[str, Measured]) -> tuple[Ranges, Ranges]:
    """Return our and INC's input, weight and output range of every linear node (row parallel: at world 1)."""
    nodes = derive_rank(channels, 0, Topology(1), GAUDI3, outputs=True).nodes
    ours, incs = {}, {}
    for name, linear in plan_model(directory).linears.items():
        # The output projection has no fused parts; transformers calls it lm_head or embed_out.
        fused = fuse_measured(measured, linear.modules or measured.keys() & {"lm_head", "embed_out"})
        node = nodes[name]
        ours[name] = [node.inputs[0].item(), node.weight.item(), node.outputs[0].item()]
        incs[name] = [fused.input, fused.weight, fused.output]
    return ours, incs


@pytest.mark.parametrize("checkpoint", [name for name in CHECKPOINTS if name not in FALCON])
def test_ranges_in_bfloat16_equal_those_inc_measures(
    checkpoint: str,
    inc_ranges: dict[tuple[str, str], dict[str, Measured]],
    tiny_model: Callable[[str], Path],
) -> None:
    """Computed in bf16 one sequence at a time, ranges equal INC's to the bit."""
    directory = tiny_model(checkpoint)
    channels = measure_channels(
        directory, make_prompts(checkpoint), worlds=(1,), compute_dtype="bfloat16", batch_size=1, outputs=True
    )
    ours, incs = pair_ranges(directory, channels, inc_ranges[checkpoint, "bfloat16"])
    assert ours == incs


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_ranges_of_packed_float32_batches_are_those_inc_measures_in_float32(
    checkpoint: str,
    inc_ranges: dict[tuple[str, str], dict[str, Measured]],
    tiny_model: Callable[[str], Path],
) -> None:
    """By default, sequences packed into one batch, ranges are at most one bf16 step from INC's."""
    directory = tiny_model(checkpoint)
    channels = measure_channels(directory, make_prompts(checkpoint), worlds=(1, 2, 4), outputs=True)
    ours, incs = pair_ranges(directory, channels, inc_ranges[checkpoint, "float32"])
    for name in incs:
        np.testing.assert_allclose(ours[name], incs[name], rtol=BF16_STEP, err_msg=name)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_layer_inc_patches_is_a_node(
    checkpoint: str, inc_ranges: dict[tuple[str, str], dict[str, Measured]], tiny_model: Callable[[str], Path]
) -> None:
    """No linear layer of the model is missing among the nodes (gemma2's output projection is none in vLLM)."""
    plan = plan_model(tiny_model(checkpoint))
    named = {module for linear in plan.linears.values() for module in linear.modules}
    assert set(inc_ranges[checkpoint, "bfloat16"]) - named <= {"lm_head", "embed_out"}


def test_longrope_rotates_short_prompts_by_the_long_factors(tmp_path: Path) -> None:
    """vLLM takes the long factors for every prompt once it serves contexts beyond the original, its default.

    Source: vLLM `Phi3LongRoPEScaledRotaryEmbedding.use_long_rope`.
    """
    rope = CHECKPOINTS["phi3-longrope"]["rope_parameters"]
    make_tiny_model("phi3-longrope", tmp_path / "both")
    make_tiny_model("phi3-longrope", tmp_path / "long", rope_parameters={**rope, "short_factor": rope["long_factor"]})
    prompts = [list(range(40))]
    both, long = (
        derive_rank(measure_channels(tmp_path / name, prompts), 0, Topology(1), GAUDI3) for name in ("both", "long")
    )
    assert both.nodes == long.nodes
