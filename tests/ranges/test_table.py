"""A rank as flat arrays: parts of it are views of the same nodes."""

import numpy as np

from gaudi_calib.ranges.node import Node
from gaudi_calib.ranges.table import tabulate_ranges

NODES = {
    "a": Node((np.float32([1, 2]),), None, np.float32([3])),
    "empty": Node(()),
    "b": Node((np.float32([4]),), (np.float32([5]), np.float32([6]))),
    "c": Node((np.float32([7, 8]),), None, np.float32([9])),
}


def test_a_table_gives_back_its_nodes():
    """In their order, with their channels; nodes of one shape are of one kind."""
    table = tabulate_ranges(NODES)
    assert repr(dict(table)) == repr(NODES)
    assert table.inventory.kinds.tolist() == [0, 1, 2, 0]


def test_selected_nodes_keep_their_order_and_numbers():
    """As if the others had never been there."""
    table = tabulate_ranges(NODES)
    chosen = table.select([name in "bc" for name in table])
    assert repr(dict(chosen)) == repr({name: NODES[name] for name in "bc"})
    assert chosen.inventory.equals(tabulate_ranges({name: NODES[name] for name in "bc"}).inventory)
    assert table.select([True] * 4) is table and len(table.select([False] * 4)) == 0


def test_renamed_nodes_keep_their_numbers():
    """Only the names differ."""
    table = tabulate_ranges(NODES)
    renamed = table.rename([name.upper() for name in table])
    assert repr(dict(renamed)) == repr({name.upper(): node for name, node in NODES.items()})
    assert not renamed.inventory.equals(table.inventory)


def test_a_number_is_called_by_its_node_and_part():
    """Also after a node without numbers."""
    table = tabulate_ranges(NODES)
    found = [table.describe_number(position) for position in range(table.inventory.size)]
    assert found == [
        *[("a", "inputs[0]")] * 2,
        ("a", "weight"),
        ("b", "inputs[0]"),
        ("b", "outputs[0]"),
        ("b", "outputs[1]"),
        *[("c", "inputs[0]")] * 2,
        ("c", "weight"),
    ]


def test_replaced_nodes_may_have_other_shapes():
    """Other nodes keep their ranges and places; a node may grow by channels."""
    one, two = np.ones(1, np.float32), np.full(2, 2, np.float32)
    table = tabulate_ranges({"a": Node((one,), weight=one), "b": Node((one, one)), "c": Node((one,))})
    changed = table.replace({"b": Node((one, two)), "a": Node((one,), weight=one * 3)})
    assert list(changed) == ["a", "b", "c"]
    assert changed["a"].weight == 3 and changed["b"].inputs[1].tolist() == [2, 2] and changed["c"].inputs[0] == 1
    assert table["b"].inputs[1].tolist() == [1] and table.replace({}) is table
