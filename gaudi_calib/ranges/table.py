"""All nodes of a rank as flat arrays: what merging, scaling and writing work on.

A set the size of a 256-expert model has 30,000 nodes per rank, nearly all alike. Their
names and shapes are one `Inventory`, shared by all ranks that have the same nodes; a
rank is then one float32 array. `table[name]` still is a `Node` or a `ScaleNode`, made
when it is asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, compress
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from gaudi_calib.ranges.node import Node, ScaleNode

N = TypeVar("N", Node, ScaleNode)
Part = tuple[str, int]  # ("inputs", 0)


class RangeShape(NamedTuple):
    """Channels of each of a node's ranges; None where the node has none.

    >>> RangeShape((1,), (1, 1), 1).size
    4
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...] | None = None
    weight: int | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every range, in the order of the values: inputs, outputs, weight."""
        return (*self.inputs, *(self.outputs or ()), *(() if self.weight is None else (self.weight,)))

    @property
    def size(self) -> int:
        return sum(self.channels)


@lru_cache
def locate_parts(shape: RangeShape) -> Mapping[Part, tuple[int, int]]:
    """Return where the values of each range start among those of its node, and how many channels it has.

    >>> dict(locate_parts(RangeShape((1, 4), None, 2)))
    {('inputs', 0): (0, 1), ('inputs', 1): (1, 4), ('weight', 0): (5, 2)}
    """
    counts = {"inputs": len(shape.inputs), "outputs": len(shape.outputs or ()), "weight": shape.weight is not None}
    parts = [(kind, index) for kind, count in counts.items() for index in range(count)]
    starts = accumulate(shape.channels[:-1], initial=0)
    return MappingProxyType(dict(zip(parts, zip(starts, shape.channels))))


def label_part(part: Part) -> str:
    """Return how messages call a range of a node: `inputs[0]`, `weight`."""
    return "weight" if part[0] == "weight" else f"{part[0]}[{part[1]}]"


class ScaleShape(NamedTuple):
    """Number of a node's scales, in the order of the values: inputs, outputs, weight."""

    inputs: int
    outputs: int
    weight: bool

    @property
    def size(self) -> int:
        return self.inputs + self.outputs + self.weight


S = TypeVar("S", bound=RangeShape | ScaleShape)


class Inventory(Generic[S]):
    """The nodes of a rank without their values.

    Attributes:
        names: in module order.
        shapes: one per name.
        distinct_shapes: each shape once, in the order of their first nodes.
        kinds: int64, shape (nodes,): the shape of each node as its position in `distinct_shapes`.
        sizes, starts: int64, shape (nodes,): how many values a node has, and where they start.
        size: number of all values.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[S]):
        self.names, self.shapes = tuple(names), tuple(shapes)
        found: dict[S, int] = {}
        self.kinds = np.array([found.setdefault(shape, len(found)) for shape in self.shapes], dtype=np.int64)
        self.distinct_shapes = tuple(found)
        self.sizes = self.per_node([shape.size for shape in found])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.size = int(self.sizes.sum())

    def per_node(self, facts: Sequence[int]) -> np.ndarray:
        """Spread a number per distinct shape over the nodes: int64, shape (nodes,)."""
        return np.array(facts, dtype=np.int64)[self.kinds]

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each name."""
        return {name: position for position, name in enumerate(self.names)}

    def equals(self, other: "Inventory[S]") -> bool:
        """Tell whether `other` has the same nodes in the same order."""
        if self is other:
            return True
        same_shapes = self.distinct_shapes == other.distinct_shapes and np.array_equal(self.kinds, other.kinds)
        return same_shapes and self.names == other.names

    def rename(self, names: Sequence[str]) -> "Inventory[S]":
        """Return the same nodes by other names."""
        return Inventory(names, self.shapes)

    def select(self, keep: Sequence[bool] | np.ndarray) -> "Inventory[S]":
        """Return the nodes for which `keep` is true."""
        return Inventory(tuple(compress(self.names, keep)), tuple(compress(self.shapes, keep)))


class _Table(Mapping[str, N]):
    """What `RangeTable` and `ScaleTable` share.

    Attributes:
        inventory: names and shapes of the nodes.
        numbers: float32, shape (inventory.size,).
        others: nodes that are not flat numbers (of ranges, none are).
    """

    inventory: Inventory
    numbers: np.ndarray
    others: Mapping[str, N] = MappingProxyType({})

    def __iter__(self) -> Iterator[str]:
        return iter(self.inventory.names)

    def __len__(self) -> int:
        return len(self.inventory.names)

    def __repr__(self) -> str:
        return repr(dict(self))


