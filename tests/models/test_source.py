"""What `-m` means, and what config.json says: one answer for every command."""

import json
import logging
from pathlib import Path

import pytest

from gaudi_calib.errors import ModelError
from gaudi_calib.models.source import (
    ModelSource,
    download_model,
    find_model,
    list_quantizations,
    locate_model,
    open_model,
)

FP8 = {"quant_method": "fp8"}


def write_config(directory: Path, content: object) -> Path:
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "~/missing", "a/b/c", "model", "org/", "a b/c"])
def test_what_is_neither_a_directory_nor_a_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the hub is asked, whoever asks."""
    monkeypatch.chdir(tmp_path)
    for find in (locate_model, find_model, download_model):
        with pytest.raises(ModelError, match="no model directory"):
            find(name)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its path looks like a hub name."""
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    Path("org/name").write_text("")
    with pytest.raises(ModelError, match="no model directory") as caught:
        locate_model("org/name")
    assert caught.value.why == "it is a file"


def test_a_directory_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here is not looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert locate_model("organisation/model-1.5_b") is None
    (tmp_path / "organisation" / "model-1.5_b").mkdir(parents=True)
    assert locate_model("organisation/model-1.5_b") == Path("organisation/model-1.5_b")
    assert download_model("organisation/model-1.5_b") == tmp_path / "organisation" / "model-1.5_b"


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever needs the weights fails, whoever wants to know of config.json is warned."""

    def fail(*_: object, **__: object) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ModelError, match="'org/name' could not be downloaded") as caught:
        download_model("org/name")
    assert caught.value.why is not None and caught.value.why.endswith("the hub said: no route to host")
    with caplog.at_level(logging.WARNING):
        assert find_model("org/name") == ModelSource("org/name", None)
    assert "config.json of org/name could not be downloaded" in caplog.text and "much more" not in caplog.text


def test_a_hub_model_has_a_directory_once_its_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then can it be told from another checkpoint of that name."""
    write_config(tmp_path, {"model_type": "llama"})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    assert find_model("org/name") == ModelSource("org/name", None, {"model_type": "llama"})
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_model("org/name").directory == tmp_path


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no config.json"), ("{", "not valid JSON"), ("[1]", "not a JSON object")],
    ids=["missing", "broken", "list"],
)
def test_a_config_that_cannot_be_read(content: str | None, complaint: str, tmp_path: Path) -> None:
    """It is a fault of the checkpoint, with a way out."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        open_model(tmp_path)
    assert caught.value.fix
    with pytest.raises(ModelError, match=complaint):
        find_model(str(tmp_path))


def test_a_directory_with_a_tokenizer_alone(tmp_path: Path) -> None:
    """It does where nobody needs more."""
    source = find_model(str(tmp_path), needs_config=False)
    assert (source.directory, source.config, source.context) == (tmp_path, {}, None)


def test_family(tmp_path: Path) -> None:
    """It comes from model_type; who needs one is told why there is none."""
    assert open_model(write_config(tmp_path, {"model_type": "llama"})).require_family().name == "llama"
    unknown = open_model(write_config(tmp_path, {"model_type": "lama"}))
    assert unknown.family is None and unknown.model_type == "lama"
    with pytest.raises(ModelError, match="unknown model family: model_type 'lama'"):
        unknown.require_family()
    silent = open_model(write_config(tmp_path, {}))
    assert silent.family is None
    with pytest.raises(ModelError, match="names no model_type"):
        silent.require_family()


@pytest.mark.parametrize("key", ["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"])
def test_every_name_of_the_number_of_experts(key: str) -> None:
    """Families do not agree on it; a dense model of such a family says 0 or nothing."""
    assert ModelSource("m", None, {key: 8}).expert_count == 8
    assert ModelSource("m", None, {"text_config": {key: 8}}).expert_count == 8
    assert ModelSource("m", None, {key: 0}).expert_count is None
    assert ModelSource("m", None, {}).expert_count is None


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": FP8, "compression_config": {"quant_method": "other"}}, "fp8"),
        ({"compression_config": {"format": "float-quantized"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": FP8}}, "fp8"),
        ({"quantization_config": None, "text_config": None}, None),
        ({}, None),
    ],
    ids=["outer", "old", "nested", "null", "bf16"],
)
def test_how_weights_are_stored(config: dict, method: str | None) -> None:
    """Wherever a config.json says it; the outermost decides."""
    source = ModelSource("m", None, config)
    assert source.method == method
    assert source.quantization == next(iter(list_quantizations(config)), None)
    assert source.can_requantize is (method in (None, "fp8"))


def test_a_larger_model_keeps_its_type_and_its_quantization() -> None:
    """All else of the language model is what `text_config` says."""
    text = {"model_type": "b", "hidden_size": 8, "quantization_config": {"quant_method": "x"}}
    config = {"model_type": "a", "hidden_size": 4, "other": 1, "quantization_config": FP8, "text_config": text}
    expected = {"model_type": "a", "hidden_size": 8, "other": 1, "quantization_config": FP8}
    assert ModelSource("m", None, config).text_config == expected
    assert "text_config" in config


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"vocab_size": 10, "max_position_embeddings": 7}, (10, 7)),
        ({"text_config": {"vocab_size": 10, "max_position_embeddings": 7}}, (10, 7)),
        ({"vocab_size": 10, "n_positions": 9}, (10, 9)),
        ({}, (None, None)),
    ],
    ids=["flat", "nested", "gpt2", "silent"],
)
def test_token_limits(config: dict, limits: tuple) -> None:
    """Vocabulary and context come from config.json, also of a multimodal model's text part."""
    source = ModelSource("m", None, config)
    assert (source.vocab_size, source.context) == limits
