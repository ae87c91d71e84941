"""Experts of a rank: where they are, and which of them another rank gets.

A fused op `P` records `outputs` [out, one per local expert: max |silu(gate) * up|, 0 where no
token came]. Its weights are nodes of their own, `P.w13_list.<i>` and `P.w2_list.<i>`. Experts are
numbered from 0 on every rank: under expert parallelism rank r's expert 0 is expert r * local of
the model, under tensor parallelism it is a slice of expert 0.

What `P` is called tells the age of a file:

    ...experts.routed_experts.moe_op   vLLM 0.24 and later
    ...experts.moe_op                  before
    ...experts.hpu_fused_moe.MoeOp     vllm-fork in the first half of 2025
    ...experts.hpu_fused_moe           vllm-fork, the same op without a wrapper
    ...experts.hpu_static_fused_moe    vllm-fork in 2024: no op, each expert a linear layer with inputs of its own
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import comb, log
from typing import NamedTuple

import numpy as np

from gaudi_calib.errors import TopologyError
from gaudi_calib.ranges.node import Op, find_op_by_name
from gaudi_calib.ranges.table import Inventory, RangeShape, RangeTable, locate_parts

LISTS = ("w13_list", "w2_list")
# Whose experts are linear layers like others: vllm-fork had no expert parallelism then.
_UNFUSED = re.compile(r"\.(hpu_)?static_fused_moe\.")
_FORMER_OP = re.compile(
    r"(?<=\.experts\.)(routed_experts\.moe_op|hpu_fused_moe\.MoeOp|hpu_(static_)?fused_moe)(?![^.])"
)
# Idle experts that agree on all ranks by chance are ruled out below this probability.
_COINCIDENCE = 1e-9


class ExpertLayer(NamedTuple):
    """A fused op and its expert nodes.

    Attributes:
        op: name of the fused op.
        size: experts on the rank.
        lists: by `w13_list` and `w2_list`, the position of each expert's node, in expert order.
    """

    op: str
    size: int
    lists: dict[str, np.ndarray]


class Choice(NamedTuple):
    """Which experts a rank gets, in its own order.

    Attributes:
        banks: int64, shape (experts,): the set of numbers each comes from.
        experts: int64, shape (experts,): its number there.
    """

    banks: np.ndarray
    experts: np.ndarray


Choose = Callable[[ExpertLayer], Choice]


class Regrouping(NamedTuple):
    """A rank's numbers as a selection from other ranks'.

    Attributes:
        inventory: nodes of the new rank.
        sources: int64, shape (inventory.size,): for each number, its position in the banks of
            the old ranks laid one after the other.
    """

    inventory: Inventory
    sources: np.ndarray


def find_expert_layers(inventory: Inventory) -> list[ExpertLayer]:
    """Return the layers of experts of a rank.

    Raises:
        TopologyError: experts are not numbered 0, 1, 2, ...; the lists or the fused op have
            different numbers of experts; the fused op was not measured.
    """
    layers = find_named_layers(inventory.names)
    for name, shape in zip(inventory.names, inventory.shapes, strict=True):
        if find_op_by_name(name) is not Op.DYNAMIC_MOE:
            continue
        experts = len(shape.outputs or ()) - 1
        if name not in layers and experts > 0:
            layers[name] = ExpertLayer(name, experts, {})
        if name in layers and (layers[name].size != experts or set(shape.outputs or ()) != {1}):
            raise _refuse(name, f"it has {max(experts, 0)} maxima of experts and {layers[name].size} experts")
    for name in layers:
        if name not in inventory.index:
            raise _refuse(name, "its experts were measured and it was not: no token reached the layer")
    return list(layers.values())


def find_named_layers(names: Sequence[str]) -> dict[str, ExpertLayer]:
    """Return the layers of experts that the module names `names` show, by fused op.

    Raises:
        TopologyError: experts are not numbered 0, 1, 2, ..., or the lists have different lengths.
    """
    places: dict[tuple[str, str], dict[int, int]] = {}
    for position, name in enumerate(names):
        if "_list." not in name or _UNFUSED.search(name):
            continue
        op, _, rest = name.rpartition("_list.")
        op, _, kind = op.rpartition(".")
        if f"{kind}_list" in LISTS and rest.isdecimal():
            places.setdefault((op, f"{kind}_list"), {})[int(rest)] = position
    layers: dict[str, ExpertLayer] = {}
    for (op, kind), experts in places.items():
        count = len(experts)
        if sorted(experts) != list(range(count)):
            raise _refuse(op, f"its {kind} has {count} experts that are not numbered 0 to {count - 1}")
        layer = layers.setdefault(op, ExpertLayer(op, count, {}))
        if layer.size != count:
            raise _refuse(op, f"its lists have {layer.size} and {count} experts")
        layer.lists[kind] = np.array([experts[number] for number in range(count)], dtype=np.int64)
    for op, layer in layers.items():
        if len(layer.lists) < len(LISTS):
            raise _refuse(op, f"of its lists only {', '.join(layer.lists)} is there")
    return layers


def list_children(experts: int) -> list[str]:
    """Names of a fused op's children, in module order, e.g. `w13_list.0`."""
    return [f"{part}.{index}" for part in LISTS for index in range(experts)]


