"""INC itself loads our range files, computes the scales we compute, quantizes a model and runs it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.layout import DUMP_NAME, RankFile
from gaudi_calib.ranges.channels import ChannelRanges
from gaudi_calib.ranges.derive import derive_rank
from gaudi_calib.ranges.node import Node, Op, RankSet
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.store import read_scales, write_rank_set
from gaudi_calib.scales.compute import compute_scales
from tests.oracles.inc_quantize import Quantized, quantize_with_inc

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")

pytestmark = [pytest.mark.torch, pytest.mark.inc]

TOKENS = [1, 40, 7, 299, 55, 120, 18, 230, 91, 4, 76, 13]


class Run(NamedTuple):
    """One quantization by INC: what for, from which ranges, and where INC wrote its scales."""

    device: Device
    model_dir: Path
    ranges: RankSet[Node]
    directory: Path
    result: Quantized


@pytest.fixture(scope="module")
def channels(tiny_model: Callable[[str], Path]) -> ChannelRanges:
    """Ranges of a tiny Phi-3, whose Hugging Face modules carry vLLM's fused names."""
    return measure_channels(tiny_model("phi3"), [TOKENS, TOKENS[::-1]], worlds=(1,))


@pytest.fixture(scope="module", params=DEVICES.values(), ids=DEVICES)
def run(
    request: pytest.FixtureRequest,
    channels: ChannelRanges,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """INC's quantization of the model with the ranges we wrote.

    On a CPU INC knows no device to compute scales for and fails on a hardware-aligned
    method, unless `device_for_scales` names one.
    """
    device, directory = request.param, tmp_path_factory.mktemp("run")
    ranges = derive_rank(channels, 0, Topology(1), device)
    write_rank_set(directory, ranges)
    quant_config = directory / "quant.json"
    settings = {
        "mode": "QUANTIZE",
        "observer": "maxabs",
        "scale_method": "maxabs_hw",
        "allowlist": {"types": [], "names": []},
        "blocklist": {"types": [], "names": []},
        "dump_stats_path": str(directory / DUMP_NAME),
        "use_qdq": "True",
        "device_for_scales": device.inc_name,
    }
    quant_config.write_text(json.dumps(settings))
    return Run(
        device, tiny_model("phi3"), ranges, directory, quantize_with_inc(tiny_model("phi3"), quant_config, TOKENS)
    )


def test_inc_quantizes_every_linear_node(run: Run) -> None:
    """Each linear node of our files is a module that INC replaced, with its weight in FP8; there is no other."""
    assert sorted(run.result.patched) == sorted(plan_model(run.model_dir).linears)
    assert set(run.result.weight_dtypes) == {"torch.float8_e4m3fn"}


def test_the_quantized_model_still_works(run: Run) -> None:
    """Logits of the FP8 model are not those of the BF16 model, but close; ranges too small to be true part them.

    Random weights amplify rounding, so a trained model is closer than this one (0.94 and 0.95).
    """
    assert run.result.quantized != run.result.plain
    assert np.corrcoef(run.result.quantized, run.result.plain)[0, 1] > 0.9


def test_scales_equal_those_inc_computes(run: Run) -> None:
    """INC's own scale file, read with our reader, holds the scales we compute from the same ranges.

    A Hugging Face model has only plain linear layers, so INC's output scale of a row-parallel
    layer comes from another rule there and is not compared.
    """
    name = RankFile(method="MAXABS_HW", rank=0, world=1).name
    incs = read_scales(run.directory / name).nodes
    ours = compute_scales(run.ranges, "maxabs_hw", run.device, weights=lambda node: None, as_on_cpu=True).nodes
    linears = plan_model(run.model_dir).linears
    assert sorted(incs) == sorted(linears)
    for node, linear in linears.items():
        assert (node, ours[node].inputs, ours[node].weight) == (node, incs[node].inputs, incs[node].weight)
        if linear.op is not Op.ROW_PARALLEL_LINEAR:
            assert ours[node].outputs == incs[node].outputs
