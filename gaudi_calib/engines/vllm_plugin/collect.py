"""From what the modules of one rank have seen to the rank's file."""

import numpy as np
from torch import nn

from gaudi_calib.checkpoints.plan import LinearPlan, ModelPlan
from gaudi_calib.engines.observe.nodes import attention_nodes
from gaudi_calib.engines.observe.peak import Peak
from gaudi_calib.engines.vllm_plugin.attention import OBSERVED
from gaudi_calib.engines.vllm_plugin.experts import MeasuredExpertsMethod
from gaudi_calib.engines.vllm_plugin.linear import ObservedLinear
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.errors import ModelError, RangeError
from gaudi_calib.layout import DUMP_NAME
from gaudi_calib.ranges.channels import ChannelNode, ChannelRanges
from gaudi_calib.ranges.derive import derive_rank, select_nodes
from gaudi_calib.ranges.layer_types import is_expert_matmul
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.topology import Topology


def collect_ranges(model: nn.Module, plan: ModelPlan, session: Session, rank: int, world: int) -> RankSet[Node]:
    """Return the ranges of this rank, with the nodes that the torch engine has, in its order.

    Args:
        model: vLLM's, the rank's part of it.
        plan: of the whole model.

    Raises:
        RangeError: nothing was measured, or a range is not finite; names the node.
        ModelError: vLLM calls a module otherwise.
    """
    modules = dict(model.named_modules())
    experts = _collect_experts(modules, plan)
    found = {**_collect_linears(modules, plan, experts), **_collect_attention(modules, plan, session), **experts}
    names = tuple(name for name in plan.node_names if name in found or not is_expert_matmul(name))
    nodes = {name: found[name] for name in names if name in found}
    # The output projection may run more often than the model, for the prompt's log-probabilities.
    samples = min((linear.calls for linear in _find_linears(modules).values() if linear.calls), default=0)
    if not samples:
        raise RangeError(
            "nothing was measured",
            where=session.path,
            why="no request has run since the engine started, or since reset_ranges",
            fix="generate from the prompts first, then call save_ranges",
        )
    ranks = RankSet(rank, world, nodes, names, samples, dump=session.placed.dump or DUMP_NAME)
    ranks = select_nodes(ranks, session.config)
    for name, node in ranks.nodes.items():
        _require_finite(name, node)
    return ranks


def reset_modules(model: nn.Module) -> None:
    """Forget what was seen so far."""
    modules = dict(model.named_modules())
    for linear in _find_linears(modules).values():
        linear.reset()
    for experts in _find_experts(modules).values():
        experts.reset()
    for module in modules.values():
        if hasattr(module, OBSERVED):
            getattr(module, OBSERVED).reset()


def _find_linears(modules: dict[str, nn.Module]) -> dict[str, ObservedLinear]:
    """Observed linear layers by the name of their module."""
    observed = {
        name: getattr(getattr(module, "quant_method", None), "observed", None) for name, module in modules.items()
    }
    return {name: linear for name, linear in observed.items() if isinstance(linear, ObservedLinear)}


def _find_experts(modules: dict[str, nn.Module]) -> dict[str, MeasuredExpertsMethod]:
    """Observed experts by the name of their module."""
    methods = {name: getattr(module, "quant_method", None) for name, module in modules.items()}
    return {name: method for name, method in methods.items() if isinstance(method, MeasuredExpertsMethod)}


def _collect_experts(modules: dict[str, nn.Module], plan: ModelPlan) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    observed = _find_experts(modules)
    for name in plan.experts:
        method = observed.get(name.removesuffix(".moe_op"))
        if method is not None and method.input.is_seen:
            nodes |= method.to_nodes(name)
    return nodes


def _collect_linears(modules: dict[str, nn.Module], plan: ModelPlan, experts: dict[str, Node]) -> dict[str, Node]:
    nodes, routers, linears = {}, _find_routers(plan), _find_linears(modules)
    for name, linear in plan.linears.items():
        if name not in modules:
            raise _unknown_module(name, linear)
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


def _collect_attention(modules: dict[str, nn.Module], plan: ModelPlan, session: Session) -> dict[str, Node]:
    """Nodes of the attention ops: this rank's heads are all there are, as with one rank."""
    channels: dict[str, ChannelNode] = {}
    for index in plan.attention_layers:
        observed = getattr(modules.get(plan.node_name(index, plan.layout.attention.name)), OBSERVED, None)
        if observed is not None and observed.ranges.peaks:
            channels |= attention_nodes(plan, index, observed.ranges)
    return dict(derive_rank(ChannelRanges(channels, (), 0), 0, Topology(1), session.device).nodes)


def _require_finite(name: str, node: Node) -> None:
    ranges = [*node.inputs, *(node.outputs or ()), *(() if node.weight is None else (node.weight,))]
    if not all(np.isfinite(values).all() for values in ranges):
        raise RangeError(
            f"{name} saw NaN or infinity",
            where=name,
            why="the model overflows on one of the prompts, or its weights are damaged",
            fix="measure with `--engine torch`, which names the sample, or check the weights",
        )


def _unknown_module(name: str, linear: LinearPlan) -> ModelError:
    return ModelError(
        f"vLLM has no module {name!r}",
        where=", ".join(linear.weights[:1]),
        why="this version of vLLM names or fuses it otherwise",
        fix="measure with `--engine torch`",
    )
