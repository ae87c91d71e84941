"""What will be measured: the nodes of a model, from its configuration and headers alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gaudi_calib.engines.checkpoint import Checkpoint
from gaudi_calib.errors import ModelError, TopologyError
from gaudi_calib.families import Family, Layout, Linear, Split, count_kv_heads, find_family
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.shard import Axis, Segment

# vLLM pads the vocabulary so that ranks get equal shares.
VOCABULARY_PADDING = 64

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


@dataclass(frozen=True)
class LinearPlan:
    """One linear node and where its weight comes from.

    Attributes:
        node: vLLM's module name.
        modules: Hugging Face module names, in the order of fusion; empty for the output projection.
        weights: names of their weight tensors in the checkpoint, same order.
        split: the tensor-parallel rule.
        out_axis, in_axis: how ranks split the weight's rows and columns.
        padding: rows of zeros vLLM appends.
    """

    node: str
    modules: tuple[str, ...]
    weights: tuple[str, ...]
    split: Split
    out_axis: Axis
    in_axis: Axis
    padding: int = 0

    @property
    def op(self) -> Op:
        return Op.ROW_PARALLEL_LINEAR if self.split is Split.ROW else Op.LINEAR


@dataclass(frozen=True)
class ModelPlan:
    """All nodes of one model.

    Attributes:
        checkpoint, family: what and which.
        heads, kv_heads, head_dim: of the attention layers.
        layers: Hugging Face names of the decoder layers.
        linears: by node name, in vLLM's module order.
        node_names: every module INC patches, in vLLM's module order.
        dtype: what the model is served in; weights are rounded to it.
    """

    checkpoint: Checkpoint
    family: Family
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[str, ...]
    linears: dict[str, LinearPlan]
    node_names: tuple[str, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> Layout:
        assert self.family.layout is not None
        return self.family.layout

    @property
    def head_axis(self) -> Axis:
        return Axis((Segment(self.heads, self.heads),))

    @property
    def kv_axis(self) -> Axis:
        return Axis((Segment(self.kv_heads, self.kv_heads, replicates=True),))

    def node_name(self, layer: int, path: str) -> str:
        """vLLM's name of what lies at `path` inside a layer, e.g. `model.layers.0.self_attn.o_proj`."""
        return f"{self.layout.vllm_layers or self.layout.layers}.{layer}.{path}"

    def attention_node(self, layer: int, op: str) -> str:
        """Name of an attention op's node, e.g. `model.layers.0.self_attn.attn.impl.k_cache`."""
        return self.node_name(layer, f"{self.layout.attention}.impl.{op}")

    def divides(self, world: int) -> bool:
        """Whether every tensor divides over `world` ranks."""
        axes = [*self._split_axes(), self.head_axis, self.kv_axis]
        segments = [segment for axis in axes for segment in axis.segments]
        return all(
            segment.units % world == 0 or (segment.replicates and world % segment.units == 0) for segment in segments
        )

    def require_world(self, world: int) -> None:
        """Raise TopologyError unless the model divides over `world` ranks."""
        if not self.divides(world):
            raise TopologyError(
                f"the model does not divide over {world} ranks",
                where=self.checkpoint.directory,
                why=f"it has {self.heads} attention heads, {self.kv_heads} KV heads, and linear layers of "
                + ", ".join(sorted({f"{axis.segments[0].channels}" for axis in self._split_axes()}, key=int)),
                fix="choose a tensor-parallel size (-t, -r) that divides them; KV heads may also divide it",
            )

    def _split_axes(self) -> list[Axis]:
        axes = [axis for linear in self.linears.values() for axis in (linear.out_axis, linear.in_axis)]
        return [axis for axis in axes if axis.segments]

    def canonical_rows(self, linear: LinearPlan) -> np.ndarray | None:
        """Order that brings stored output rows to (q, k, v), or None where they are so already."""
        if linear.split is not Split.QKV_GROUPED:
            return None
        rows = np.arange((self.heads + 2 * self.kv_heads) * self.head_dim)
        grouped = rows.reshape(self.kv_heads, self.heads // self.kv_heads + 2, self.head_dim)
        return np.concatenate([grouped[:, :-2].ravel(), grouped[:, -2].ravel(), grouped[:, -1].ravel()])

    def served(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight in the dtype it is served in."""
        return tensor.to(self.dtype)

    def read_weight(self, node: str) -> torch.Tensor:
        """Return a linear node's whole weight as vLLM fuses it, shape (out, in), in the served dtype."""
        linear = self.linears[node]
        tensors = self.checkpoint.read(linear.weights)
        weight = self.served(torch.cat([tensors[name] for name in linear.weights]))
        order = self.canonical_rows(linear)
        if order is not None:
            weight = weight[torch.from_numpy(order)]
        if linear.padding:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, linear.padding))
        return weight

    def read_rank_weight(self, node: str, rank: int, world: int) -> np.ndarray:
        """Return the rows and columns of a linear node's weight that `rank` holds, float32."""
        linear, weight = self.linears[node], self.read_weight(node)
        weight = torch.cat([weight[part] for part in linear.out_axis.slices(rank, world)])
        weight = torch.cat([weight[:, part] for part in linear.in_axis.slices(rank, world)], dim=1)
        return weight.float().numpy()


