"""Which of a node's ranges INC computes scales from; it reads no others, and those may hold anything.

Not read, and not finite in files of real cards: what enters softmax, where a mask passes through it; the second
output of row-parallel layers, uninitialised memory with one rank and where the layer leaves summing to others
(shared experts); what enters block-to-batch matmuls beside their map.
"""

from collections.abc import Iterator

import numpy as np

from gaudi_calib.ranges.node import Measured, Op, find_op
from gaudi_calib.ranges.table import Part, RangeTable, label_part


def find_sources(op: Op, node: Measured) -> tuple[list[Part], Part | None]:
    """Return the ranges that the inputs' scales come from, and that of the output where it has its own."""
    if op is Op.MATMUL or (op is Op.B2B_MATMUL and node.outputs is None):  # before INC 1.24
        return [("inputs", 0), ("inputs", 1)], None
    if op is Op.B2B_MATMUL:
        return [("inputs", 0), ("outputs", 0)], None
    if op is Op.SOFTMAX:
        return [], ("outputs", 0)
    if op is Op.FUSED_SDPA:
        return [("inputs", 0), ("inputs", 1), ("inputs", 2), ("outputs", 1)], ("outputs", 0)
    if op is Op.DYNAMIC_MOE:
        return [("inputs", index) for index in range(len(node.inputs))] + list_experts(op, node), ("outputs", 0)
    return [("inputs", 0)], ("outputs", 0) if op is Op.ROW_PARALLEL_LINEAR else None


def list_experts(op: Op, node: Measured) -> list[Part]:
    """Return the ranges of a fused op that are of one expert each, in their order; none of another op."""
    return [("outputs", index) for index in range(1, len(node.outputs or ()))] if op is Op.DYNAMIC_MOE else []


def list_read(name: str, node: Measured) -> set[str]:
    """Return the ranges of node `name` that a scale may come from, as `label_part` calls them.

    >>> from gaudi_calib.ranges.table import RangeShape
    >>> sorted(list_read("model.layers.0.mlp.down_proj", RangeShape((1,), (1, 1), 1)))
    ['inputs[0]', 'outputs[0]', 'weight']
    """
    inputs, output = find_sources(find_op(name, node), node)
    return {"weight", *map(label_part, inputs), *([label_part(output)] if output else [])}


def find_damaged(table: RangeTable) -> Iterator[tuple[str, str, float]]:
    """Yield node, part and value of every range that is NaN or infinite and that is read."""
    for position in np.flatnonzero(~np.isfinite(table.numbers)).tolist():
        name, part = table.describe_number(position)
        if part in list_read(name, table.inventory.shapes[table.inventory.index[name]]):
            yield name, part, float(table.numbers[position])
