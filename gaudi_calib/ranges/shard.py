"""One measurement, every topology: per-channel ranges and what each rank sees of them.

Ranges are kept per channel as tensor parallelism 1 has them. A rank's range is the
maximum over the channels that rank holds, which is exact, because slicing a tensor
and taking its maximum commute. Only the outputs of row-parallel layers are not a
slice of anything: they are measured for the worlds asked for, and bounded for others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gaudi_calib.errors import TopologyError
from gaudi_calib.fp8 import GAUDI2, Device
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.expert_channels import ExpertChannels, Topology
from gaudi_calib.ranges.node import Node, Op, RankSet


@dataclass(frozen=True)
class Segment:
    """A run of channels that ranks share out in whole units (heads, or single channels).

    Attributes:
        channels: how many.
        units: indivisible groups of channels, evenly sized.
        replicates: with more ranks than units, several ranks hold the same unit
            (KV heads); otherwise that is an error.
    """

    channels: int
    units: int
    replicates: bool = False

    def slice(self, rank: int, world: int) -> slice:
        """Channels of `rank`, counted from the segment's start.

        Raises:
            TopologyError: the units do not divide over the ranks.
        """
        size = self.channels // self.units
        if self.units % world == 0:
            count = self.units // world
            return slice(rank * count * size, (rank + 1) * count * size)
        if self.replicates and world % self.units == 0:
            unit = rank // (world // self.units)
            return slice(unit * size, (unit + 1) * size)
        raise TopologyError(
            f"{self.units} {'heads or channels' if size > 1 else 'channels'} do not divide over {world} ranks",
            fix="choose a tensor-parallel size that divides the attention heads, the KV heads "
            "(or is a multiple of them) and the intermediate size",
        )


@dataclass(frozen=True)
class Axis:
    """How one axis of a tensor is split; no segments: every rank holds all of it."""

    segments: tuple[Segment, ...] = ()

    def slices(self, rank: int, world: int) -> list[slice]:
        """Channels of `rank`, as slices of the whole axis.

        >>> Axis((Segment(8, 4), Segment(4, 2, replicates=True))).slices(3, 4)
        [slice(6, 8, None), slice(10, 12, None)]
        """
        if not self.segments:
            return [slice(None)]
        start, slices = 0, []
        for segment in self.segments:
            part = segment.slice(rank, world)
            slices.append(slice(start + part.start, start + part.stop))
            start += segment.channels
        return slices


@dataclass(frozen=True)
class ChannelRange:
    """Ranges of one tensor along the axis that ranks split.

    Attributes:
        values: float32, shape (channels,), not rounded to bf16.
        axis: how ranks split it.
    """

    values: np.ndarray
    axis: Axis = Axis()

    def over_rank(self, rank: int, world: int) -> float:
        """The largest value among the channels of `rank`."""
        return float(max(self.values[part].max() for part in self.axis.slices(rank, world)))


@dataclass(frozen=True)
class ChannelNode:
    """One module's ranges at tensor parallelism 1, per channel.

    Attributes:
        op: what the module computes.
        inputs, outputs: as in `Node`; outputs None where not measured.
        weight: per output row (column parallel) or per input column (row parallel).
        partial_products: row parallel only: world -> range of the partial products.
            One value for all ranks where they reduce at once: that of the elementwise
            maximum over ranks of the signed partial products (what INC records, as it
            reduces before it takes the absolute value); otherwise one per rank.
        softmax_sums: block-to-batch matmuls only: per head, the largest softmax
            denominator, which passes through the same op on Gaudi 2.
        experts: fused expert ops only.
    """

    op: Op
    inputs: tuple[ChannelRange, ...]
    outputs: tuple[ChannelRange, ...] | None = None
    weight: ChannelRange | None = None
    partial_products: Mapping[int, Sequence[float]] = field(default_factory=dict)
    softmax_sums: ChannelRange | None = None
    experts: ExpertChannels | None = None


@dataclass(frozen=True)
class ChannelRanges:
    """A whole model's measurement, independent of topology and device.

    Attributes:
        nodes: by vLLM module name, in module order.
        modules: all modules INC would patch, measured or not, in module order.
        num_samples: sequences measured.
    """

    nodes: Mapping[str, ChannelNode]
    modules: tuple[str, ...]
    num_samples: int

    @property
    def has_experts(self) -> bool:
        """Whether any layer has routed experts."""
        return any(node.experts is not None for node in self.nodes.values())

    def is_measured(self, topology: Topology) -> bool:
        """Whether the sums that ranks of `topology` compute were measured, in every node; otherwise they are bounds."""
        return all(
            topology.world in node.partial_products
            if node.op is Op.ROW_PARALLEL_LINEAR
            else node.experts is None or topology.key in node.experts.outputs
            for node in self.nodes.values()
        )


def derive_rank(channels: ChannelRanges, rank: int, topology: Topology, device: Device) -> RankSet[Node]:
    """Return what a measurement with `topology` would have recorded on `rank`.

    Args:
        device: the device that will serve; decides which tensors pass through the
            block-to-batch matmuls.

    Returns:
        Ranges of shape (1,), each a bf16 value.

    Raises:
        TopologyError: a tensor does not divide over the ranks; names the node.
    """
    nodes: dict[str, Node] = {}
    absent: set[str] = set()
    for name, node in channels.nodes.items():
        try:
            nodes[name] = _derive_node(node, rank, topology, device)
            if node.experts is not None:
                nodes |= _derive_experts(name, node.experts, rank, topology)
                local = {f"{name}.{child}" for child in list_children(node.experts.count)} - nodes.keys()
                absent |= local
        except TopologyError as error:
            raise TopologyError(f"{name}: {error.what}", fix=error.fix) from error
    modules = tuple(name for name in channels.modules if name not in absent)
    return RankSet(rank, topology.world, nodes, modules, channels.num_samples)


def list_children(experts: int) -> list[str]:
    """Names of a fused op's children, in module order, e.g. `w13_list.0`."""
    return [f"{part}.{index}" for part in ("w13_list", "w2_list") for index in range(experts)]


