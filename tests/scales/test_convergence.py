"""When data was too little for its scales, and which samples stand out."""

import pytest

from gaudi_calib.config.model import QuantConfig
from gaudi_calib.errors import Finding
from gaudi_calib.fp8 import GAUDI2, GAUDI3, Device
from gaudi_calib.ranges.convergence import Convergence
from gaudi_calib.ranges.progress import Progress
from gaudi_calib.scales.convergence import find_unsettled

STEADY = Progress(((0, 1.0),), 1.0)


def find(
    nodes: dict[str, Progress], samples: int = 16, device: Device = GAUDI3, method: str = "maxabs_hw", **config
) -> list[Finding]:
    """What is found where every node has one input."""
    convergence = Convergence(samples, {name: {"inputs[0]": progress} for name, progress in nodes.items()})
    settings = QuantConfig(mode="QUANTIZE", scale_method=method, dump_stats_path="x/inc_output", **config)
    return find_unsettled(convergence, settings, device)


def grow(factor: float, sample: int) -> Progress:
    return Progress(((0, 1.0), (sample, factor)), 1.0)


def test_settled_ranges_give_no_finding() -> None:
    """Nor do those that grew early, or late and by so little that their scale is the same."""
    assert find({"lm_head": STEADY}) == []
    assert find({"lm_head": grow(8, 11)}) == []
    assert find({"lm_head": grow(1.5, 15)}) == []


@pytest.mark.parametrize(("device", "first", "same", "more"), [(GAUDI3, 1.8, 3.4, 3.6), (GAUDI2, 0.24, 3.7, 3.9)])
def test_what_counts_is_the_scale_that_the_device_takes(device: Device, first: float, same: float, more: float) -> None:
    """Gaudi 3 has a scale for every power of two, Gaudi 2 for every fourth of them."""
    assert find({"lm_head": Progress(((0, first), (12, same)), same)}, device=device) == []
    (finding,) = find({"lm_head": Progress(((0, first), (12, more)), more)}, device=device)
    assert finding.what == "too little data: the last 4 of 16 samples doubled 1 of 1 scales, or more"
    assert finding.where == "lm_head inputs[0]"
    assert "-l 64" in str(finding.fix)


def test_a_few_growing_ranges_of_many_are_no_finding() -> None:
    """One in ten: some maximum always moves late."""
    nodes = {f"layers.{i}.mlp.gate_up_proj": STEADY for i in range(9)}
    assert find({**nodes, "lm_head": grow(9, 15)}) == []
    (finding,) = find({**nodes, "lm_head": grow(9, 15), "layers.0.mlp.down_proj": grow(9, 15)})
    assert "2 of 11 scales" in finding.what


def test_too_few_samples_are_never_enough() -> None:
    """One sample has nothing before it to compare with."""
    for samples in (1, 2, 3):
        (finding,) = find({"lm_head": grow(9, samples - 1) if samples > 1 else STEADY}, samples)
        assert f"the last 1 of {samples} samples" in finding.what


def test_an_expert_that_is_reached_late_counts() -> None:
    """Without the last samples it would have had no range at all."""
    (finding,) = find({"layers.0.mlp.experts.moe_op": Progress(((14, 2.0),), 2.0)})
    assert finding.what.startswith("too little data")


def test_blocked_nodes_and_fixed_scales_do_not_count() -> None:
    """Their ranges are not used."""
    nodes = {"lm_head": Progress(((0, 1.0), (15, 99.0)), 1.0)}
    assert len(find(nodes)) == 2
    assert find(nodes, blocklist={"names": ["lm_head"]}) == []
    assert find(nodes, method="unit_scale") == []


def test_samples_that_stand_out_are_named_with_their_row() -> None:
    """The farthest from the median first; a tensor that is 0 in most samples has no median to compare with."""
    nodes = {
        "a": {"inputs[0]": Progress(((0, 2.0), (1, 40.0)), 2.0)},
        "b": {"outputs[0]": Progress(((0, 90.0),), 1.5)},
        "c": {"inputs[0]": Progress(((0, 31.0),), 2.0)},
        "d": {"inputs[0]": Progress(((0, 31.0),), 0.0)},
    }
    settings = QuantConfig(mode="QUANTIZE", dump_stats_path="x/inc_output")
    (finding,) = find_unsettled(Convergence(8, nodes, ["chat.jsonl, row 5", *["text, row 1"] * 7]), settings, GAUDI3)
    assert finding.what.startswith("samples that stand out set 2 ranges")
    assert finding.where == (
        "b outputs[0]: 90 in sample 0 (chat.jsonl, row 5), median 1.5; "
        "a inputs[0]: 40 in sample 1 (text, row 1), median 2"
    )


def test_nothing_is_found_in_nothing() -> None:
    """A model whose every node is blocked, too."""
    assert find({}) == []
