"""bfloat16 arithmetic equals torch's on the CPU, over every bfloat16 value."""

import numpy as np
import pytest
import torch

from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.ranges import bf16

VALUES = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)  # all finite, not negative
TENSOR = torch.from_numpy(VALUES.copy()).to(torch.bfloat16)


def test_the_values_are_all_finite_bfloat16_ones():
    """Zero, 127 subnormals, 32,512 normals."""
    assert len(VALUES) == 32640
    np.testing.assert_array_equal(TENSOR.float().numpy(), VALUES)


@pytest.mark.parametrize("bits", [0x7FFF, 0x8000, 0x8001, 0x0001, 0xFFFF], ids=hex)
def test_rounding_equals_torch(bits: int):
    """Below, at and above the middle of each two neighbours, overflow and signs included."""
    x = ((np.arange(0x7F80, dtype=np.uint32) << 16) | bits).view(np.float32)
    for values in (x, -x):
        np.testing.assert_array_equal(
            bf16.round_to_bf16(values), torch.from_numpy(values).to(torch.bfloat16).float().numpy()
        )


def test_rounding_keeps_nan_inf_and_shape():
    """NaN does not become inf, whatever its payload."""
    payload = np.array([0x7F800001, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(bf16.round_to_bf16(payload)).all()
    assert bf16.round_to_bf16(np.array([[np.inf, -np.inf]])).tolist() == [[np.inf, -np.inf]]
    assert bf16.round_to_bf16(np.float32(1.001)).shape == ()


@pytest.mark.parametrize("backoff", [0.25, 0.5, 1.0, 0.3, 0.1, 1 / 3])
@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=lambda device: device.name)
def test_division_equals_torch(device, backoff: float):
    """Divisors that bfloat16 can hold and those it cannot; vectors and single values."""
    divisor = device.fullscale * backoff
    ours = bf16.divide(VALUES, divisor)
    np.testing.assert_array_equal(ours, (TENSOR / divisor).float().numpy())
    singles = [(TENSOR[index] / divisor).item() for index in range(0, len(VALUES), 97)]
    assert ours[::97].tolist() == singles


def test_products_and_differences_equal_torch():
    """Each value with a random other one."""
    order = np.random.default_rng(0).permutation(len(VALUES))
    other = torch.from_numpy(VALUES[order]).to(torch.bfloat16)
    np.testing.assert_array_equal(bf16.multiply(VALUES, VALUES[order]), (TENSOR * other).float().numpy())
    np.testing.assert_array_equal(bf16.subtract(VALUES, VALUES[order]), (TENSOR - other).float().numpy())


def test_logarithms_equal_torch():
    """log2, and ceil of it, of every value."""
    logs = torch.log2(TENSOR)
    np.testing.assert_array_equal(bf16.log2(VALUES), logs.float().numpy())
    np.testing.assert_array_equal(np.ceil(bf16.log2(VALUES)), torch.ceil(logs).float().numpy())


def test_no_logarithm_depends_on_the_library():
    """None lies so close to the middle of two bfloat16 values that a float32 error could turn it."""
    exact = np.log2(VALUES[1:].astype(np.float64))
    neighbours = [np.log2(VALUES[1:].astype(np.float64)) * (1 + error) for error in (-(2.0**-22), 2.0**-22)]
    for moved in neighbours:
        np.testing.assert_array_equal(bf16.round_to_bf16(moved), bf16.round_to_bf16(exact))
