"""Which ranges scales come from: what cards leave in the others is passed on as it is, whatever it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.ranges.node import Node, RankSet
from gaudi_calib.ranges.sources import find_damaged, list_read
from gaudi_calib.ranges.table import tabulate_ranges
from gaudi_calib.rankfiles.store import write_rank_set
from gaudi_calib.scales.compute import compute_scales

IMPL = "model.layers.0.self_attn.attn.impl"
ONE, NAN, INF = (np.float32([value]) for value in (1, np.nan, np.inf))
# One node of each form, and which of its ranges scales come from; both with outputs that a usual measurement has
# not (`measure_exclude: NONE`).
FORMS = {
    "linear": ("lm_head", Node((ONE,), (ONE,), ONE), {"inputs[0]", "weight"}),
    "row parallel": ("mlp.down_proj", Node((ONE,), (ONE, ONE), ONE), {"inputs[0]", "outputs[0]", "weight"}),
    "matmul": (f"{IMPL}.matmul_qk", Node((ONE, ONE), (ONE,)), {"inputs[0]", "inputs[1]"}),
    "b2b matmul": (f"{IMPL}.batch2block_matmul", Node((ONE, ONE), (ONE,)), {"inputs[0]", "outputs[0]"}),
    "old b2b matmul": (f"{IMPL}.batch2block_matmul", Node((ONE, ONE)), {"inputs[0]", "inputs[1]"}),
    "cache": (f"{IMPL}.k_cache", Node((ONE,), (ONE,)), {"inputs[0]"}),
    "softmax": (f"{IMPL}.softmax", Node((ONE,), (ONE,)), {"outputs[0]"}),
    "fused": (
        f"{IMPL}.fused_scaled_dot_product_attention",
        Node((ONE,) * 3, (ONE, ONE)),
        {"inputs[0]", "inputs[1]", "inputs[2]", "outputs[0]", "outputs[1]"},
    ),
    "experts": (
        "mlp.experts.moe_op",
        Node((ONE,), (ONE,) * 3),
        {"inputs[0]", "outputs[0]", "outputs[1]", "outputs[2]"},
    ),
}
# What real cards left where nobody reads it.
LEFT = {
    f"{IMPL}.softmax": Node((INF,), (ONE,)),
    f"{IMPL}.block2batch_matmul": Node((ONE, NAN), (ONE,)),
    "model.layers.0.mlp.shared_experts.down_proj": Node((ONE,), (ONE, NAN), ONE),
}


def spoil(node: Node, part: str, value: np.ndarray) -> Node:
    """Return `node` with another range for `part`."""
    kind, _, index = part.partition("[")
    if not index:
        return Node(node.inputs, node.outputs, value)
    ranges = list(getattr(node, kind))
    ranges[int(index.rstrip("]"))] = value
    parts = {"inputs": node.inputs, "outputs": node.outputs, "weight": node.weight, kind: tuple(ranges)}
    return Node(**parts)


def list_parts(node: Node) -> list[str]:
    inputs = [f"inputs[{index}]" for index in range(len(node.inputs))]
    outputs = [f"outputs[{index}]" for index in range(len(node.outputs or ()))]
    return [*inputs, *outputs, *([] if node.weight is None else ["weight"])]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_scales_depend_on(form: str) -> None:
    """Another value changes the scales of a node, or does not; NaN is an error there, or is not."""
    name, node, read = FORMS[form]
    assert list_read(name, node) & set(list_parts(node)) == read

    def scale(node: Node) -> object:
        ranks = RankSet(0, 1, {name: node})
        return repr(dict(compute_scales(ranks, "maxabs_pow2", GAUDI2, weights=lambda _: None).nodes))

    for part in list_parts(node):
        changed, damaged = (RankSet(0, 1, {name: spoil(node, part, value)}) for value in (64 * ONE, NAN))
        assert (scale(changed.nodes[name]) != scale(node)) == (part in read), part
        found = list(find_damaged(tabulate_ranges(damaged.nodes)))
        assert [(where, label) for where, label, _ in found] == ([(name, part)] if part in read else [])


@pytest.mark.parametrize(
    ("words", "world", "after"),
    [
        (["unify", "-r", "1"], 2, 1),
        (["expand", "-w", "4"], 1, 4),
        (["postprocess"], 2, 2),
        (["merge"], 1, 1),
        (["merge"], 2, 2),
    ],
    ids=["unify", "expand", "postprocess", "merge", "merge of two ranks"],
)
def test_commands_pass_on_what_nobody_reads(words: list[str], world: int, after: int, tmp_path: Path) -> None:
    """NaN and inf stay where they are, in json and npz; scales are computed from the rest."""
    source, out = tmp_path / "g2", tmp_path / "out" / "g2"
    for rank in range(world):
        ranks = RankSet(rank, world, LEFT, tuple(LEFT))
        write_rank_set(source, ranks)
        write_rank_set(source, compute_scales(ranks, "maxabs_hw", GAUDI2, weights=lambda _: None), method="MAXABS_HW")
    places = ["-m", str(source)]
    if words[0] == "merge":
        places = [str(source), str(shutil.copytree(source, tmp_path / "other" / "g2"))]
    assert main([words[0], *places, *words[1:], "-o", str(out)]) == 0
    for rank in range(after):
        path = out / f"inc_output_hooks_maxabs_{rank}_{after}.json"
        shown = json.loads(path.read_text())["Nodes"]
        stored = np.load(path.with_suffix(".npz"), allow_pickle=True)["arr_0"].item()["Nodes"]
        for nodes in (shown, stored):
            assert np.isinf(nodes[f"{IMPL}.softmax"]["inputs"][0]).all()
            assert np.isnan(nodes[f"{IMPL}.block2batch_matmul"]["inputs"][1]).all()
            assert np.isnan(nodes["model.layers.0.mlp.shared_experts.down_proj"]["outputs"][1]).all()
        if words[0] in ("unify", "expand"):
            scales = json.loads((out / f"inc_output_hooks_maxabs_MAXABS_HW_{rank}_{after}.json").read_text())
            assert scales["Nodes"].keys() == LEFT.keys()


def test_worlds_that_nobody_could_tell_apart_are_equal(tmp_path: Path) -> None:
    """NaN that is passed on is no difference: several worlds that give the same are no question."""
    for world in (2, 4):
        for rank in range(world):
            write_rank_set(tmp_path, RankSet(rank, world, LEFT, tuple(LEFT)))
    assert main(["unify", "-m", str(tmp_path), "-r", "1"]) == 0
