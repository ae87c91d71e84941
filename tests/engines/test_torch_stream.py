"""The stream by itself: what it computes, and that a caller may run a layer as often as it likes."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.engines.torch.skeleton import build_skeleton
from gaudi_calib.engines.torch.stream import Stream, make_batches

pytestmark = pytest.mark.torch

CHECKPOINTS = ["llama-tied", "gemma2", "opt", "gpt_neox", "falcon"]
generator = random.Random(0)
PROMPTS = [[generator.randrange(300) for _ in range(length)] for length in (7, 33, 20)]


def find_head_inputs(directory: Path) -> list[torch.Tensor]:
    """Return what enters the output projection of the whole model, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        for prompt in PROMPTS:
            model(torch.tensor([prompt]), use_cache=False)
    return seen


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_variant_of_the_activations_streams_by_while_weights_are_read_once(
    checkpoint: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """Run twice through each layer on its own activations, a model ends where the whole one does, both times."""
    directory = tiny_model(checkpoint)
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def count(self: Checkpoint, names: Any) -> Any:
        found = read(self, names)
        reads.update(list(found))
        return found

    monkeypatch.setattr(Checkpoint, "read", count)
    plan = plan_model(directory)
    batches = make_batches(PROMPTS, 2, 1024)
    with torch.inference_mode():
        stream = Stream(plan, batches)
        variants = [{batch.first: batch.hidden for batch in batches} for _ in range(2)]
        for layer in stream.layers():
            for hidden in variants:
                for batch in batches:
                    hidden[batch.first] = layer.run(batch, hidden[batch.first])
        ends = [[stream.run_outer(batch, hidden[batch.first]) for batch in batches] for hidden in variants]
    first, second = (torch.cat(parts, 1) for parts in ends)
    torch.testing.assert_close(first, torch.cat(find_head_inputs(directory), 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(first, second)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("checkpoint", ["llama-tied", "phi3", "mixtral"])
def test_a_skeleton_has_no_weights_and_all_its_buffers(checkpoint: str, tiny_model: Callable[[str], Path]):
    """Parameters are on the meta device, those that are tied still the same; buffers hold what they should."""
    directory = tiny_model(checkpoint)
    model = build_skeleton(plan_model(directory), torch.float32, torch.device("cpu"))
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(list(model.parameters())) == len(list(whole.parameters()))
    buffers = dict(model.named_buffers())
    assert buffers and buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
    kept = torch.nn.Linear(2, 2)
    assert not kept.weight.is_meta  # only the skeleton is built without weights
