"""What each rank of a topology sees of a model that was measured per channel."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gaudi_calib.errors import TopologyError, UsageError
from gaudi_calib.fp8 import GAUDI2, Device
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.channels import ChannelNode, ChannelRange, ChannelRanges, ExpertChannels
from gaudi_calib.ranges.experts import list_children, name_old
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import OPTIONAL_OUTPUTS, Node, Op, RankSet, find_op
from gaudi_calib.ranges.table import tabulate_ranges
from gaudi_calib.ranges.topology import Topology

if TYPE_CHECKING:
    from gaudi_calib.config.model import QuantConfig

# First vLLM whose fused expert ops are called `...experts.routed_experts.moe_op`; before, `...experts.moe_op`.
ROUTED_EXPERTS_SINCE = (0, 24)
# What "a current one" is where no version is given.
_CURRENT_VLLM = (0, 32)


def derive_world(
    channels: ChannelRanges, topology: Topology, device: Device, config: "QuantConfig", vllm: str | None = None
) -> list[RankSet[Node]]:
    """Return the ranges of every rank, with the caches' in the attention matmuls and without what `config` leaves out.

    Args:
        vllm: version of the vLLM that will serve, which decides what expert ops are called; None: a current one.

    Raises:
        TopologyError: a tensor does not divide over the ranks; names the node.
        RangeError: `config` measures outputs, and `channels` has none.
    """
    outputs = config.measures_outputs
    ranks = (derive_rank(channels, rank, topology, device, outputs=outputs) for rank in range(topology.world))
    derived = [select_nodes(apply_kv_cache(rank_set), config) for rank_set in ranks]
    return derived if _routes_experts(vllm) else [_rename_experts(rank_set) for rank_set in derived]


def parse_vllm_version(vllm: str | None) -> tuple[int, ...]:
    """Return (major, minor) of a version of vLLM; of None, that of a current one.

    Raises:
        UsageError: it is no version.

    >>> parse_vllm_version("0.11.2")
    (0, 11)
    """
    if vllm is None:
        return _CURRENT_VLLM
    parts = vllm.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        raise UsageError(f"{vllm!r} is not a version of vLLM", fix="give it as MAJOR.MINOR, for example 0.23")
    return tuple(int(part) for part in parts[:2])


def _routes_experts(vllm: str | None) -> bool:
    return parse_vllm_version(vllm) >= ROUTED_EXPERTS_SINCE


def name_served(name: str, vllm: str | None) -> str:
    """What this version of vLLM calls a module; None: a current one."""
    return name if _routes_experts(vllm) else name_old(name)


def _rename_experts(rank_set: RankSet[Node]) -> RankSet[Node]:
    """Call fused expert ops as older vLLM does."""
    table = tabulate_ranges(rank_set.nodes)
    nodes = table.rename(tuple(map(name_old, table)))
    return replace(rank_set, nodes=nodes, modules=tuple(map(name_old, rank_set.modules)))


def select_nodes(rank_set: RankSet[Node], config: "QuantConfig") -> RankSet[Node]:
    """Leave out the nodes that `config` blocks."""
    table = tabulate_ranges(rank_set.nodes)
    shapes = dict(zip(table.inventory.names, table.inventory.shapes, strict=True))

    def is_kept(name: str) -> bool:
        layer_type = find_layer_type(name, find_op(name, shapes[name])) if name in shapes else None
        return not config.is_blocked(name, layer_type)

    modules = tuple(filter(is_kept, rank_set.modules))
    return replace(rank_set, nodes=table.select([is_kept(name) for name in table]), modules=modules)


def derive_rank(
    channels: ChannelRanges, rank: int, topology: Topology, device: Device, *, outputs: bool = False
) -> RankSet[Node]:
    """Return what a measurement with `topology` would have recorded on `rank`.

    Args:
        device: the device that will serve; decides which tensors pass through the
            block-to-batch matmuls.
        outputs: of every node, not only those that INC needs.

    Returns:
        Ranges of shape (1,), each a bf16 value.

    Raises:
        TopologyError: a tensor does not divide over the ranks; names the node.
        RangeError: outputs are wanted and were not measured.
    """
    if outputs:
        channels.require_outputs()
    nodes: dict[str, Node] = {}
    absent: set[str] = set()
    for name, node in channels.nodes.items():
        try:
            nodes[name] = _derive_node(node, rank, topology, device, optional=outputs)
            if node.experts is not None:
                nodes |= _derive_experts(name, node.experts, rank, topology, outputs=outputs)
                local = {f"{name}.{child}" for child in list_children(node.experts.count)} - nodes.keys()
                absent |= local
        except TopologyError as error:
            raise TopologyError(f"{name}: {error.what}", fix=error.fix) from error
    modules = tuple(name for name in channels.modules if name not in absent)
    return RankSet(rank, topology.world, tabulate_ranges(nodes), modules, channels.num_samples)


def _derive_experts(
    name: str, experts: ExpertChannels, rank: int, topology: Topology, *, outputs: bool
) -> dict[str, Node]:
    """Nodes of the weights of a rank's experts, numbered from 0; INC gives each dummies of 0: they never run."""
    _, gate_up, down = zip(*experts.by_expert(rank, topology), strict=True)
    children = zip(list_children(len(down)), gate_up + down, strict=True)
    dummy = (_to_range(0.0),)
    return {
        f"{name}.{child}": Node(dummy, dummy if outputs else None, weight=_to_range(weight))
        for child, weight in children
    }


def _list_outputs(node: ChannelNode, *, optional: bool) -> tuple[ChannelRange, ...] | None:
    """Outputs as measured; those that INC can do without only where they are wanted."""
    if node.op in OPTIONAL_OUTPUTS and not optional:
        return None
    return node.inputs if node.op is Op.KV_CACHE else node.outputs


def _derive_node(node: ChannelNode, rank: int, topology: Topology, device: Device, *, optional: bool) -> Node:
    world, measured_outputs = topology.world, _list_outputs(node, optional=optional)
    inputs = [channels.over_rank(rank, world) for channels in node.inputs]
    outputs = None if measured_outputs is None else [channels.over_rank(rank, world) for channels in measured_outputs]
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
        tuple(map(_to_range, inputs)),
        None if outputs is None else tuple(map(_to_range, outputs)),
        None if node.weight is None else _to_range(node.weight.over_rank(rank, world)),
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


def _to_range(value: float) -> np.ndarray:
    return round_to_bf16(np.array([value], dtype=np.float32))
