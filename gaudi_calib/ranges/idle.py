"""Modules that INC patches, that never run, and that serving does not need: it is no error that they have no ranges.

….impl.softmax, ….impl.fused_scaled_dot_product_attention   prompts go through one of them, or past both
….mla_attn.mla_attn.matmul_qk, …                            a second set of ops, beside those of `impl`
….mlp.experts                                               it holds the op that computes for it, `moe_op`
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

from gaudi_calib.ranges.node import Op, find_op_by_name

_OF_PROMPTS = (Op.SOFTMAX, Op.FUSED_SDPA)


def find_idle(modules: Iterable[str], measured: Iterable[str]) -> set[str]:
    """Return those of `modules` that have no ranges because they never run.

    Whatever ran had a prompt first: where it went past a way through attention, all do.

    Args:
        modules: names of what INC patched (`_mod_list.json`), of any release of vLLM.
        measured: names of the nodes that have ranges.

    >>> find_idle(["a.softmax", "a.matmul_qk", "a.k_cache"], {"a.matmul_qk"})
    {'a.softmax'}
    """
    ran = set(measured)
    ops = {name: find_op_by_name(name) for name in ran.union(modules)}
    attentions = {name.rpartition(".")[0] for name in ran if _is_attention(ops[name])}
    owners = {owner for name in ran if ops[name] is Op.DYNAMIC_MOE for owner in _list_owners(name)}

    def is_idle(name: str) -> bool:
        owner = name.rpartition(".")[0]
        is_second = _is_attention(ops[name]) and owner not in attentions and f"{owner}.impl" in attentions
        return ops[name] in _OF_PROMPTS or is_second or name in owners

    return {name for name in ops.keys() - ran if is_idle(name)}


def _is_attention(op: Op) -> bool:
    return op not in (Op.LINEAR, Op.DYNAMIC_MOE)


def _list_owners(name: str) -> Iterator[str]:
    """Yield the modules around `name`, outermost first."""
    return accumulate(name.split(".")[:-1], "{}.{}".format)
