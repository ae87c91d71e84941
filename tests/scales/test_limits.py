"""Which ranges make bad scales."""

import numpy as np
import pytest

from gaudi_calib.config.methods import MethodTable, get_scale_method
from gaudi_calib.fp8 import GAUDI2, GAUDI3, Device
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.scales.limits import find_limits

EXPERTS = "model.layers.0.mlp.experts.routed_experts.moe_op"


def one(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def find(nodes: dict[str, Node], method: str = "maxabs_hw", device: Device = GAUDI2) -> list[tuple[str, str]]:
    """What is found and where, for two ranks that are alike."""
    table = MethodTable(get_scale_method(method))
    findings = find_limits([RankSet(rank, 2, nodes) for rank in range(2)], table, device)
    return [(finding.what, finding.where) for finding in findings]


def test_zeros_that_are_no_news_are_passed_over() -> None:
    """Made-up inputs of expert weights, experts without tokens, and ranges that no scale comes from."""
    nodes = {
        EXPERTS: Node((one(1),), (one(1), one(0), one(1))),
        f"{EXPERTS}.w13_list.0": Node((one(0),), None, one(1)),
        "layers.0.attn.batch2block_matmul": Node((one(1), one(0)), (one(1),)),
        "layers.0.mlp.down_proj": Node((one(1),), (one(1), one(np.nan)), one(1)),
    }
    assert find(nodes) == []


def test_zeros_are_counted_once_for_all_ranks() -> None:
    """Inputs, outputs that scales come from, weights; the input of the fused op, too."""
    nodes = {
        "lm_head": Node((one(0),), None, one(0)),
        EXPERTS: Node((one(0),), (one(1), one(0))),
        f"{EXPERTS}.w2_list.0": Node((one(0),), None, one(0)),
    }
    where = f"lm_head inputs[0], lm_head weight, {EXPERTS} inputs[0], {EXPERTS}.w2_list.0 weight"
    assert find(nodes) == [("ranges of 0: 4", where)]
    assert find(nodes, "unit_scale") == []


@pytest.mark.parametrize(("device", "largest"), [(GAUDI2, 240 * 16), (GAUDI3, 448 * 128)])
def test_saturation_begins_behind_the_largest_free_scale(device: Device, largest: float) -> None:
    """What just fits is no saturation; scales that are any power of two have no limit."""
    nodes = {"layers.0.attn.k_cache": Node((one(largest),)), "lm_head": Node((one(1),), None, one(largest))}
    assert find(nodes, device=device) == []
    nodes["layers.0.attn.v_cache"] = Node((one(largest * 1.01),))
    ((what, where),) = find(nodes, device=device)
    assert what == f"ranges beyond {largest:g}, the most that {device.name} scales at no cost: 1"
    assert where == "layers.0.attn.v_cache inputs[0]"
    assert find(nodes, "maxabs_pow2", device) == []


def test_an_expert_saturates_as_any_other_module() -> None:
    """One of a published DeepSeek-R1 does; what is infinite is no question of limits."""
    nodes = {EXPERTS: Node((one(np.inf),), (one(1), one(120832), one(0)))}
    ((_, where),) = find(nodes, device=GAUDI3)
    assert where == f"{EXPERTS} outputs[1]"


def test_many_names_are_cut() -> None:
    """The first five are named, all are counted."""
    nodes = {f"layers.{layer}.attn.k_cache": Node((one(0),)) for layer in range(40)}
    ((what, where),) = find(nodes)
    assert what == "ranges of 0: 40"
    assert where.endswith("layers.4.attn.k_cache inputs[0], and 35 more")
