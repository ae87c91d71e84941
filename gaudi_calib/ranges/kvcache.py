"""KV-cache ranges into the attention matmuls that read the cache.

The second input of `matmul_qk` is what the key cache holds, that of `matmul_av` what
the value cache holds (one latent cache feeds both with MLA). Equal ranges give equal
scales, which spares a re-quantization between cache and matmul.
"""

from dataclasses import replace
from pathlib import Path

from gaudi_calib.errors import FileError
from gaudi_calib.files import stage_files
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.store import list_worlds, read_ranges, write_rank_set

_CACHES = {"matmul_qk": ("k_cache", "latent_cache_k"), "matmul_av": ("v_cache", "latent_cache_k")}


def apply_kv_cache(rank_set: RankSet[Node]) -> RankSet[Node]:
    """Give the attention matmuls the ranges of the caches they read. Idempotent.

    A matmul without a cache node beside it is left as it is.
    """
    nodes = dict(rank_set.nodes)
    for name, node in rank_set.nodes.items():
        parent, _, op = name.rpartition(".")
        for cache in _CACHES.get(op, ()):
            source = rank_set.nodes.get(f"{parent}.{cache}")
            if source is not None and len(node.inputs) > 1:
                nodes[name] = replace(node, inputs=(node.inputs[0], source.inputs[0], *node.inputs[2:]))
                break
    return replace(rank_set, nodes=nodes)


def postprocess_dir(directory: Path, out: Path) -> list[Path]:
    """Apply `apply_kv_cache` to every rank of every world in `directory`.

    Args:
        out: where the results go; may be `directory` itself.

    Returns:
        The files written.

    Raises:
        FileError: no ranges in `directory`, or one is malformed; nothing is written.
    """
    files = [path for ranks in list_worlds(directory).values() for path in ranks.values()]
    if not files:
        raise FileError("no ranges to postprocess", where=directory, fix="run `gaudi-calib measure` first")
    rank_sets = [apply_kv_cache(read_ranges(path)) for path in files]
    with stage_files(out) as staging:
        written = [path for one in rank_sets for path in write_rank_set(staging, one)]
    return [out / path.name for path in written]
