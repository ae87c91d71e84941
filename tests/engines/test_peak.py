"""The largest magnitude of a tensor, however it is taken, against `abs().amax()`."""

import numpy as np
import pytest
import torch

from gaudi_calib.engines.observe.peak import Peak, max_magnitude, max_per_head
from gaudi_calib.ranges.bf16 import round_to_bf16

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [None, 0, -1, (0,), (1, 2), (0, 2)], ids=str)
def test_magnitudes_over_any_dimensions(dims: int | tuple[int, ...] | None, dtype: torch.dtype):
    """In memory order or not, and where the largest is negative."""
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (x, -x, x.transpose(0, 1), x.abs().neg()):
        expected = tensor.abs().amax() if dims is None else tensor.abs().amax(dims)
        assert torch.equal(max_magnitude(tensor, dims), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_never_dropped(dtype: torch.dtype):
    """NaN is above infinity, infinity above all numbers; no sign matters."""
    columns = [[1.0, float("nan")], [float("-inf"), 2.0], [-0.0, 0.0], [float("nan"), float("inf")], [-3.0, 2.0]]
    x = torch.tensor(columns, dtype=dtype).T
    for tensor in (x, -x):
        found = max_magnitude(tensor, 0)
        np.testing.assert_array_equal(found.float().numpy(), [np.nan, np.inf, 0.0, np.nan, 3.0])
        assert max_magnitude(tensor).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_in_either_memory_order(dtype: torch.dtype):
    """Heads that lie behind each other, and heads whose tokens do."""
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.abs().amax((1, 2))
    assert torch.equal(max_per_head(x), expected)
    assert torch.equal(max_per_head(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)


def test_a_peak_keeps_the_largest_of_all_it_saw():
    """Per channel or as a whole; an empty tensor changes nothing, NaN stays for good, `reset` forgets it."""
    peak = Peak()
    assert not peak.is_seen and peak.is_finite and peak.to_range().tolist() == [0.0]
    peak.observe(torch.empty(0, 2), 0)
    assert not peak.is_seen
    peak.observe(torch.tensor([[1.0, -4.0], [2.0, 3.0]]), 0)
    peak.observe(torch.tensor([[-2.5, 0.0]], dtype=torch.bfloat16), 0)
    assert peak.to_array().tolist() == [2.5, 4.0] and peak.to_array().dtype == np.float32
    peak.take(torch.tensor([float("nan"), 1.0]))
    peak.take(torch.tensor([5.0, 5.0]))
    assert not peak.is_finite and np.isnan(peak.to_array()[0])
    peak.reset()
    peak.observe(torch.tensor([[-1.2345]]))
    assert peak.to_array().shape == peak.to_range().shape == (1,)
    assert peak.to_range() == round_to_bf16(np.array([1.2345], np.float32)) != peak.to_array()
