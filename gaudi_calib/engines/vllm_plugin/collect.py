"""From what the modules of one rank have seen to the rank's file."""

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from gaudi_calib.checkpoints.plan import ModelPlan
from gaudi_calib.engines.observe.nodes import attention_nodes
from gaudi_calib.engines.observe.peak import Peak
from gaudi_calib.engines.vllm_plugin.attention import ObservedAttention
from gaudi_calib.engines.vllm_plugin.experts import MeasuredExpertsMethod
from gaudi_calib.engines.vllm_plugin.linear import MeasuredLinear
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.errors import ModelError, RangeError
from gaudi_calib.layout import DUMP_NAME
from gaudi_calib.ranges.channels import ChannelNode, ChannelRanges
from gaudi_calib.ranges.derive import derive_rank, select_nodes
from gaudi_calib.ranges.layer_types import is_expert_matmul
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.sources import find_damaged
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges
from gaudi_calib.ranges.topology import Topology

Observer = TypeVar("Observer")


def collect_ranges(model: nn.Module, plan: ModelPlan, session: Session, rank: int, world: int) -> RankSet[Node]:
    """Return the ranges of this rank, with the nodes that the torch engine has, in its order.

    Args:
        model: vLLM's, the rank's part of it.
        plan: of the whole model.

    Raises:
        RangeError: nothing was measured, or a range is not finite; names the node.
        ModelError: vLLM calls a module otherwise.
    """
    linears = _find_observers(model, MeasuredLinear)
    experts = _collect_experts(model, plan)
    found = {**_collect_linears(model, linears, plan, experts), **_collect_attention(model, plan, session), **experts}
    names = tuple(name for name in plan.node_names if name in found or not is_expert_matmul(name))
    nodes = {name: found[name] for name in names if name in found}
    # The output projection may run more often than the model, for the prompt's log-probabilities.
    samples = min((linear.calls for linear in linears.values() if linear.calls), default=0)
    if not samples:
        raise RangeError(
            "nothing was measured",
            where=session.path,
            why="no request has run since the engine started, or since reset_ranges",
            fix="generate from the prompts first, then call save_ranges",
        )
    ranks = RankSet(rank, world, nodes, names, samples, dump=session.placed.dump or DUMP_NAME)
    ranks = select_nodes(ranks, session.config)
    _require_finite(tabulate_ranges(ranks.nodes))
    return ranks


def reset_modules(model: nn.Module) -> None:
    """Forget what was seen so far."""
    for _, observer in _list_observers(model):
        if isinstance(observer, (MeasuredLinear, MeasuredExpertsMethod, ObservedAttention)):
            observer.reset()


def _list_observers(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what may observe a module, its method or what stands in for its `forward`, with the module's name."""
    for name, module in model.named_modules():
        yield name, getattr(module, "quant_method", None)
        yield name, module.forward


def _find_observers(model: nn.Module, kind: type[Observer]) -> dict[str, Observer]:
    return {name: observer for name, observer in _list_observers(model) if isinstance(observer, kind)}


def _collect_experts(model: nn.Module, plan: ModelPlan) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    methods = _find_observers(model, MeasuredExpertsMethod)
    for name in plan.experts:
        method = methods.get(name.removesuffix(".moe_op"))
        if method is not None and method.input.is_seen:
            nodes |= method.to_nodes(name)
    return nodes


def _collect_linears(
    model: nn.Module, linears: dict[str, MeasuredLinear], plan: ModelPlan, experts: dict[str, Node]
) -> dict[str, Node]:
    nodes, routers, modules = {}, _find_routers(plan), {name for name, _ in model.named_modules()}
    for name, linear in plan.linears.items():
        if name not in modules:
            raise ModelError(
                f"vLLM has no module {name!r}",
                where=", ".join(linear.weights[:1]),
                why="this version of vLLM names or fuses it otherwise",
                fix="measure with `--engine torch`",
            )
        observed = linears.get(name)
        if observed is not None and observed.input.is_seen:
            nodes[name] = observed.to_node()
        elif observed is None and routers.get(linear.modules) in experts:
            # vLLM's class for routers bypasses quantization methods; its input is that of the experts.
            peak = Peak()
            peak.observe(plan.read_weight(name))
            nodes[name] = Node(experts[routers[linear.modules]].inputs, weight=peak.to_range())
    return nodes


def _find_routers(plan: ModelPlan) -> dict[tuple[str, ...], str]:
    """Nodes of the experts by the Hugging Face modules of their routers."""
    facts = plan.layout.experts
    if facts is None:
        return {}
    return {(f"{layer}.{facts.router}",): plan.node_name(index, facts.name) for index, layer in enumerate(plan.layers)}


def _collect_attention(model: nn.Module, plan: ModelPlan, session: Session) -> dict[str, Node]:
    """Nodes of the attention ops: this rank's heads are all there are, as with one rank."""
    channels: dict[str, ChannelNode] = {}
    layers = _find_observers(model, ObservedAttention)
    for index in plan.attention_layers:
        observed = layers.get(plan.node_name(index, plan.layout.attention.name))
        if observed is not None and observed.ranges.peaks:
            channels |= attention_nodes(plan, index, observed.ranges)
    return dict(derive_rank(ChannelRanges(channels, (), 0), 0, Topology(1), session.device).nodes)


def _require_finite(table: RangeTable) -> None:
    for name, _, _ in find_damaged(table):
        raise RangeError(
            f"{name} saw NaN or infinity",
            where=name,
            why="the model overflows on one of the prompts, or its weights are damaged",
            fix="measure with `--engine torch`, which names the sample, or check the weights",
        )
