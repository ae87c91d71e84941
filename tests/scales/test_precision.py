"""The arithmetic of scales equals torch's on the CPU, over every bfloat16 and every float16 value."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.scales.precision import BF16, FP16, FP32, Precision


class Values(NamedTuple):
    """All values of a number format that are finite and not negative (of float32, as many random ones)."""

    precision: Precision
    numbers: np.ndarray
    tensor: torch.Tensor


@pytest.fixture(params=[BF16, FP16, FP32], ids=lambda precision: precision.dtype)
def values(request) -> Values:
    numbers = {
        BF16: (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32),
        FP16: np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32),
        FP32: np.random.default_rng(0).integers(0, 0x7F800000, 32768, dtype=np.uint32).view(np.float32),
    }[request.param]
    return Values(request.param, numbers, torch.from_numpy(numbers.copy()).to(getattr(torch, request.param.dtype)))


def test_rounding_equals_torch(values: Values):
    """A float32 on either side of every value and beyond the largest; what is a value already stays."""
    precision, numbers, tensor = values
    np.testing.assert_array_equal(precision.round(numbers), numbers)
    with np.errstate(over="ignore"):
        moved = np.concatenate([numbers * np.float32(1 + 2.0**-k) for k in (8, 9, 11, 12, 23)]).astype(np.float32)
    moved = np.concatenate([moved, -moved, [np.float32(70000), np.float32(np.inf)]]).astype(np.float32)
    np.testing.assert_array_equal(precision.round(moved), torch.from_numpy(moved).to(tensor.dtype).float().numpy())
    assert np.isnan(precision.round(np.float32(np.nan)))


@pytest.mark.parametrize("backoff", [0.25, 0.5, 1.0, 0.3, 0.1, 1 / 3])
@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=lambda device: device.name)
def test_division_equals_torch(device, backoff: float, values: Values):
    """Divisors that the format can hold and those it cannot; vectors and single values."""
    divisor = device.fullscale * backoff
    ours = values.precision.divide(values.numbers, divisor)
    np.testing.assert_array_equal(ours, (values.tensor / divisor).float().numpy())
    singles = [(values.tensor[index] / divisor).item() for index in range(0, len(ours), 97)]
    assert ours[::97].tolist() == singles


@pytest.mark.parametrize("backoff", [0.25, 0.5, 1.0, 0.3])
@pytest.mark.parametrize("device", [GAUDI2, GAUDI3], ids=lambda device: device.name)
def test_a_gaudi_multiplies_by_a_rounded_reciprocal_where_a_cpu_divides(device, backoff: float, values: Values):
    """Over every value, as torch computes either."""
    divisor = device.fullscale * backoff
    reciprocal = torch.ones((), dtype=values.tensor.dtype) / divisor
    on_card = values.precision.divide_by_constant(values.numbers, divisor)
    np.testing.assert_array_equal(on_card, (values.tensor * reciprocal).float().numpy())
    on_cpu = replace(values.precision, divides=True).divide_by_constant(values.numbers, divisor)
    np.testing.assert_array_equal(on_cpu, (values.tensor / divisor).float().numpy())
    assert (on_card != on_cpu).any()


def test_products_and_differences_equal_torch(values: Values):
    """Each value with a random other one."""
    precision, numbers, tensor = values
    order = np.random.default_rng(0).permutation(len(numbers))
    other = tensor[torch.from_numpy(order)]
    np.testing.assert_array_equal(precision.multiply(numbers, numbers[order]), (tensor * other).float().numpy())
    np.testing.assert_array_equal(precision.subtract(numbers, numbers[order]), (tensor - other).float().numpy())


@pytest.mark.parametrize("values", [BF16, FP16], indirect=True, ids=lambda precision: precision.dtype)
def test_logarithms_equal_torch(values: Values):
    """log2, and ceil of it, of every value."""
    logs = torch.log2(values.tensor)
    ours = values.precision.log2(values.numbers)
    np.testing.assert_array_equal(ours, logs.float().numpy())
    np.testing.assert_array_equal(np.ceil(ours), torch.ceil(logs).float().numpy())


@pytest.mark.parametrize("values", [BF16], indirect=True, ids=lambda precision: precision.dtype)
def test_no_logarithm_depends_on_the_library(values: Values):
    """None lies so close to the middle of two values that a float32 error could turn it."""
    exact = np.log2(values.numbers[1:].astype(np.float64))
    for error in (-(2.0**-22), 2.0**-22):
        np.testing.assert_array_equal(values.precision.round(exact * (1 + error)), values.precision.round(exact))
