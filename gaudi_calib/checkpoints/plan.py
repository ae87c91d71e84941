"""What will be measured: the nodes of a model, from its configuration and headers alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gaudi_calib.checkpoints.checkpoint import FOREIGN_CONFIG, Checkpoint
from gaudi_calib.checkpoints.expert_weights import ExpertWeights, cast, find_expert_weights
from gaudi_calib.checkpoints.fit import list_layers, read_heads, require_matrices
from gaudi_calib.checkpoints.head import Head, find_head
from gaudi_calib.checkpoints.weight_names import WeightNames
from gaudi_calib.errors import ModelError, TopologyError
from gaudi_calib.models.families import Family
from gaudi_calib.models.modules import Attention, Experts, Layout, Linear, Split, Unmeasured
from gaudi_calib.ranges.derive import parse_vllm_version
from gaudi_calib.ranges.experts import list_children, name_ageless
from gaudi_calib.ranges.node import ATTENTION_OPS, LATENT_ATTENTION_OPS, Op
from gaudi_calib.ranges.topology import Axis, Segment, Topology

if TYPE_CHECKING:
    import torch

# vLLM pads the vocabulary so that ranks get equal shares.
_VOCABULARY_PADDING = 64


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
        reduces: partial products are summed over the ranks at once (row parallel only).
    """

    node: str
    modules: tuple[str, ...]
    weights: tuple[str, ...]
    split: Split
    out_axis: Axis
    in_axis: Axis
    padding: int = 0
    reduces: bool = True

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
        experts: by name of the fused op's node.
        attention_layers: indices of the layers that have attention.
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
    experts: dict[str, ExpertWeights] = field(default_factory=dict)
    attention_layers: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    head: Head | None = None

    @property
    def layout(self) -> Layout:
        return self.family.layout

    @property
    def head_axis(self) -> Axis:
        return Axis((Segment(self.heads, self.heads),))

    @property
    def kv_axis(self) -> Axis:
        if self.layout.attention.latent:  # expanded to one per query head
            return self.head_axis
        return Axis((Segment(self.kv_heads, self.kv_heads, replicates=True),))

    @property
    def attention_ops(self) -> dict[str, Op]:
        """What an attention implementation computes, by name, in module order."""
        return LATENT_ATTENTION_OPS if self.layout.attention.latent else ATTENTION_OPS

    def node_name(self, layer: int, path: str) -> str:
        """vLLM's name of what lies at `path` inside a layer, e.g. `model.layers.0.self_attn.o_proj`."""
        return f"{self.layout.vllm_layers or self.layout.layers}.{layer}.{path}"

    def attention_node(self, layer: int, op: str) -> str:
        """Name of an attention op's node, e.g. `model.layers.0.self_attn.attn.impl.k_cache`."""
        return self.node_name(layer, f"{self.layout.attention.name}.impl.{op}")

    @property
    def unmeasured(self) -> list[str]:
        """Nodes that INC patches and no engine here measures; they must stay blocked."""
        suffixes = tuple(f".{module.name}" for module in self.layout.modules if isinstance(module, Unmeasured))
        layers = [name for name in self.node_names if suffixes and name.endswith(suffixes)]
        return [*self.layout.others, *layers]

    @property
    def ops(self) -> dict[str, Op]:
        """What each node computes that runs: those that must have ranges, or be blocked.

        An expert's own matmuls are left out: the fused op stands for them.
        """
        linears = {name: linear.op for name, linear in self.linears.items()}
        experts = dict.fromkeys(self.experts, Op.DYNAMIC_MOE)
        attention = {
            self.attention_node(layer, name): op
            for layer in self.attention_layers
            for name, op in self.attention_ops.items()
            if op is not Op.SOFTMAX  # that of naive prompt attention
        }
        return linears | experts | attention

    def divides(self, world: int) -> bool:
        """Whether every tensor outside the experts divides over `world` ranks."""
        axes = [*self._split_axes(), self.head_axis, self.kv_axis]
        segments = [segment for axis in axes for segment in axis.segments]
        return all(
            segment.units % world == 0 or (segment.replicates and world % segment.units == 0) for segment in segments
        )

    def divides_experts(self, topology: Topology) -> bool:
        """Whether the experts, or their intermediate channels, divide over the ranks."""
        sizes = [experts.count if topology.expert_parallel else experts.channels for experts in self.experts.values()]
        return all(size % topology.world == 0 for size in sizes)

    def require_topology(self, topology: Topology) -> None:
        """Raise TopologyError unless the model divides over the ranks."""
        world = topology.world
        if not self.divides(world):
            raise TopologyError(
                f"the model does not divide over {world} ranks",
                where=self.checkpoint.directory,
                why=f"it has {self.heads} attention heads, {self.kv_heads} KV heads, and linear layers of "
                + ", ".join(sorted({f"{axis.segments[0].channels}" for axis in self._split_axes()}, key=int)),
                fix="choose a tensor-parallel size (-t, -r) that divides them; KV heads may also divide it",
            )
        if not self.divides_experts(topology):
            experts = next(iter(self.experts.values()))
            raise TopologyError(
                f"the experts do not divide over {world} ranks",
                where=self.checkpoint.directory,
                why=f"it has {experts.count} experts of {experts.channels} intermediate channels, and ranks get "
                + ("whole experts" if topology.expert_parallel else "channels of every expert"),
                fix="choose another number of ranks, or the other way of sharing (-u or --no-expert-parallel)",
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

    def served(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return a weight in the dtype it is served in."""
        return cast(tensor, self.dtype)

    def read_weight(self, node: str) -> "torch.Tensor":
        """Return a linear node's whole weight as vLLM fuses it, shape (out, in), in the served dtype."""
        import torch

        linear = self.linears[node]
        tensors = self.checkpoint.read(linear.weights)
        weight = self.served(torch.cat([tensors[name] for name in linear.weights]))
        order = self.canonical_rows(linear)
        if order is not None:
            weight = weight[torch.from_numpy(order)]
        if linear.padding:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, linear.padding))
        return weight

    def read_rank_weight(self, node: str, rank: int, topology: Topology) -> np.ndarray | None:
        """Return the rows and columns of a linear node's weight that `rank` holds, float32; None if there is no such.

        Args:
            node: its name; of an expert, of any age.
        """
        import torch

        if node not in self.linears:
            weight = self._read_expert_weight(node, rank, topology)
            return None if weight is None else weight.float().numpy()
        linear, weight = self.linears[node], self.read_weight(node)
        weight = torch.cat([weight[part] for part in linear.out_axis.slices(rank, topology.world)])
        weight = torch.cat([weight[:, part] for part in linear.in_axis.slices(rank, topology.world)], dim=1)
        return weight.float().numpy()

    def _read_expert_weight(self, node: str, rank: int, topology: Topology) -> "torch.Tensor | None":
        op, _, child = name_ageless(node).partition(".moe_op.")
        experts = next((self.experts[name] for name in self.experts if name_ageless(name) == f"{op}.moe_op"), None)
        if experts is None:
            return None
        part, _, index = child.partition(".")
        size = experts.channels // topology.world
        channels, expert = slice(rank * size, (rank + 1) * size), int(index)
        if topology.expert_parallel:
            channels, expert = slice(None), rank * (experts.count // topology.world) + expert
        if part == "w2_list":
            return experts.read_down(expert)[:, channels]
        return experts.order_gate_up(experts.read_gate_up(expert))[:, channels].flatten(0, 1)


def plan_model(model_dir: Path, dtype: str = "bfloat16", vllm: str | None = None) -> ModelPlan:
    """Work out a model's nodes without loading a weight.

    Args:
        dtype: what the model is served in (`--dtype` of vLLM).
        vllm: version of the vLLM that serves; None for a current one.

    Raises:
        ModelError: the checkpoint is incomplete, contradicts its config.json, or is of a family the torch engine
            does not run.
    """
    checkpoint = Checkpoint(model_dir)
    family = checkpoint.source.require_family()
    if family.layout.text_prefix:
        checkpoint.narrow(family.layout.text_prefix)
    names, layers = WeightNames(checkpoint, family.layout), list_layers(checkpoint, family.layout)
    heads, kv_heads, head_dim = read_heads(checkpoint)
    head = find_head(checkpoint, family.layout, names, parse_vllm_version(vllm))
    plan = ModelPlan(checkpoint, family, heads, kv_heads, head_dim, layers, {}, (), dtype=dtype, head=head)
    nodes = dict(_walk_nodes(plan, names))
    return replace(
        plan,
        linears={name: node for name, node in nodes.items() if isinstance(node, LinearPlan)},
        experts={name: node for name, node in nodes.items() if isinstance(node, ExpertWeights)},
        attention_layers=tuple(
            index for index in range(len(layers)) if plan.attention_node(index, "matmul_qk") in nodes
        ),
        node_names=tuple(nodes),
    )


def _walk_nodes(plan: ModelPlan, names: WeightNames) -> Iterator[tuple[str, LinearPlan | ExpertWeights | None]]:
    layout = plan.layout
    yield from ((name, None) for name in layout.others)
    outer = [linear for linear in layout.outer if names.has(linear.parts[0] + ".weight")]
    for linear in outer:
        yield linear.name, _plan_linear(plan, linear, linear.name, "", names)
    for index, layer in enumerate(plan.layers):
        yield from _walk_layer(plan, index, layer, names)
    if layout.vllm_lm_head is not None and plan.head is not None:
        yield layout.vllm_lm_head, _plan_lm_head(plan, layout.vllm_lm_head, plan.head)


def _walk_layer(
    plan: ModelPlan, index: int, layer: str, names: WeightNames
) -> Iterator[tuple[str, LinearPlan | ExpertWeights | None]]:
    for module in plan.layout.modules:
        node = plan.node_name(index, module.name)
        if isinstance(module, Linear):
            if module.where is None or names.has(f"{layer}.{module.where}.weight"):
                yield node, _plan_linear(plan, module, node, layer + ".", names)
        elif isinstance(module, Experts):
            router = f"{layer}.{module.router}.weight"
            if names.has(router):
                experts = find_expert_weights(plan.checkpoint, module, node, layer, names.find(router), plan.dtype)
                yield node, experts
                yield from ((f"{node}.{child}", None) for child in list_children(experts.count))
        elif names.has_module(f"{layer}.{module.module}"):
            yield from ((name, None) for name in _list_idle(plan, index, module, node))


def _list_idle(plan: ModelPlan, index: int, module: Attention | Unmeasured, node: str) -> list[str]:
    """Names of the nodes that have no weight of their own."""
    if isinstance(module, Unmeasured):
        return [node]
    ops = [plan.attention_node(index, op) for op in plan.attention_ops]
    # vLLM's latent attention module has a second set of ops, which it never calls.
    return ops + [f"{node}.{op}" for op in ATTENTION_OPS] if module.latent else ops


def _plan_linear(plan: ModelPlan, linear: Linear, node: str, prefix: str, names: WeightNames) -> LinearPlan:
    modules = tuple(prefix + part for part in linear.parts)
    weights = tuple(names.find(f"{module}.weight") for module in modules)
    shapes = require_matrices(plan.checkpoint, weights)
    out_axis, in_axis = Axis(), Axis()
    if linear.split in (Split.QKV, Split.QKV_GROUPED, Split.QKV_INTERLEAVED):
        width, kv_width = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim
        rows, expected = sum(shape[0] for shape in shapes), width + 2 * kv_width
        if rows != expected:
            raise ModelError(
                f"{node} has {rows} output rows, the configuration calls for {expected}",
                where=plan.checkpoint.directory,
                why="num_attention_heads, num_key_value_heads or head_dim in config.json do not fit the weights",
                fix=FOREIGN_CONFIG,
            )
        kv_segment = Segment(kv_width, plan.kv_heads, replicates=True)
        out_axis = Axis((Segment(width, plan.heads), kv_segment, kv_segment))
        if linear.split is Split.QKV_INTERLEAVED:
            out_axis = Axis((Segment(3 * width, plan.heads),))
    elif linear.split is Split.COLUMN:
        out_axis = Axis(tuple(_column_segments(linear, shapes)))
    elif linear.split is Split.ROW:
        columns = shapes[0][1]
        in_axis = Axis((Segment(columns, plan.heads if linear.by_head else columns),))
    return LinearPlan(node, modules, weights, linear.split, out_axis, in_axis, reduces=linear.reduces)


def _column_segments(linear: Linear, shapes: list[tuple[int, ...]]) -> list[Segment]:
    if len(linear.parts) == 1 and linear.name.endswith(("gate_up_proj", "input_linear")):  # stored fused
        half = shapes[0][0] // 2
        return [Segment(half, half), Segment(half, half)]
    return [Segment(shape[0], shape[0]) for shape in shapes]


def _plan_lm_head(plan: ModelPlan, node: str, head: Head) -> LinearPlan:
    rows = plan.checkpoint.shapes[head.weight][0]
    padding = -rows % _VOCABULARY_PADDING
    axis = Axis((Segment(rows + padding, rows + padding),))
    return LinearPlan(node, (), (head.weight,), Split.COLUMN, axis, Axis(), padding)
