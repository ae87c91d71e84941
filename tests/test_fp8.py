"""Devices and the FP8 cast."""

import numpy as np
import pytest
import torch

from gaudi_calib.engines.observe.fp8_cast import pass_through, quantize
from gaudi_calib.errors import UsageError
from gaudi_calib.fp8 import DEVICES, GAUDI2, GAUDI3, Device, get_device
from gaudi_calib.scales.cast import cast_to_fp8


@pytest.fixture(params=[GAUDI2, GAUDI3], ids=lambda device: device.name)
def device(request) -> Device:
    return request.param


def fp8_grid(device: Device) -> np.ndarray:
    """All finite FP8 values of the device, from the 256 codes: bias 7, three fraction bits."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    return np.unique(values[np.abs(values) <= device.fullscale])


def torch_cast(x: np.ndarray, device: Device) -> np.ndarray:
    clamped = torch.from_numpy(x).clamp(-device.fullscale, device.fullscale)
    return clamped.to(torch.float8_e4m3fn).float().numpy()


@pytest.mark.parametrize(("name", "expected"), [("g2", GAUDI2), ("G3", GAUDI3), ("GAUDI2", GAUDI2), ("gaudi3", GAUDI3)])
def test_devices_are_found_by_both_names_in_any_case(name: str, expected: Device):
    """`g2` and INC's `GAUDI2` are the same device."""
    assert get_device(name) is expected


def test_an_unknown_device_is_refused_with_the_choices():
    """The message names the devices there are."""
    with pytest.raises(UsageError, match=r"g2 .*g3"):
        get_device("h100")


def test_free_scales_are_those_of_inc():
    """Multiples of 16 on Gaudi 2, powers of two on Gaudi 3, the single fixed scale first."""
    assert GAUDI2.free_scales == (16.0, 1.0, 0.0625, 0.00390625)
    assert GAUDI3.free_scales == tuple(2.0**k for k in range(7, -56, -1))
    assert set(DEVICES) == {"g2", "g3"}


def test_every_fp8_value_casts_to_itself(device: Device):
    """The grid of the device, subnormals and zero included, is unchanged."""
    grid = fp8_grid(device)
    assert len(grid) == {"g2": 2 * 119 + 1, "g3": 2 * 126 + 1}[device.name]
    np.testing.assert_array_equal(cast_to_fp8(grid, device), grid)


def test_every_bfloat16_value_casts_as_in_torch(device: Device):
    """All 65,280 finite values: rounding, subnormals, saturation."""
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(cast_to_fp8(values, device), torch_cast(values, device))


def test_ties_round_to_even(device: Device):
    """The middle of two neighbours goes to the one with an even fraction; a float32 step aside, to the nearer."""
    grid = fp8_grid(device)
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    np.testing.assert_array_equal(cast_to_fp8(middles, device), torch_cast(middles, device))
    np.testing.assert_array_equal(cast_to_fp8(np.nextafter(middles, np.float32(np.inf)), device), grid[1:])
    np.testing.assert_array_equal(cast_to_fp8(np.nextafter(middles, np.float32(-np.inf)), device), grid[:-1])


@pytest.mark.parametrize("value", [1e6, np.inf, 3e38])
def test_large_values_saturate(value: float, device: Device):
    """No value becomes NaN or inf."""
    assert cast_to_fp8(np.array([value, -value]), device).tolist() == [device.fullscale, -device.fullscale]


def test_nan_stays_nan_and_shapes_are_kept(device: Device):
    """A NaN is not hidden by saturation; a scalar gives a scalar."""
    assert np.isnan(cast_to_fp8(np.array([[np.nan]]), device)).all()
    assert cast_to_fp8(np.array([[0.3]]), device).shape == (1, 1)
    assert np.shape(cast_to_fp8(np.float32(0.3), device)) == ()


def test_all_codes_decode_as_in_torch(device: Device):
    """All 256 codes. Gaudi 3 is torch's `fn` type; on Gaudi 2 the codes of the top exponent stand for inf and NaN."""
    values = np.array([device.decode(code) for code in range(256)], dtype=np.float32)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    if device is GAUDI2:
        top = (np.arange(256) & 0x78) == 0x78
        numbers = (np.arange(256) & 0x7F) == 0x78
        expected = np.where(top, np.where(numbers, np.copysign(np.inf, expected), np.nan), expected)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.signbit(values[:1]), [False])
    assert np.signbit(values[0x80])


def test_decoded_values_are_the_grid_of_the_cast(device: Device):
    """Every value of a code is left alone, and no other value comes out of the cast."""
    values = np.array([device.decode(code) for code in range(256)])
    np.testing.assert_array_equal(np.unique(values[np.isfinite(values)]), fp8_grid(device))


def test_tensors_cast_as_arrays(device: Device):
    """All bfloat16 values, and ties with their float32 neighbours; signs of zero, saturation, NaN."""
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    grid = fp8_grid(device)
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    for x in (values, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))):
        found = quantize(torch.from_numpy(x), 1.0, device).numpy()
        with np.errstate(invalid="ignore"):  # NaN
            expected = cast_to_fp8(x, device)
        np.testing.assert_array_equal(found, expected)
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fp8_values_fit_the_model_dtypes(device: Device, dtype: torch.dtype):
    """Quantized tensors keep their dtype and lose nothing by it."""
    x = torch.linspace(-600, 600, 4001).to(dtype)
    found = quantize(x, 1.0, device)
    assert found.dtype is dtype
    np.testing.assert_array_equal(found.float().numpy(), cast_to_fp8(x.float().numpy(), device))


def test_passing_through_divides_and_multiplies_by_the_scale(device: Device):
    """One scale, or one per row; values beyond fullscale times scale saturate."""
    x = torch.tensor([[0.3, -7.0, 1000.0], [0.3, -7.0, 1000.0]])
    scale = torch.tensor([[0.5], [4.0]])
    expected = cast_to_fp8((x / scale).numpy(), device) * scale.numpy()
    np.testing.assert_array_equal(pass_through(x, scale, device).numpy(), expected)
    assert pass_through(x, 0.5, device)[0, 2] == device.fullscale / 2
