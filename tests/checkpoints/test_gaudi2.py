"""convert-weights: FP8 values that Gaudi 2 can hold, and nothing else changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.gaudi2 import plan_gaudi2
from gaudi_calib.checkpoints.halving import double_scale, halve, is_half
from gaudi_calib.cli.main import main
from gaudi_calib.errors import ModelError
from tests.support import paths
from tests.support.files import snapshot
from tests.support.fp8_models import (
    ALL_CODES,
    CHANNEL_FP8,
    convert,
    load_model,
    make_fp8,
    make_tensors,
    save_model,
)

pytestmark = pytest.mark.torch


def convert_as_reference(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the reference does to the tensors of an FP8 linear layer."""
    if name.endswith("weight"):
        return (tensor.float() * 0.5).to(torch.float8_e4m3fn)
    return tensor.float() * 2


def test_halving_every_code_loses_at_most_one_step() -> None:
    """Of the 254 finite values 16 are rounded: by 2**-9, a third or less of all but the smallest, which becomes 0."""
    halves = torch.frombuffer(halve(bytearray(range(256))), dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = ALL_CODES.double()
    finite = ~values.isnan()
    error = (2 * halves - values).abs()[finite]
    assert torch.equal(halves[~finite].isnan(), torch.ones(2, dtype=torch.bool))
    assert halves[finite].abs().max() == 224
    assert sorted(set(error.tolist())) == [0, 2**-9]
    assert int((error > 0).sum()) == 16
    rounded = values[finite][error > 0].abs()
    assert rounded.max() == 15 * 2**-9
    assert sorted({float(share) for share in 2**-9 / rounded}, reverse=True) == pytest.approx(
        [1, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 15]
    )
    assert halves[1] == 0 and halves[3] == 2 * 2**-9


@pytest.mark.parametrize("shards", [1, 3])
def test_only_fp8_weights_and_their_scales_change(shards: int, tmp_path: Path) -> None:
    """Where the reference is right the result equals its own; a bf16 projection, which it would ruin, stays."""
    tensors = make_tensors()
    source = save_model(tmp_path / "source", tensors, shards=shards)
    _, counts = convert(source, tmp_path / "out")
    converted = load_model(tmp_path / "out")
    assert set(converted) == set(tensors)
    for name, tensor in tensors.items():
        expected = convert_as_reference(name, tensor) if "up_proj" in name else tensor
        assert converted[name].dtype == tensor.dtype
        assert torch.equal(converted[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
    rounded = sum(
        int((2 * convert_as_reference(name, tensor).double() != tensor.double()).sum())
        for name, tensor in tensors.items()
        if name.endswith("up_proj.weight")
    )
    assert counts == {"weights": 2, "scales": 2, "values": 2 * 300 * 256, "rounded": rounded}
    assert 0 < rounded < counts["values"] / 8


def test_the_result_stands_for_the_same_weights(tmp_path: Path) -> None:
    """Dequantized, values differ by at most one FP8 step of the scale, most not at all."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    _, counts = convert(source, tmp_path / "out")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert before.shapes == after.shapes
    changed = 0
    for name in before.weights:
        old, new = before.read([name])[name].double(), after.read([name])[name].double()
        changed += int((old != new).sum())
        assert float((old - new).abs().max()) <= 1.01 * 2**-9 if "up_proj" in name else torch.equal(old, new)
    assert changed == counts["rounded"]


def test_ranges_of_the_golden_model_survive(tmp_path: Path) -> None:
    """The largest value of every weight is far above the values that are rounded."""
    source = paths.GOLDEN / "deepseek-v3-fp8-tiny" / "model"
    _, counts = convert(source, tmp_path / "out")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    ranges = [
        {name: float(weight.abs().max()) for name, weight in checkpoint.read(checkpoint.weights).items()}
        for checkpoint in (before, after)
    ]
    assert ranges[0] == ranges[1]
    assert (counts["weights"], counts["values"], counts["rounded"]) == (72, 2801664, 324)


def test_static_activation_and_cache_scales_are_doubled_too(tmp_path: Path) -> None:
    """They were made for +-448 as well; those of layers that are not FP8, and upper bounds, stay."""
    scale = torch.tensor([0.75])
    tensors = {
        "a.weight": make_fp8(16, 32),
        "a.weight_scale": torch.rand(16, 1).bfloat16(),
        "a.input_scale": scale.clone(),
        "a.input_scale_ub": scale.clone(),
        "attn.k_scale": scale.clone(),
        "attn.v_scale": scale.clone(),
        "b.weight": torch.randn(4, 4),
        "b.input_scale": scale.clone(),
    }
    convert(save_model(tmp_path / "source", tensors, CHANNEL_FP8), tmp_path / "out")
    converted = load_model(tmp_path / "out")
    doubled = {name for name in tensors if name.endswith("scale") and converted[name][0] == 2 * tensors[name][0]}
    assert doubled == {"a.weight_scale", "a.input_scale", "attn.k_scale", "attn.v_scale"}
    assert torch.equal(converted["a.weight_scale"], tensors["a.weight_scale"] * 2)
    assert converted["b.input_scale"] == converted["a.input_scale_ub"] == 0.75


def test_vllm_gaudi_is_told_not_to_halve_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a key of config.json where it looks for one, else by what the command prints."""
    tensors = {"a.weight": make_fp8(16, 32), "a.weight_scale": torch.rand(16, 1)}
    source = save_model(tmp_path / "channel", tensors, CHANNEL_FP8)
    assert main(["convert-weights", "-m", str(source), "-o", str(tmp_path / "one"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["env"] == {}
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "one"))
    assert after["quantization_config"].pop("fp8_dtype_flavor") == "float8_e4m3fnuz"
    assert after == before
    source = save_model(tmp_path / "block", make_tensors())
    assert main(["convert-weights", "-m", str(source), "-o", str(tmp_path / "two")]) == 0
    assert "VLLM_SCALE_ADJUSTMENT=0" in capsys.readouterr().out
    assert (source / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()


@pytest.mark.vllm
def test_transformers_and_vllm_accept_the_key() -> None:
    """The key that vllm-gaudi reads breaks no other loader of such configs."""
    from compressed_tensors.quantization import QuantizationConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = CHANNEL_FP8 | {
        "fp8_dtype_flavor": "float8_e4m3fnuz",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
    }
    assert QuantizationConfig.model_validate(config).format == "float-quantized"
    assert AutoQuantizationConfig.from_dict(dict(config)).quant_method == "compressed-tensors"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_scales_keep_their_type(kind: torch.dtype, tmp_path: Path) -> None:
    """Twice a scale is exact in every type, or refused where the type ends."""
    scale = torch.tensor([[0.5, 2.0], [0.25, 8.0], [1.0, 4.0]]).to(kind)
    tensors = {"a.weight": make_fp8(300, 256), "a.weight_scale_inv": scale}
    convert(save_model(tmp_path / "source", tensors), tmp_path / "out")
    converted = load_model(tmp_path / "out")["a.weight_scale_inv"]
    assert converted.dtype == kind
    assert torch.equal(converted.float(), scale.float() * 2)


def test_a_scale_that_cannot_be_doubled_is_refused(tmp_path: Path) -> None:
    """An infinite scale would be silent ruin."""
    assert double_scale(torch.tensor([254], dtype=torch.uint8)) is None
    tensors = {"a.weight": make_fp8(300, 256), "a.weight_scale_inv": torch.full((3, 2), 40000.0).half()}
    source = save_model(tmp_path / "source", tensors)
    with pytest.raises(ModelError, match=r"'a\.weight_scale_inv' cannot be doubled"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_weight_that_is_nan_is_refused(tmp_path: Path) -> None:
    """It is named; nothing of its file is put in place."""
    tensors = make_tensors(1)
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[7, 9] = 0xFF
    source = save_model(tmp_path / "source", tensors)
    with pytest.raises(ModelError, match=r"1 values of 'model.layers.0.mlp.up_proj.weight' are NaN"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_dry_run_prints_files_and_sizes_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan names every file, and there is no output directory afterwards."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    save_file({"w": make_fp8(16, 16)}, source / "consolidated.safetensors")
    before = snapshot(source)
    assert main(["convert-weights", "-m", str(source), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 FP8 weights halved, 2 scales doubled, 6 tensors as they are" in printed
    assert "model-00002-of-00002.safetensors  " in printed and "kB" in printed
    assert "tokenizer.json  26 B" in printed
    assert "not converted, though FP8: consolidated.safetensors" in printed
    assert main(["convert-weights", "-m", str(source), "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    names = {
        Path(path).relative_to(tmp_path / "out").as_posix() for path in json.loads(capsys.readouterr().out)["files"]
    }
    assert {"model-00002-of-00002.safetensors", "tokenizer.json", "config.json"} <= names
    assert not (tmp_path / "out").exists() and snapshot(source) == before


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"a.weight": torch.randn(4, 4).bfloat16()}, "no FP8 weights, there is nothing to convert"),
        ({"a.weight": make_fp8(16, 16)}, "has no scale"),
        ({"a.weight": torch.ones(4, 4).to(torch.float8_e5m2), "a.weight_scale": torch.ones(1)}, "cannot be read"),
        (
            {"a.weight": torch.full((4, 4), 240.0).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
            "fits Gaudi 2 already",
        ),
    ],
    ids=["bf16", "no-scale", "e5m2", "small"],
)
def test_what_needs_no_conversion_or_allows_none_is_refused(
    tensors: dict[str, torch.Tensor], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says why and exits with 1."""
    source = save_model(tmp_path / "source", tensors)
    assert main(["convert-weights", "-m", str(source), "-o", str(tmp_path / "out")]) == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_converted_checkpoint_is_not_converted_again(tmp_path: Path) -> None:
    """Halving twice would lose another bit for nothing."""
    convert(save_model(tmp_path / "source", make_tensors()), tmp_path / "out")
    with pytest.raises(ModelError, match="fits Gaudi 2 already"):
        plan_gaudi2(tmp_path / "out", tmp_path / "again")


def test_a_tensor_that_the_index_forgot_is_refused(tmp_path: Path) -> None:
    """vLLM loads whatever a weight file holds; half of it converted would be ruin."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if "layers.1.mlp.up" not in key}
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is FP8 and no part"):
        plan_gaudi2(source, tmp_path / "out")


def test_the_comparison_knows_every_pair_of_codes() -> None:
    """Of the 254 halves of each value it accepts the right ones alone: neighbours only where a tie was rounded."""
    old = torch.arange(256, dtype=torch.uint8)
    new = torch.frombuffer(halve(bytearray(range(256))), dtype=torch.uint8)
    finite = ~ALL_CODES.float().isnan()
    assert is_half(old[finite], new[finite])
    accepted = sum(is_half(old[i : i + 1], old[j : j + 1]) for i in range(128) for j in range(128) if finite[i])
    assert accepted == 127 + 8


def test_actions_of_a_mixed_checkpoint(tmp_path: Path) -> None:
    """Experts that are stacked, and scales in another file than their weight, are found."""
    tensors = {
        "experts.up": make_fp8(4 * 64, 64).reshape(4, 64, 64),
        "gate.weight": torch.randn(4, 64).bfloat16(),
        "experts.up_scale": torch.rand(4, 64, 1),
        "experts.up_input_scale": torch.rand(1),
    }
    plan, _ = convert(save_model(tmp_path / "source", tensors, CHANNEL_FP8, shards=2), tmp_path / "out")
    assert plan.converter.halved == {"experts.up"}
    assert plan.converter.doubled == {"experts.up_scale", "experts.up_input_scale"}
