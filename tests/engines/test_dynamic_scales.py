"""Scales that the vLLM plugin takes from the values themselves, against INC's own calculators on a CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gaudi_calib.config.check import parse_quant_config
from gaudi_calib.engines.vllm_plugin import scales
from gaudi_calib.engines.vllm_plugin.scales import ScaleSource
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.fp8 import get_device
from gaudi_calib.scales.precision import BF16

pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")

from tests.oracles.inc_scales import IncScales

pytestmark = [pytest.mark.torch, pytest.mark.inc]

# Each of the activations that INC takes for dynamic quantization: per channel, and per tensor with every rounding.
METHODS = ("maxabs_pcs_pow2", "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw", "maxabs_pow2", "maxabs_arbitrary")


@pytest.fixture(params=["g2", "g3"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def open_source(root: Path, device: str, **content: object) -> ScaleSource:
    """Return the scales of a config that quantizes dynamically for `device`."""
    path = root / device / "inc_output"
    config = parse_quant_config(
        {"mode": "QUANTIZE", "dynamic_quantization": True, "dump_stats_path": str(path), **content}
    )
    return ScaleSource(Session(config, root / "quant.json"))


def make_values(seed: int, *shape: int) -> torch.Tensor:
    """Values of very different size, by row, column and block; some rows and columns are all zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(
        torch.randint(-20, 20, [n if i == d else 1 for i, n in enumerate(shape)], generator=generator)
        for d in range(len(shape))
    )
    values = torch.randn(shape, generator=generator) * torch.exp2(size.float())
    return (values * (torch.rand(shape[-2:], generator=generator).amax(-1, keepdim=True) < 0.99)).bfloat16()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "dim"), [((33, 64), -1), ((17, 4, 32), -1), ((9, 4, 32), 0)], ids=str)
def test_scales_are_those_of_inc(
    method: str, shape: tuple[int, ...], dim: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens, of tokens and heads, of the columns of a matmul's second input: bit for bit, in the same shape."""
    monkeypatch.setitem(scales.PRECISIONS, "BF16", replace(BF16, divides=True))
    source = open_source(tmp_path, device, scale_method=method)
    for seed in range(20):
        x = make_values(seed, *shape)
        expected = IncScales(get_device(device)).scale_dynamically(x, method, dim)
        found = source.scale_input(x, 1.0, "model.layers.0.mlp.down_proj", "RowParallelLinear", dim=dim)
        assert isinstance(found, torch.Tensor) and found.shape == expected.shape
        np.testing.assert_array_equal(found.numpy(), expected.float().numpy())


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    """They have a scale that can be divided by, one per tensor too, where INC's is 0 and gives NaN."""
    for method in METHODS:
        scale = open_source(tmp_path, "g3", scale_method=method).scale_input(torch.zeros(2, 3), 1.0, "lm_head", None)
        assert (torch.zeros(2, 3) / scale == 0).all()


def test_what_shares_one_scale_may_be_more_than_what_is_scaled(tmp_path: Path) -> None:
    """An expert's tokens have the scale of all tokens where there is one per tensor, and their own otherwise."""
    tokens = torch.tensor([[1.0, 2.0], [64.0, 3.0]])
    own, shared = (
        open_source(tmp_path, "g3", scale_method=method).scale_input(tokens[:1], 1.0, "moe_op", None, among=tokens)
        for method in ("maxabs_pcs_pow2", "maxabs_pow2")
    )
    assert (own.tolist(), shared.tolist()) == ([[2.0**-6]], 2.0**-1)


def test_methods_of_nodes_are_obeyed(tmp_path: Path) -> None:
    """One node per tensor among others per channel; backoffs are INC's own."""
    pts = {"granularity": "PTS", "scale_value_type": "MAXABS", "rounding_method": "POW2", "backoff": 0.125}
    pcs = {**pts, "granularity": "PCS"}
    method = {
        "default": {"weight": pcs, "activation": pcs},
        "layer_types": {"VLLMKVCache": {"weight": pts, "activation": pts}},
    }
    source = open_source(tmp_path, "g2", scale_method=method)
    x = torch.tensor([[120.0], [60.0]])
    assert source.scale_input(x, 1.0, "lm_head", "ParallelLMHead").tolist() == [[1.0], [0.5]]
    assert source.scale_input(x, 1.0, "k_cache", "VLLMKVCache").tolist() == 1.0
