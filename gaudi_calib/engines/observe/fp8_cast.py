"""The FP8 cast of both devices on tensors; scales/cast.py is the reference it is tested against."""

import torch

from gaudi_calib.fp8 import Device


def quantize(x: torch.Tensor, scale: float | torch.Tensor, device: Device) -> torch.Tensor:
    """Divide by `scale` and round to the nearest FP8 value of `device`.

    Ties go to the even fraction; beyond the largest value it saturates; NaN stays.

    Args:
        x: any floating dtype and shape.
        scale: positive; broadcast over `x`.

    Returns:
        Dtype and shape of `x`. Every FP8 value fits bfloat16, float16 and float32 exactly.

    >>> from gaudi_calib.fp8 import GAUDI2
    >>> quantize(torch.tensor([0.3, 17.0, 1e6]), 1.0, GAUDI2).tolist()
    [0.3125, 16.0, 240.0]
    """
    limit = device.fullscale
    scaled = x.float().div(scale).clamp_(-limit, limit)
    return scaled.to(torch.float8_e4m3fn).to(x.dtype)


def pass_through(x: torch.Tensor, scale: float | torch.Tensor, device: Device) -> torch.Tensor:
    """Return what is left of `x` after FP8: quantized and dequantized, in its dtype."""
    return quantize(x.float(), scale, device).mul_(scale).to(x.dtype)