def name_old(name: str) -> str:
    """What vLLM 0.23 calls a module that vLLM 0.24 and later call `name`."""
    return name.replace(".routed_experts.moe_op", ".moe_op")


def name_ageless(name: str) -> str:
    """Return what a module of experts is called whatever the age of its file.

    >>> name_ageless("model.layers.0.mlp.experts.hpu_fused_moe.MoeOp.w2_list.3")
    'model.layers.0.mlp.experts.moe_op.w2_list.3'
    """
    return _FORMER_OP.sub("moe_op", name)


def choose_joined(size: int) -> Choose:
    """Line up the experts of `size` ranks: bank 1 is the first rank, bank 0 what they share."""

    def choose(layer: ExpertLayer) -> Choice:
        experts = np.arange(layer.size)
        return Choice(np.repeat(np.arange(1, size + 1), layer.size), np.tile(experts, size))

    return choose


def choose_part(parts: int, part: int) -> Choose:
    """Take the experts of one of `parts` equal parts.

    Raises (when called):
        TopologyError: the experts do not divide.
    """

    def choose(layer: ExpertLayer) -> Choice:
        if layer.size % parts:
            raise TopologyError(
                f"{layer.size} experts do not divide over {parts} ranks",
                where=layer.op,
                why="expert parallelism gives every rank the same number of experts",
                fix="choose a number of ranks that divides the experts, or --no-expert-parallel",
            )
        local = layer.size // parts
        return Choice(np.zeros(local, dtype=np.int64), np.arange(part * local, (part + 1) * local))

    return choose


def regroup(inventory: Inventory, layers: Sequence[ExpertLayer], choose: Choose) -> Regrouping:
    """Plan a rank with other experts; everything else comes from bank 0.

    Args:
        inventory: nodes of each old rank.
        layers: its layers of experts.
        choose: which experts the new rank gets in each layer.
    """
    names: list[str] = []
    shapes: list[RangeShape] = []
    starts: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for position, layer, kind in _walk(inventory.names, layers):
        start, shape = int(inventory.starts[position]), inventory.shapes[position]
        choice = None if layer is None else choose(layer)
        if layer is None or choice is None:
            names.append(inventory.names[position])
            shapes.append(shape)
            starts.append(inventory.starts[position : position + 1])
            sizes.append(inventory.sizes[position : position + 1])
        elif kind is not None:
            places = layer.lists[kind][choice.experts]
            names += _number(layer.op, kind, len(choice.experts))
            shapes += [inventory.shapes[place] for place in places.tolist()]
            starts.append(choice.banks * inventory.size + inventory.starts[places])
            sizes.append(inventory.sizes[places])
        else:
            assert shape.outputs is not None
            names.append(layer.op)
            shapes.append(RangeShape(shape.inputs, (1,) * (1 + len(choice.experts)), shape.weight))
            shared, count = sum(shape.inputs) + 1, len(choice.experts)
            maxima = choice.banks * inventory.size + start + shared + choice.experts
            starts += (np.array([start]), maxima, np.array([start + shared + layer.size]))
            sizes += (np.array([shared]), np.ones(count, dtype=np.int64), np.array([shape.weight or 0]))
    begins, lengths = np.concatenate(starts or [np.empty(0, int)]), np.concatenate(sizes or [np.empty(0, int)])
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Regrouping(Inventory(names, shapes), np.repeat(begins, lengths) + within)


