"""Quantized weights as a checkpoint stores them, and the bf16 values they stand for.

On disk a weight is one tensor, or two:

    X.weight, X.weight_scale_inv   float8 E4M3 (out, in) and a scale per block; a partial block at the
                                   edges has a scale too. Despite its name the scale multiplies.
    X.weight, X.weight_scale       float8 E4M3, a scale per row (out, 1) or (out,), or one of all
    P, P_scale or P_scale_inv      stacked experts (E, ., .), a scale of the same rank
    P_blocks, P_scales             MXFP4 (E, out, in / 32, 16) bytes of two E2M1 values, low half first,
                                   and (E, out, in / 32) exponents; stands for P of shape (E, in, out)

Scales are float32, bf16, or E8M0 (powers of two; as its own dtype or as uint8).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gaudi_calib.errors import ModelError

if TYPE_CHECKING:
    import torch

_SCALE = re.compile(r"_scale(_inv)?$")
# Scales of activations and caches: they say nothing about weights.
_ACTIVATION_SCALE = re.compile(
    r"(^|[._])((input|output|activation)_scale(_inv|_ub)?|(weight|input|output)_zero_point|(k|v|q|kv|p|prob)_scale)$"
)
# What safetensors calls the types of scales.
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_PACKED = "_blocks", "_scales"
_PACKED_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Last parts of names that only formats nobody reads here have.
_FOREIGN = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|weight_packed|weight_scale_2|weight_global_scale|absmax|quant_map|SCB|W_q|codebooks"
    r"|weight_scales|_data)$|\.quant_state\."
)
_ROWS = 256


@dataclass(frozen=True)
class StoredWeight:
    """The tensors that hold one weight.

    Attributes:
        values: name of the tensor with its values.
        scale: name of the tensor that multiplies them, if the names have one.
        packed: MXFP4 rather than one value per element.
    """

    values: str
    scale: str | None = None
    packed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return (self.values,) if self.scale is None else (self.values, self.scale)


def find_weights(names: Iterable[str]) -> dict[str, StoredWeight]:
    """Return the logical weights among the tensors `names`, in their order; scales are parts, not weights.

    >>> find_weights(["a.weight", "a.weight_scale_inv", "k_scale"])
    {'a.weight': StoredWeight(values='a.weight', scale='a.weight_scale_inv', packed=False)}
    """
    order = list(names)
    known = set(order)
    weights: dict[str, StoredWeight] = {}
    for name in order:
        blocks, scales = _PACKED
        if name.endswith(blocks) and name.removesuffix(blocks) + scales in known:
            base = name.removesuffix(blocks)
            weights[base] = StoredWeight(name, base + scales, packed=True)
        elif not (_is_scale(name, known) or _ACTIVATION_SCALE.search(name)):
            scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in known), None)
            weights[name] = StoredWeight(name, scale)
    return weights


def find_input(name: str) -> str | None:
    """Return what a static scale of activations belongs to: the module or stacked weight, "" for a cache, else None.

    >>> find_input("mlp.up_proj.input_scale"), find_input("attn.k_scale"), find_input("mlp.up_proj.weight_scale")
    ('mlp.up_proj', '', None)
    """
    found = _ACTIVATION_SCALE.search(name)
    if found is None or found[0].endswith(("_ub", "_point")):
        return None
    return name[: found.start()] if found[3] else ""


def _is_scale(name: str, known: set[str]) -> bool:
    if _SCALE.search(name):
        return _SCALE.sub("", name) in known
    blocks, scales = _PACKED
    return name.endswith(scales) and name.removesuffix(scales) + blocks in known


def find_foreign(names: Iterable[str]) -> str | None:
    """Return the first tensor that belongs to a quantized format other than FP8 and MXFP4 (AWQ, GPTQ, NVFP4, ...)."""
    return next((name for name in names if _FOREIGN.search(name)), None)


def find_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, from config.json's `quantization_config`; None if unstated.

    >>> find_block({"quant_method": "fp8", "weight_block_size": [128, 128]})
    (128, 128)
    """
    groups = quantization.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    for size in [quantization.get("weight_block_size"), *(scheme.get("block_structure") for scheme in schemes)]:
        if isinstance(size, list | tuple) and len(size) == 2 and all(type(part) is int and part > 0 for part in size):
            return size[0], size[1]
    return None


@dataclass(frozen=True)
class ScaleGrid:
    """How the scales of a weight lie on it.

    Attributes:
        blocks: elements per scale along each axis of the weight.
        is_blockwise: whether the product is formed in bf16, of a scale rounded to bf16.
    """

    blocks: tuple[int, ...]
    is_blockwise: bool


