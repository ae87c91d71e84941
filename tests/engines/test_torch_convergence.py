"""Which samples raised each range, against a plain loop that measures one prompt after the other."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.engines.torch.experts import ColdPolicy
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.fp8 import GAUDI3
from gaudi_calib.ranges.convergence import gather_convergence
from gaudi_calib.ranges.derive import derive_rank
from gaudi_calib.ranges.merge import merge_channels
from gaudi_calib.ranges.node import Node
from gaudi_calib.ranges.progress import Progress
from gaudi_calib.ranges.sources import list_read
from gaudi_calib.ranges.topology import Topology

pytestmark = pytest.mark.torch

_RANDOM = random.Random(3)
PROMPTS = [[_RANDOM.randrange(300) for _ in range(length)] for length in (7, 33, 3, 50, 1, 21, 12)]
# Attention of every kind, experts of every kind, layers that are no transformer's, sequences that cannot be packed.
FAMILIES = [
    "llama",
    "gemma2",
    "opt-projected",
    "falcon-alibi",
    "mixtral",
    "deepseek_v3",
    "llama4_text",
    "gpt_oss",
    "granitemoehybrid",
]


def follow(directory: Path, **changes) -> Mapping[str, Mapping[str, Progress]]:
    return gather_convergence(measure_channels(directory, PROMPTS, worlds=(1,), **changes)).nodes


def list_ranges(directory: Path, prompt: list[int]) -> dict[tuple[str, str], float]:
    """Every range of activations that a scale comes from, of one prompt alone."""
    rank = derive_rank(measure_channels(directory, [prompt], worlds=(1,)), 0, Topology(1), GAUDI3)
    return {
        (name, part): value
        for name, node in rank.nodes.items()
        for part, value in _list_parts(node)
        if part in list_read(name, node) and not _is_made_up(name, part)
    }


def _list_parts(node: Node) -> list[tuple[str, float]]:
    parts = {"inputs": node.inputs, "outputs": node.outputs or ()}
    return [(f"{kind}[{i}]", float(value[0])) for kind, values in parts.items() for i, value in enumerate(values)]


def _is_made_up(name: str, part: str) -> bool:
    """Whether no data decides the range: maps of 0 and 1, and dummies of expert weights."""
    return "_list." in name or (name.endswith(("batch2block_matmul", "block2batch_matmul")) and part == "inputs[0]")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_range_came_about_as_in_a_loop_over_the_prompts(family: str, tiny_model: Callable[[str], Path]):
    """The prompts that raise the running maximum, its values, and the median of those that reached the tensor."""
    directory = tiny_model(family)
    measured, alone = follow(directory, batch_size=1), [list_ranges(directory, prompt) for prompt in PROMPTS]
    reached = {key for ranges in alone for key, value in ranges.items() if value > 0}
    assert {(name, part) for name, parts in measured.items() for part in parts} == reached
    for name, part in reached:
        values = [ranges[name, part] for ranges in alone]
        moves = [(i, value) for i, value in enumerate(values) if value > max(values[:i], default=0)]
        expected = Progress(tuple(moves), float(np.median([value for value in values if value > 0])))
        assert measured[name][part] == expected, f"{name} {part}"


@pytest.mark.parametrize("batch_size", [2, 3, 32])
@pytest.mark.parametrize("family", ["llama", "falcon-alibi", "deepseek_v3", "gpt_oss"])
def test_it_does_not_depend_on_how_prompts_are_batched(family: str, batch_size: int, tiny_model: Callable[[str], Path]):
    """But for what a product of other shape rounds otherwise, one unit in the last place of a bfloat16."""
    directory = tiny_model(family)
    alone, together = follow(directory, batch_size=1), follow(directory, batch_size=batch_size)
    assert {name: set(parts) for name, parts in together.items()} == {name: set(alone[name]) for name in alone}
    for name, parts in alone.items():
        for part, progress in parts.items():
            other = together[name][part]
            for count in range(len(PROMPTS) + 1):
                assert other.after(count) == pytest.approx(progress.after(count), rel=2**-7), f"{name} {part}"
            assert other.median == pytest.approx(progress.median, rel=2**-7)


def test_tokens_sent_to_cold_experts_raise_nothing(tiny_model: Callable[[str], Path]):
    """They are of no sample: an expert that only they reached is not told of."""
    directory = tiny_model("deepseek_v3-cold")
    usual = follow(directory)
    assert follow(directory, cold=ColdPolicy(min_tokens=10**6, fill=True)) == usual
    experts = {part for name, parts in usual.items() if name.endswith("moe_op") for part in parts}
    assert "outputs[1]" in experts


def test_a_merge_knows_of_no_order(tiny_model: Callable[[str], Path]):
    """Samples of two runs have none in common."""
    runs = [measure_channels(tiny_model("mixtral"), part, worlds=(1,)) for part in (PROMPTS[:3], PROMPTS[3:])]
    assert gather_convergence(merge_channels(runs, ["one", "other"])).nodes == {}
