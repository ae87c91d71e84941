"""A checkpoint that contradicts its config.json, or is damaged, is refused before anything runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.errors import CalibrationError, ModelError
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch

Damage = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model("llama", tmp_path / "model", tokenizer=False)


def config(**changes: object) -> Damage:
    """Change keys of config.json."""

    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def text(content: bytes) -> Damage:
    """Put something else in the place of config.json."""
    return lambda model: (model / "config.json").write_bytes(content)


def weight(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Damage:
    """Give a weight another shape or type, or drop it."""

    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors[name]
        if shape:
            tensors[name] = torch.ones(shape, dtype=dtype)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def index(weight_map: object, key: str = "weight_map") -> Damage:
    """Write an index that says what it should not; a string stands for the file of every tensor."""

    def damage(model: Path) -> None:
        names = load_file(model / "model.safetensors")
        content = {key: dict.fromkeys(names, weight_map) if isinstance(weight_map, str | int) else weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


LAYER = "model.layers.1"
PLANNED = {
    "layers as text": (config(num_hidden_layers="two"), "no usable num_hidden_layers"),
    "layers below 0": (config(num_hidden_layers=-1), "no usable num_hidden_layers"),
    "layers true": (config(num_hidden_layers=True), "no usable num_hidden_layers"),
    "layers NaN": (config(num_hidden_layers=float("nan")), "no usable num_hidden_layers"),
    "layers null": (config(num_hidden_layers=None), "no usable num_hidden_layers"),
    "a billion layers": (config(num_hidden_layers=10**9), "1000000000 decoder layers"),
    "a layer too few": (config(num_hidden_layers=5), "does not have the 5 decoder layers"),
    "a layer too many": (config(num_hidden_layers=3), "does not have the 3 decoder layers"),
    "no heads": (config(num_attention_heads=0), "no usable num_attention_heads"),
    "no head_dim": (config(head_dim=0), "no usable head_dim"),
    "heads that cannot share": (config(num_key_value_heads=3), "cannot share 3 KV heads"),
    "KV heads as text": (config(num_key_value_heads="4"), "no usable num_key_value_heads"),
    "text_config of text": (config(text_config={"hidden_size": "256"}), "no usable hidden_size"),
    "deeply nested": (text(b"[" * 200_000), "not valid JSON"),
    "not UTF-8": (text(b'{"model_type": "ll\xe9"}'), "not valid JSON"),
    "a byte order mark": (text(b'\xef\xbb\xbf{"model_type": "llama"}'), "config.json"),
    "k_proj of another size": (weight(f"{LAYER}.self_attn.k_proj.weight", 64, 256), "448 output rows"),
    "k_proj of other columns": (weight(f"{LAYER}.self_attn.k_proj.weight", 128, 128), "k_proj.weight' has the shape"),
    "k_proj without shape": (weight(f"{LAYER}.self_attn.k_proj.weight", 128), "k_proj.weight' has the shape"),
    "a weight of integers": (weight(f"{LAYER}.mlp.up_proj.weight", 512, 256, dtype=torch.int64), "cannot be read"),
    "an output projection of another size": (weight("lm_head.weight", 200, 256), "lm_head.weight' has the shape"),
    "an index that is no object": (index([]), "does not say which file"),
    "an index without a map": (index("model.safetensors", "map"), "does not say which file"),
    "an index of numbers": (index(3), "does not say which file"),
    "an index that leads out": (index("../model/model.safetensors"), "outside the model directory"),
    "an index of absolute paths": (index("/etc/passwd"), "outside the model directory"),
}


@pytest.mark.parametrize(("damage", "complaint"), PLANNED.values(), ids=PLANNED.keys())
def test_what_names_and_shapes_tell_is_found_while_planning(damage: Damage, complaint: str, model: Path) -> None:
    """No transformers is needed for that, so that a dry run tells it too."""
    damage(model)
    with pytest.raises(ModelError, match=complaint) as caught:
        plan_model(model)
    assert caught.value.where
    assert caught.value.fix


MEASURED = {
    "embedding rows": (config(vocab_size=500), r"embed_tokens.weight' has the shape \[307, 256\]"),
    "a norm": (weight("model.norm.weight", 128), r"norm.weight' has the shape \[128\], and is to have \[256\]"),
    "a missing norm": (weight("model.norm.weight"), "no tensor 'model.norm.weight'"),
    "a norm of a layer": (weight(f"{LAYER}.input_layernorm.weight", 128), "input_layernorm.weight' has the shape"),
    "down_proj": (weight(f"{LAYER}.mlp.down_proj.weight", 256, 500), "down_proj.weight' has the shape"),
    "an unknown activation": (config(hidden_act="nonsense"), "transformers cannot build"),
    "rope of text": (config(rope_parameters="x"), "transformers cannot build"),
    "text_config as a list": (config(text_config=[1]), "transformers cannot build"),
}


@pytest.mark.parametrize(("damage", "complaint"), MEASURED.values(), ids=MEASURED.keys())
def test_what_the_model_itself_tells_is_found_before_the_first_layer_runs(
    damage: Damage, complaint: str, model: Path
) -> None:
    """Weights no node has, and keys that only transformers reads."""
    damage(model)
    steps: list[float] = []
    with pytest.raises(ModelError, match=complaint) as caught:
        measure_channels(model, [[1, 2, 3]], on_progress=steps.append)
    assert not steps
    assert caught.value.where
    assert caught.value.fix


def test_an_expert_of_another_size_is_found_while_planning(tmp_path: Path) -> None:
    """Every expert of every layer counts, not the first alone."""
    model = make_tiny_model("qwen3_moe", tmp_path / "model", tokenizer=False)
    plan_model(model)
    weight("model.layers.1.mlp.experts.3.down_proj.weight", 128, 32)(model)
    with pytest.raises(ModelError, match=r"experts\.3\.down_proj\.weight' has the shape \[128, 32\]"):
        plan_model(model)


def test_layers_that_predict_further_tokens_are_no_error(tmp_path: Path) -> None:
    """Checkpoints of DeepSeek V3 have one behind the decoder's, which config.json announces."""
    model = make_tiny_model("deepseek_v3", tmp_path / "model", tokenizer=False)
    config(num_hidden_layers=2, num_nextn_predict_layers=1)(model)
    assert len(plan_model(model).layers) == 2
    config(num_nextn_predict_layers=0)(model)
    with pytest.raises(ModelError, match="2 decoder layers"):
        plan_model(model)


def test_bytes_that_do_not_hold_the_tensor_are_found_while_planning(model: Path) -> None:
    """The header says half the rows, and bytes for all of them."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [128]
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])
    with pytest.raises(CalibrationError, match=r"cannot read model\.safetensors"):
        plan_model(model)
