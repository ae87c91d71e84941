"""Scales equal those that real Gaudis wrote; INC's division on a CPU gives others."""

import json
from dataclasses import replace

import numpy as np
import pytest

from gaudi_calib.config.methods import SCALE_METHODS, get_scale_method
from gaudi_calib.fp8 import GAUDI2, GAUDI3, get_device
from gaudi_calib.scales.compute import compute_scales
from gaudi_calib.scales.precision import BF16
from gaudi_calib.scales.tensor import scale_ranges
from tests.support import paths
from tests.support.scales import to_json, to_rank

REAL = paths.GOLDEN / "real"


def flatten(node: dict) -> list[float]:
    """All scales of a node; INC of one age writes a number, of another a list of it."""
    return np.concatenate(list(map(np.ravel, [node["inputs"], node["outputs"], *node["params"].values()]))).tolist()


def compute(ranges: dict, method: str, device: str, **arithmetic: bool) -> dict[str, dict]:
    scales = compute_scales(to_rank(ranges), method, get_device(device), weights=lambda _: None, **arithmetic)
    return {name: to_json(node) for name, node in scales.nodes.items()}


@pytest.mark.parametrize(
    ("device", "method", "name", "divided_wrong"),
    [
        ("g3", "maxabs_arbitrary", "deepseek-r1_maxabs_arbitrary_g3_0_8", 44),
        ("g3", "maxabs_hw", "llama-3.1-70b_maxabs_hw_g3_1_2", 6),
        ("g3", "maxabs_hw", "llama-4-maverick_maxabs_hw_g3_1_8", 8),
        ("g2", "maxabs_hw", "deepseek-r1-distill-llama-70b_maxabs_hw_g2_3_4", 2),
    ],
)
def test_scales_of_real_ranges_are_those_the_card_wrote(device: str, method: str, name: str, divided_wrong: int):
    """Inputs, outputs and weights of whole layers, experts too; dividing misses some of each set."""
    real = json.loads((REAL / f"{name}.json").read_text())
    expected = {node: flatten(scales) for node, scales in real["scales"].items()}
    ours = compute(real["ranges"], method, device)
    assert {node: flatten(scales) for node, scales in ours.items()} == expected
    divided = compute(real["ranges"], method, device, as_on_cpu=True)
    wrong = (a != b for node, scales in divided.items() for a, b in zip(flatten(scales), expected[node], strict=True))
    assert sum(wrong) == divided_wrong


@pytest.mark.parametrize(
    ("key", "count", "divided_wrong"),
    [
        ("llama-3.1-70b|MAXABS_HW|GAUDI3|input", 825, 4),
        ("llama-3.1-70b|MAXABS_HW|GAUDI3|weight", 575, 3),
        ("deepseek-r1|MAXABS_ARBITRARY|GAUDI3|input", 774, 286),
        ("deepseek-r1|MAXABS_ARBITRARY|GAUDI3|weight", 630, 221),
        ("llama-4-maverick|MAXABS_HW|GAUDI3|input", 566, 5),
        ("llama-4-maverick|MAXABS_HW|GAUDI3|weight", 498, 0),
        ("deepseek-r1-distill-llama-70b|MAXABS_HW|GAUDI2|input", 788, 0),
        ("deepseek-r1-distill-llama-70b|MAXABS_HW|GAUDI2|weight", 412, 1),
        ("qwen3-235b-a22b|MAXABS_HW|GAUDI2|input", 1334, 1),
        ("qwen3-235b-a22b|MAXABS_HW|GAUDI2|weight", 623, 1),
    ],
)
def test_every_scale_that_a_card_made_of_a_range_follows_from_it(key: str, count: int, divided_wrong: int):
    """All distinct pairs of a range and its scale in whole sets, ranges of 0 too."""
    with np.load(REAL / "scale_pairs.npz") as pairs:
        ranges, scales = pairs[key].T
    _, method, card, part = key.split("|")
    device = next(device for device in (GAUDI2, GAUDI3) if device.inc_name == card)
    rules = get_scale_method(method)
    rule = rules.activation if part == "input" else rules.weight
    assert len(scales) == count
    np.testing.assert_array_equal(scale_ranges(ranges, rule, device), scales)
    divided = scale_ranges(ranges, rule, device, replace(BF16, divides=True))
    assert np.count_nonzero(divided != scales) == divided_wrong


def test_an_output_scale_that_no_range_explains_was_merged():
    """The files of one rank were made of those of two by taking maxima of scales, which a product is not."""
    real = json.loads((REAL / "llama-3.1-70b_merged.json").read_text())
    ours = compute(real["ranges"], "maxabs_hw", "g3")
    different = [name for name, scales in real["scales"].items() if ours[name] != scales]
    assert len(different) == 3
    for name, scales in real["scales"].items():
        outputs = [rank[name]["outputs"][0] for rank in real["merged"]]
        assert ours[name] | {"outputs": [max(outputs)]} == scales
        assert ours[name]["outputs"][0] >= max(outputs)


def test_no_published_candidate_of_opt_depends_on_how_a_card_divides():
    """They are powers of two, whose reciprocals are exact."""
    candidates = {
        scale
        for method in SCALE_METHODS.values()
        for device in (GAUDI2, GAUDI3)
        for scale in method.weight.find_candidates(device)
    }
    assert candidates and all(np.frexp(scale)[0] == 0.5 for scale in candidates)
