"""Which tensor counts as the output projection: the one that vLLM takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.errors import ModelError
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.run import Run
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch


def store_head(model: Path, factor: float) -> None:
    """Add an output projection to a checkpoint that is tied: `factor` times the embedding."""
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_tiny_model("llama-tied", tmp_path / "model", tokenizer=False)


@pytest.mark.parametrize(
    ("vllm", "factor"), [(None, 4.0), ("0.32", 4.0), ("0.29", 4.0), ("0.28.1", 1.0), ("0.11", 1.0)]
)
def test_a_stored_projection_beside_a_tied_one(vllm: str | None, factor: float, tied: Path) -> None:
    """vLLM ties by config.json alone up to 0.28, and looks into the checkpoint since; ranges follow it."""
    embedding = measure_channels(tied, [[1, 2, 3]], vllm=vllm).nodes["lm_head"].weight.values
    store_head(tied, 4.0)
    measured = measure_channels(tied, [[1, 2, 3]], vllm=vllm).nodes["lm_head"].weight.values
    np.testing.assert_array_equal(measured, factor * embedding)


@pytest.mark.parametrize(("factor", "is_told"), [(4.0, True), (1.0, False)])
def test_two_that_differ_are_told_once(factor: float, is_told: bool, tied: Path, tmp_path: Path) -> None:
    """A copy of the embedding is no contradiction."""
    store_head(tied, factor)
    warnings = Run(RunOptions(str(tied), tmp_path / "out"), serves=True).warnings
    assert sum("lm_head.weight is taken, as vLLM does since 0.29" in text for text in warnings) == is_told
    older = Run(RunOptions(str(tied), tmp_path / "out", vllm="0.20"), serves=True).warnings
    assert sum("embed_tokens.weight is taken, as vLLM does before 0.29" in text for text in older) == is_told


def test_none_at_all_is_refused(tmp_path: Path) -> None:
    """vLLM leaves it uninitialised or fails: config.json does not tie, and nothing is stored."""
    model = make_tiny_model("llama", tmp_path / "model", tokenizer=False)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no output projection") as caught:
        plan_model(model)
    assert "tie_word_embeddings" in str(caught.value.fix)


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "falcon"])
def test_families_that_tie_where_config_json_is_silent(family: str, tmp_path: Path) -> None:
    """As transformers' configuration of the family has it, which vLLM asks."""
    model = make_tiny_model(family, tmp_path / "model", tokenizer=False)
    path = model / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings"', '"unused"'))
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, path.with_name("x"))
    path.with_name("x").replace(model / "model.safetensors")
    plan = plan_model(model)
    assert plan.head is not None
    assert plan.head.weight == f"{plan.layout.embedding}.weight"
    assert torch.is_tensor(plan.read_weight("lm_head"))