def plan_grid(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], block: tuple[int, int] | None, *, name: str
) -> ScaleGrid:
    """Return how scales of `scale_shape` lie on a weight of `shape`.

    Args:
        block: the size that config.json states, for edges that are not a multiple of it.
        name: of the weight, for the error.

    Raises:
        ModelError: the shapes do not fit.
    """
    aligned = align_scale(shape, scale_shape)
    outer = _divide(shape[:-2], aligned[:-2], is_whole=True)
    if block and outer is not None and scale_shape[-2:] == tuple(-(-size // b) for size, b in zip(shape[-2:], block)):
        return ScaleGrid((*outer, *block), is_blockwise=True)
    # One scale per part of a fused projection (3 for q, k, v) looks like blocks of rows: never guess the parts.
    inner = _divide(shape[-2:], aligned[-2:], is_whole=len(scale_shape) < len(shape))
    if len(shape) < 2 or outer is None or inner is None:
        raise ModelError(
            f"the scale of {name!r} does not fit it",
            why=f"weight {shape}, scale {scale_shape}, weight_block_size {block}",
            fix="check that config.json belongs to these weights, or give the unquantized checkpoint",
        )
    return ScaleGrid((*outer, *inner), is_blockwise=aligned[-1] > 1)


def align_scale(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `scale_shape` with the axes of `shape` that it lacks, as 1 at its end: (out,) is one per row.

    >>> align_scale((512, 128), (512,)), align_scale((512, 128), ())
    ((512, 1), (1, 1))
    """
    return scale_shape + (1,) * (len(shape) - len(scale_shape))


def _divide(shape: tuple[int, ...], counts: tuple[int, ...], *, is_whole: bool) -> tuple[int, ...] | None:
    """Return the elements per scale along each axis, or None where they do not fit.

    Args:
        is_whole: a scale is of one element or of the whole axis, never of a part of it.
    """
    if len(shape) != len(counts) or any(count < 1 or size % count for size, count in zip(shape, counts)):
        return None
    if is_whole and any(count not in (1, size) for size, count in zip(shape, counts)):
        return None
    return tuple(size // count for size, count in zip(shape, counts))


def dequantize(values: "torch.Tensor", scale: "torch.Tensor", grid: ScaleGrid) -> "torch.Tensor":
    """Return the bf16 values that FP8 `values` stand for.

    vllm-gaudi multiplies per-block weights in bf16, by a scale rounded to bf16, and
    others in float32; INC measures what it gets. Both are reproduced to the bit.

    Args:
        values: float8, a weight or one element of its first axis, which has size 1 then.
        scale: of `values`, with as many axes.
        grid: from `plan_grid`, for the whole weight.

    Source: vllm-gaudi `dequant_block_fp8_weight_naive`, extension/ops.py; `dequant_fp8_weight`,
    ops/hpu_compressed_tensors.py.
    """
    import torch

    dtype = torch.bfloat16 if grid.is_blockwise else torch.float32
    result = torch.empty(values.shape, dtype=torch.bfloat16)
    _multiply(values, read_scale(scale).to(dtype), grid.blocks, result)
    return result


def _multiply(values: "torch.Tensor", factors: "torch.Tensor", blocks: tuple[int, ...], result: "torch.Tensor") -> None:
    """Write values times factors into `result`, some rows at a time, so that no whole copy is made."""
    import torch

    if values.ndim > 2:
        for index in range(len(values)):
            _multiply(values[index], factors[index // blocks[0]], blocks[1:], result[index])
        return
    (rows, columns), (height, width) = values.shape, blocks
    wide = factors if width == columns else factors[:, torch.arange(columns) // width]
    for start in range(0, rows, _ROWS):
        stop = min(rows, start + _ROWS)
        part = wide[torch.arange(start, stop) // height]
        result[start:stop] = values[start:stop].to(factors.dtype) * part


def read_scale(scale: "torch.Tensor") -> "torch.Tensor":
    """Return `scale` as float32; a byte is an E8M0 exponent.

    >>> import torch
    >>> read_scale(torch.tensor([0, 126, 127, 130], dtype=torch.uint8)).tolist()
    [5.877471754111438e-39, 0.5, 1.0, 8.0]
    """
    import torch

    if scale.element_size() > 1:
        return scale.to(torch.float32)
    exponents = scale.view(torch.uint8).to(torch.int32)
    powers = torch.where(exponents > 0, exponents << 23, 1 << 22).view(torch.float32)
    return torch.where(exponents == 255, torch.nan, powers)


def dequantize_packed(blocks: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """Return the bf16 values that MXFP4 experts stand for, as the model's code holds them.

    Args:
        blocks: uint8 (E, out, groups, 16).
        scales: uint8 (E, out, groups).

    Returns:
        (E, in, out), contiguous.

    Source: `convert_moe_packed_tensors`, transformers/integrations/mxfp4.py.
    """
    import torch

    experts, out, groups, half = blocks.shape
    values = torch.tensor(_PACKED_VALUES + tuple(-value for value in _PACKED_VALUES))
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    result = torch.empty(experts, groups * half * 2, out, dtype=torch.bfloat16)
    for index in range(experts):
        wide = pairs[blocks[index].to(torch.int32)] * read_scale(scales[index])[:, :, None, None]
        result[index] = wide.reshape(out, -1).T
    return result


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that MXFP4 blocks of `shape` stand for.

    >>> packed_shape((4, 128, 2, 16))
    (4, 64, 128)
    """
    experts, out, groups, half = shape
    return experts, groups * half * 2, out