class RangeTable(_Table[Node]):
    """Ranges of all nodes of a rank.

    Attributes:
        inventory: their names and shapes.
        numbers: float32, shape (inventory.size,).
    """

    def __init__(self, inventory: Inventory[RangeShape], numbers: np.ndarray):
        self.inventory, self.numbers = inventory, numbers

    def __getitem__(self, name: str) -> Node:
        position = self.inventory.index[name]
        shape, start = self.inventory.shapes[position], int(self.inventory.starts[position])
        parts = _split(self.numbers, start, shape.channels)
        count = len(shape.inputs)
        weight = None if shape.weight is None else parts.pop()
        return Node(tuple(parts[:count]), None if shape.outputs is None else tuple(parts[count:]), weight)

    def equals(self, other: "RangeTable") -> bool:
        """Tell whether `other` has the same ranges of the same nodes, in the same order."""
        return self.inventory.equals(other.inventory) and np.array_equal(self.numbers, other.numbers, equal_nan=True)

    def rename(self, names: Sequence[str]) -> "RangeTable":
        """Return the same ranges by other names."""
        return RangeTable(self.inventory.rename(names), self.numbers)

    def select(self, keep: Sequence[bool] | np.ndarray) -> "RangeTable":
        """Return the nodes for which `keep`, one bool per node, is true; itself where that is all."""
        if all(keep):
            return self
        kept = np.repeat(np.asarray(keep, dtype=bool), self.inventory.sizes)
        return RangeTable(self.inventory.select(keep), self.numbers[kept])

    def replace(self, nodes: Mapping[str, Node]) -> "RangeTable":
        """Return the same nodes with other ranges for those in `nodes`."""
        if not nodes:
            return self
        shapes, pieces, end = list(self.inventory.shapes), [], 0
        for name in sorted(nodes, key=self.inventory.index.__getitem__):
            position = self.inventory.index[name]
            start, changed = int(self.inventory.starts[position]), tabulate_ranges({name: nodes[name]})
            pieces += [self.numbers[end:start], changed.numbers]
            end = start + shapes[position].size
            shapes[position] = changed.inventory.shapes[0]
        return RangeTable(Inventory(self.inventory.names, shapes), np.concatenate([*pieces, self.numbers[end:]]))

    def describe_number(self, position: int) -> tuple[str, str]:
        """Return the node and the part (`inputs[0]`) that the number at `position` belongs to."""
        inventory = self.inventory
        node = int(np.searchsorted(inventory.starts + inventory.sizes, position, side="right"))
        offset, parts = position - int(inventory.starts[node]), locate_parts(inventory.shapes[node])
        found = next(part for part, (start, channels) in parts.items() if start <= offset < start + channels)
        return inventory.names[node], label_part(found)


class ScaleTable(_Table[ScaleNode]):
    """Scales of all nodes of a rank.

    Attributes:
        inventory: names and shapes of the nodes whose scales are single numbers.
        numbers: float32, shape (inventory.size,).
        others: nodes with a scale per channel, and with `OPT` weights; in `inventory` too, with size 0.
    """

    def __init__(self, inventory: Inventory[ScaleShape], numbers: np.ndarray, others: Mapping[str, ScaleNode]):
        self.inventory, self.numbers, self.others = inventory, numbers, others

    def __getitem__(self, name: str) -> ScaleNode:
        if name in self.others:
            return self.others[name]
        position = self.inventory.index[name]
        shape, start = self.inventory.shapes[position], int(self.inventory.starts[position])
        scales = self.numbers[start : start + shape.size].tolist()
        weight = scales.pop() if shape.weight else None
        return ScaleNode(tuple(scales[: shape.inputs]), tuple(scales[shape.inputs :]), weight)


def tabulate_ranges(nodes: Mapping[str, Node]) -> RangeTable:
    """Return `nodes` as a table (itself, where it is one)."""
    if isinstance(nodes, RangeTable):
        return nodes
    shapes: list[RangeShape] = []
    arrays: list[np.ndarray] = []
    for node in nodes.values():
        shapes.append(
            RangeShape(
                tuple(map(len, node.inputs)),
                None if node.outputs is None else tuple(map(len, node.outputs)),
                None if node.weight is None else len(node.weight),
            )
        )
        arrays += [*node.inputs, *(node.outputs or ()), *(() if node.weight is None else (node.weight,))]
    return RangeTable(Inventory(tuple(nodes), shapes), join_values(arrays))


def tabulate_scales(nodes: Mapping[str, ScaleNode]) -> ScaleTable:
    """Return `nodes` as a table (itself, where it is one)."""
    if isinstance(nodes, ScaleTable):
        return nodes
    shapes: list[ScaleShape] = []
    values: list[float] = []
    others: dict[str, ScaleNode] = {}
    for name, node in nodes.items():
        scales = [*node.inputs, *node.outputs, *(() if node.weight is None else (node.weight,))]
        if all(isinstance(scale, (float, int)) for scale in scales):
            shapes.append(ScaleShape(len(node.inputs), len(node.outputs), node.weight is not None))
            values += scales
        else:
            shapes.append(ScaleShape(0, 0, False))
            others[name] = node
    return ScaleTable(Inventory(tuple(nodes), shapes), np.array(values, dtype=np.float32), others)


def join_values(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Return all values of `arrays` (any shapes) one after the other, float32, shape (values,)."""
    flat = [np.ravel(array) for array in arrays]
    return np.concatenate(flat).astype(np.float32, copy=False) if flat else np.empty(0, dtype=np.float32)


def _split(values: np.ndarray, start: int, channels: Sequence[int]) -> list[np.ndarray]:
    parts = []
    for count in channels:
        parts.append(values[start : start + count])
        start += count
    return parts
