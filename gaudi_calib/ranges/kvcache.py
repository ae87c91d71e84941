"""KV-cache ranges into the attention matmuls that read the cache.

The second input of `matmul_qk` is what the key cache holds, that of `matmul_av` what
the value cache holds (one latent cache feeds both with MLA). Equal ranges give equal
scales, which spares a re-quantization between cache and matmul.
"""

from dataclasses import replace

from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.table import RangeTable, tabulate_ranges

_CACHES = {"matmul_qk": ("k_cache", "latent_cache_k"), "matmul_av": ("v_cache", "latent_cache_k")}


def apply_kv_cache(rank_set: RankSet[Node]) -> RankSet[Node]:
    """Give the attention matmuls the ranges of the caches they read. Idempotent.

    A matmul without a cache node beside it is left as it is.
    """
    table = tabulate_ranges(rank_set.nodes)
    inventory, changed = table.inventory, {}
    for name in inventory.names:
        parent, _, op = name.rpartition(".")
        for cache in _CACHES.get(op, ()):
            if f"{parent}.{cache}" in inventory.index:
                node = table[name]
                if len(node.inputs) > 1:
                    source = table[f"{parent}.{cache}"].inputs[0]
                    changed[name] = replace(node, inputs=(node.inputs[0], source, *node.inputs[2:]))
                break
    if any(len(node.inputs[1]) != len(table[name].inputs[1]) for name, node in changed.items()):
        return replace(rank_set, nodes={**table, **changed})
    numbers = table.numbers.copy()
    for name, node in changed.items():
        start = int(inventory.starts[inventory.index[name]]) + len(node.inputs[0])
        numbers[start : start + len(node.inputs[1])] = node.inputs[1]
    return replace(rank_set, nodes=RangeTable(inventory, numbers))
