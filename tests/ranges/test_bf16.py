"""Rounding to bfloat16 equals torch's on the CPU, over every bfloat16 value."""

import numpy as np
import pytest
import torch

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
