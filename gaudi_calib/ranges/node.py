"""One measured module and its ranges or scales, as values.

A *range* is an array of shape (channels,), float32; almost always one channel
(per tensor). A *scale* is a float, or an array for weights. The nested lists and
matrices of the file format exist only in `rankfiles/`.
"""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

import numpy as np

from gaudi_calib.layout import DUMP_NAME

T = TypeVar("T")


class Op(Enum):
    """What a node computes; decides how its scales follow from its ranges.

    Source: INC `_mod_types`, fp8_quant/_core/patching_common.py.
    """

    LINEAR = "linear"
    ROW_PARALLEL_LINEAR = "row_parallel_linear"
    MATMUL = "matmul"
    B2B_MATMUL = "b2b_matmul"
    KV_CACHE = "kv_cache"
    SOFTMAX = "softmax"
    FUSED_SDPA = "fused_sdpa"
    DYNAMIC_MOE = "dynamic_moe"


# Ops whose outputs INC measures only with `measure_exclude: NONE`.
OPTIONAL_OUTPUTS = frozenset({Op.LINEAR, Op.MATMUL, Op.KV_CACHE})


@dataclass(frozen=True, slots=True)
class Node:
    """Ranges of one module: float32 arrays of shape (channels,).

    Attributes:
        inputs: one range per input.
        outputs: one range per output, or None where the op's outputs are not measured.
        weight: range of the weight, or None where there is none.
    """

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...] | None = None
    weight: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PerChannelWeight:
    """Weight scales of a per-channel method.

    Attributes:
        out_channels: float32, shape (output channels,).
        in_channels: float32, shape (input channels,); all ones.
    """

    out_channels: np.ndarray
    in_channels: np.ndarray


@dataclass(frozen=True, slots=True)
class ScaleNode:
    """Scales of one module (quantized = x / scale).

    Attributes:
        inputs: one scale per input.
        outputs: one scale per output; an array of shape (output channels,) where the
            weight has one scale per channel, of shape (1,) where it is an `OPT` scale.
        weight: a float; an array of shape (1,) for per-tensor `OPT` methods;
            `PerChannelWeight`; or None where there is no weight.
    """

    inputs: tuple[float, ...]
    outputs: tuple[float | np.ndarray, ...]
    weight: float | np.ndarray | PerChannelWeight | None = None


@dataclass(frozen=True)
class RankSet(Generic[T]):
    """Everything one rank's file holds.

    Attributes:
        rank, world: position in the tensor- or expert-parallel group.
        nodes: `Node` (ranges) or `ScaleNode` (scales) by module name, in module order.
        modules: names of all modules INC patched, in module order (`_mod_list.json`);
            a module that never ran is here and not in `nodes`.
        num_samples: forward calls seen, or None where not recorded.
        dump: first part of its files' names (last component of `dump_stats_path`).
    """

    rank: int
    world: int
    nodes: Mapping[str, T]
    modules: tuple[str, ...] = ()
    num_samples: int | None = None
    dump: str = DUMP_NAME


# The modules of one attention implementation, in vllm-gaudi's module order. Softmax is
# patched but never runs: prefill is fused and decode works block by block.
ATTENTION_OPS = {
    "matmul_qk": Op.MATMUL,
    "softmax": Op.SOFTMAX,
    "matmul_av": Op.MATMUL,
    "batch2block_matmul": Op.B2B_MATMUL,
    "block2batch_matmul": Op.B2B_MATMUL,
    "k_cache": Op.KV_CACHE,
    "v_cache": Op.KV_CACHE,
    "fused_scaled_dot_product_attention": Op.FUSED_SDPA,
}
# The same with one latent cache for all heads.
LATENT_ATTENTION_OPS = {
    "latent_cache_k" if op == "k_cache" else op: kind for op, kind in ATTENTION_OPS.items() if op != "v_cache"
}

# What vllm-gaudi and its forerunner vllm-fork have called the fused op of a layer's experts, the newest first.
FUSED_EXPERTS = ("moe_op", "MoeOp", "hpu_fused_moe")
# Attention ops of vllm-fork in 2024.
_FORMER_ATTENTION_OPS = {
    "qk_matmul": Op.MATMUL,
    "kv_matmul": Op.MATMUL,
    "key_cache": Op.KV_CACHE,
    "value_cache": Op.KV_CACHE,
    "latent_cache_v": Op.KV_CACHE,
}
_OP_BY_SUFFIX = {
    **ATTENTION_OPS,
    **LATENT_ATTENTION_OPS,
    **_FORMER_ATTENTION_OPS,
    **dict.fromkeys(FUSED_EXPERTS, Op.DYNAMIC_MOE),
}


class Measured(Protocol):
    """What tells ops apart: a `Node`, or the shape of one."""

    @property
    def inputs(self) -> Sized:
        """As in `Node`."""

    @property
    def outputs(self) -> Sized | None:
        """As in `Node`."""

    @property
    def weight(self) -> object:
        """As in `Node`."""


def find_op(name: str, node: Measured) -> Op:
    """Tell what the module `name` computes from its name and which ranges it has.

    >>> find_op("model.layers.0.self_attn.attn.impl.k_cache", Node(inputs=(np.ones(1),)))
    <Op.KV_CACHE: 'kv_cache'>
    """
    outputs = None if node.outputs is None else len(node.outputs)
    return classify(name.rpartition(".")[2], outputs, has_weight=node.weight is not None)


def find_op_by_name(name: str) -> Op:
    """Tell what the module `name` computes where nothing but the name is known: a linear layer is just `LINEAR`."""
    return classify(name.rpartition(".")[2], None, has_weight=False)


def classify(suffix: str, outputs: int | None, *, has_weight: bool) -> Op:
    """Tell what a module computes.

    Args:
        suffix: last component of its name.
        outputs: how many of its outputs have ranges, None where they are not measured.
        has_weight: the range of a weight is there.
    """
    op = _OP_BY_SUFFIX.get(suffix)
    if op is not None:
        return op
    return Op.ROW_PARALLEL_LINEAR if outputs == 2 and has_weight else Op.LINEAR
