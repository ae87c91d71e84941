"""KV-cache ranges into the attention matmuls that read the cache.

The second input of `matmul_qk` is what the key cache holds, that of `matmul_av` what
the value cache holds (one latent cache feeds both with MLA). Equal ranges give equal
scales, which spares a re-quantization between cache and matmul.
"""

from dataclasses import replace
from pathlib import Path

from gaudi_calib.errors import FileError
from gaudi_calib.files import stage_files
from gaudi_calib.ranges.background import BackgroundWriter
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.store import list_worlds, read_world_files, render_rank_sets
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


def postprocess_dir(directory: Path, out: Path) -> list[Path]:
    """Apply `apply_kv_cache` to every rank of every world in `directory`.

    Args:
        out: where the results go; may be `directory` itself.

    Returns:
        The files written.

    Raises:
        FileError: no ranges in `directory`, or one is malformed; nothing is written.
    """
    worlds = list_worlds(directory).values()
    if not worlds:
        raise FileError("no ranges to postprocess", where=directory, fix="run `gaudi-calib measure` first")
    rank_sets = [apply_kv_cache(one) for ranks in worlds for one in read_world_files(list(ranks.values()))]
    with stage_files(out) as staging, BackgroundWriter() as writer:
        written = render_rank_sets(staging, rank_sets, writer)
    return [out / path.name for path in written]