def rename_modules(names: tuple[str, ...], old: Inventory, new: Inventory, choose: Choose) -> tuple[str, ...]:
    """Return the module names `names` of a rank with other experts.

    Args:
        names: usually, and then for free, those of `old`.
        old, new: nodes before and after `choose`.

    Raises:
        TopologyError: see `find_named_layers`.
    """
    if names == old.names:
        return new.names
    layers = find_named_layers(names)
    renamed: list[str] = []
    for position, layer, kind in _walk(names, layers.values()):
        if layer is None or kind is None:
            renamed.append(names[position])
        else:
            renamed += _number(layer.op, kind, len(choose(layer).experts))
    return tuple(renamed)


def detect_expert_parallel(tables: Sequence[RangeTable], layers: Sequence[ExpertLayer]) -> bool | None:
    """Tell from idle experts whether the ranks held different experts; None where they do not tell.

    Under tensor parallelism all ranks see the same routing: an expert without a token on one
    rank has none on any. One that is idle here and active there proves expert parallelism. The
    same idle experts everywhere prove the opposite only where that cannot be a coincidence: k idle
    of L experts are the same k on N ranks with probability C(L, k) ** -(N - 1).

    Args:
        tables: all ranks, with the same nodes.
    """
    chance = 0.0
    for layer in layers:
        idle = np.array([_is_idle(table, layer) for table in tables])
        if (idle != idle[0]).any():
            return True
        chance -= (len(tables) - 1) * log(comb(layer.size, int(idle[0].sum())))
    return False if chance < log(_COINCIDENCE) else None


def list_idle_experts(table: RangeTable) -> list[tuple[str, int]]:
    """Return the experts of a rank that saw no token, each as its fused op and its number there."""
    layers = find_expert_layers(table.inventory)
    return [(layer.op, expert) for layer in layers for expert in np.flatnonzero(_is_idle(table, layer)).tolist()]


def _is_idle(table: RangeTable, layer: ExpertLayer) -> np.ndarray:
    """Whether each expert of a layer saw no token: bool, shape (experts,)."""
    position = table.inventory.index[layer.op]
    first, _ = locate_parts(table.inventory.shapes[position])["outputs", 1]
    start = int(table.inventory.starts[position]) + first
    return table.numbers[start : start + layer.size] == 0


def _walk(names: Sequence[str], layers: Iterable[ExpertLayer]) -> Iterator[tuple[int, ExpertLayer | None, str | None]]:
    """Yield every node (position, None, None), fused op (position, layer, None) and list, once, at its first node."""
    ops = {layer.op: layer for layer in layers}
    lists = {int(places.min()): (layer, kind) for layer in ops.values() for kind, places in layer.lists.items()}
    members = {place for layer in ops.values() for places in layer.lists.values() for place in places.tolist()}
    for position, name in enumerate(names):
        if position in lists:
            yield position, *lists[position]
        elif position not in members:
            yield position, ops.get(name), None


def _number(op: str, kind: str, count: int) -> list[str]:
    return [f"{op}.{kind}.{number}" for number in range(count)]


def _refuse(op: str, why: str) -> TopologyError:
    return TopologyError(
        "the experts of a layer cannot be told apart",
        where=op,
        why=why,
        fix="measure all ranks again in one run",
    )