def plan_model(model_dir: Path, dtype: str = "bfloat16") -> ModelPlan:
    """Work out a model's nodes without loading a weight.

    Args:
        dtype: what the model is served in (`--dtype` of vLLM).

    Raises:
        ModelError: the checkpoint is incomplete, or of a family the torch engine does not run.
    """
    checkpoint = Checkpoint(model_dir)
    family = find_family(str(checkpoint.config.get("model_type")))
    if family.layout is None:
        raise ModelError(
            f"the torch engine cannot measure {family.name} models yet",
            where=model_dir,
            why="gaudi_calib/families.py has no module layout for the family",
            fix="measure on a Gaudi with vllm-gaudi, or add a layout (the module's docstring says how)",
        )
    config = checkpoint.config
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    layers = tuple(f"{family.layout.layers}.{i}" for i in range(int(config["num_hidden_layers"])))
    served = getattr(torch, dtype)
    plan = ModelPlan(checkpoint, family, heads, count_kv_heads(config), head_dim, layers, {}, (), served)
    nodes = dict(_walk_nodes(plan))
    linears = {name: linear for name, linear in nodes.items() if linear is not None}
    return replace(plan, linears=linears, node_names=tuple(nodes))


def _walk_nodes(plan: ModelPlan) -> Iterator[tuple[str, LinearPlan | None]]:
    layout = plan.layout
    names = WeightNames(plan.checkpoint)
    outer = [linear for linear in layout.outer if names.has(linear.parts[0] + ".weight")]
    for linear in outer:
        yield linear.name, _plan_linear(plan, linear, linear.name, "", names)
    for index, layer in enumerate(plan.layers):
        for linear in layout.linears:
            node = plan.node_name(index, linear.name)
            yield node, _plan_linear(plan, linear, node, layer + ".", names)
            if linear.name == layout.attention_after:
                for op in ATTENTION_OPS:
                    yield plan.attention_node(index, op), None
    if layout.vllm_lm_head is not None:
        yield layout.vllm_lm_head, _plan_lm_head(plan, names)


class WeightNames:
    """Finds tensors under the names that checkpoints of different ages give them."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def find(self, name: str) -> str:
        """Return the checkpoint's name of the module tensor `name`.

        Raises:
            ModelError: no such tensor.
        """
        found = self._find(name)
        if found is None:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}",
                where=self._checkpoint.directory,
                why="config.json calls for it",
                fix="check that config.json belongs to these weights and that all shards are there",
            )
        return found

    def _find(self, name: str) -> str | None:
        # A checkpoint of the bare decoder lacks the first component ("model.", "transformer.").
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._checkpoint.files:
                return candidate
        return None


def _plan_linear(plan: ModelPlan, linear: Linear, node: str, prefix: str, names: WeightNames) -> LinearPlan:
    modules = tuple(prefix + part for part in linear.parts)
    weights = tuple(names.find(f"{module}.weight") for module in modules)
    shapes = [plan.checkpoint.shapes[name] for name in weights]
    out_axis, in_axis = Axis(), Axis()
    if linear.split in (Split.QKV, Split.QKV_GROUPED, Split.QKV_INTERLEAVED):
        width, kv_width = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim
        _check_rows(node, sum(shape[0] for shape in shapes), width + 2 * kv_width)
        kv_segment = Segment(kv_width, plan.kv_heads, replicates=True)
        out_axis = Axis((Segment(width, plan.heads), kv_segment, kv_segment))
        if linear.split is Split.QKV_INTERLEAVED:
            out_axis = Axis((Segment(3 * width, plan.heads),))
    elif linear.split is Split.COLUMN:
        out_axis = Axis(tuple(_column_segments(linear, shapes)))
    elif linear.split is Split.ROW:
        columns = shapes[0][1]
        in_axis = Axis((Segment(columns, plan.heads if linear.name == plan.layout.attention_after else columns),))
    return LinearPlan(node, modules, weights, linear.split, out_axis, in_axis)


def _column_segments(linear: Linear, shapes: list[tuple[int, ...]]) -> list[Segment]:
    if len(linear.parts) == 1 and linear.name.endswith("gate_up_proj"):  # stored fused
        half = shapes[0][0] // 2
        return [Segment(half, half), Segment(half, half)]
    return [Segment(shape[0], shape[0]) for shape in shapes]


def _check_rows(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ModelError(
            f"{name} has {found} output rows, the configuration calls for {expected}",
            why="num_attention_heads, num_key_value_heads or head_dim in config.json do not fit the weights",
            fix="check that config.json belongs to these weights",
        )


def _plan_lm_head(plan: ModelPlan, names: WeightNames) -> LinearPlan:
    layout = plan.layout
    assert layout.vllm_lm_head is not None
    stored = [f"{name}.weight" for name in layout.lm_head if f"{name}.weight" in plan.checkpoint.files]
    weight = stored[0] if stored else names.find(f"{layout.embedding}.weight")  # tied to the embedding
    rows = plan.checkpoint.shapes[weight][0]
    padding = -rows % VOCABULARY_PADDING
    axis = Axis((Segment(rows + padding, rows + padding),))
    return LinearPlan(layout.vllm_lm_head, (), (weight,), Split.COLUMN, axis, Axis(), padding)
