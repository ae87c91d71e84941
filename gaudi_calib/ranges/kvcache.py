"""KV-cache ranges into the attention matmuls that read the cache.

The second input of `matmul_qk` is what the key cache holds, that of `matmul_av` what
the value cache holds (one latent cache feeds both with MLA). Equal ranges give equal
scales, which spares a re-quantization between cache and matmul.
"""

from dataclasses import replace

from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.table import tabulate_ranges

_CACHES = {
    "matmul_qk": ("k_cache", "latent_cache_k"),
    "matmul_av": ("v_cache", "latent_cache_k"),
    "qk_matmul": ("key_cache",),
    "kv_matmul": ("value_cache",),
}


def apply_kv_cache(rank_set: RankSet[Node]) -> RankSet[Node]:
    """Give the attention matmuls the ranges of the caches they read. Idempotent.

    A matmul without a cache node beside it is left as it is.
    """
    table = tabulate_ranges(rank_set.nodes)
    changed = {}
    for name in table:
        parent, _, op = name.rpartition(".")
        caches = [f"{parent}.{cache}" for cache in _CACHES.get(op, ()) if f"{parent}.{cache}" in table]
        if caches and len(table[name].inputs) > 1:
            query, _, *rest = table[name].inputs
            changed[name] = replace(table[name], inputs=(query, table[caches[0]].inputs[0], *rest))
    return replace(rank_set, nodes=table.replace(changed))