def _derive_experts(name: str, experts: ExpertChannels, rank: int, topology: Topology) -> dict[str, Node]:
    """Nodes of the weights of a rank's experts, numbered from 0; INC gives each a dummy input of 0."""
    weights = [(gate_up, down) for _, gate_up, down in experts.by_expert(rank, topology)]
    values = [one[0] for one in weights] + [one[1] for one in weights]
    names = list_children(len(weights))
    return {
        f"{name}.{child}": Node(inputs=(_one(0.0),), weight=_one(value))
        for child, value in zip(names, values, strict=True)
    }


def _derive_node(node: ChannelNode, rank: int, topology: Topology, device: Device) -> Node:
    world = topology.world
    inputs = [one.over_rank(rank, world) for one in node.inputs]
    outputs = None if node.outputs is None else [one.over_rank(rank, world) for one in node.outputs]
    if node.op is Op.ROW_PARALLEL_LINEAR and outputs is not None:
        measured = node.partial_products.get(world)
        outputs[0] = bound_partial_product(node, world) if measured is None else measured[rank % len(measured)]
    if node.op is Op.B2B_MATMUL and device is GAUDI2 and node.softmax_sums is not None and outputs is not None:
        sums = node.softmax_sums.over_rank(rank, world)
        inputs[1], outputs[0] = max(inputs[1], sums), max(outputs[0], sums)
    if node.experts is not None:
        maxima = [intermediate for intermediate, _, _ in node.experts.by_expert(rank, topology)]
        outputs = [node.experts.output(rank, topology), *maxima]
    return Node(
        inputs=tuple(_one(value) for value in inputs),
        outputs=None if outputs is None else tuple(_one(value) for value in outputs),
        weight=None if node.weight is None else _one(node.weight.over_rank(rank, world)),
    )


def bound_partial_product(node: ChannelNode, world: int) -> float:
    """Return an upper bound of a row-parallel layer's partial products over `world` ranks.

    The sum over a rank's input channels of input range times weight range: never
    smaller than the truth, often much larger. For worlds that were not measured.
    """
    assert node.weight is not None
    terms = node.inputs[0].values.astype(np.float64) * node.weight.values
    ranks = (node.inputs[0].axis.slices(rank, world) for rank in range(world))
    return float(max(sum(terms[part].sum() for part in parts) for parts in ranks))


def _one(value: float) -> np.ndarray:
    return round_to_bf16(np.array([value], dtype=np.float32))
