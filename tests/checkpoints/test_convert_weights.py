"""convert-weights: FP8 values that Gaudi 2 can hold, and nothing else changed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gaudi_calib.checkpoints import convert_weights as conversion
from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.convert_plan import RECORD_NAME, Action, ConversionPlan, list_spans, plan_conversion
from gaudi_calib.checkpoints.halving import double_scale, is_half
from gaudi_calib.cli.main import main
from gaudi_calib.errors import FileError, ModelError, UsageError
from tests.support import paths

BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CHANNEL_FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE_CODES = ALL_CODES[~ALL_CODES.float().isnan()]


def make_fp8(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Return E4M3 values in which each of the 254 finite codes occurs, 448 among them."""
    picks = torch.randint(0, 254, (rows * columns,), generator=torch.Generator().manual_seed(seed))
    picks[:254] = torch.arange(254)
    return FINITE_CODES[picks].reshape(rows, columns)


def make_tensors(layers: int = 2) -> dict[str, torch.Tensor]:
    """Return a checkpoint like those with block FP8: some projections quantized, others in bf16."""
    tensors = {"model.embed_tokens.weight": torch.randn(40, 256).bfloat16(), "steps": torch.arange(5)}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        tensors |= {
            f"{base}.mlp.up_proj.weight": make_fp8(300, 256, seed=layer),
            f"{base}.mlp.up_proj.weight_scale_inv": torch.rand(3, 2) + 1e-4,
            f"{base}.self_attn.o_proj.weight": torch.randn(256, 256).bfloat16(),
            f"{base}.norm.weight": torch.randn(256),
        }
    return tensors


def save_model(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    quantization: dict = BLOCK_FP8,
    *,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a checkpoint of `shards` weight files with the other files that a model has."""
    directory.mkdir(parents=True)
    metadata = metadata or {"format": "pt"}
    (directory / "config.json").write_text(json.dumps({"model_type": "any", "quantization_config": quantization}))
    others = ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_any.py", "extra/a/b.txt")
    for name in (*others, ".gitattributes", "tokenizer.model"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"content of {name}\n")
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "x.lock").write_text("")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata=metadata)
        return directory
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / name, metadata=metadata)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def convert(source: Path, out: Path) -> tuple[ConversionPlan, conversion.Tally]:
    """Plan and run a conversion."""
    plan = plan_conversion(source, out)
    return plan, conversion.convert_weights(plan)


def load_model(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def hash_files(directory: Path) -> dict[str, str]:
    """Return the hash of every file below `directory`, by its path there."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def convert_as_reference(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the reference does to the tensors of an FP8 linear layer."""
    if name.endswith("weight"):
        return (tensor.float() * 0.5).to(torch.float8_e4m3fn)
    return tensor.float() * 2


def test_halving_every_code_loses_at_most_one_step() -> None:
    """Of the 254 finite values 16 are rounded: by 2**-9, a third or less of all but the smallest, which becomes 0."""
    from gaudi_calib.checkpoints.halving import halve

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
    assert sorted({float(one) for one in 2**-9 / rounded}, reverse=True) == pytest.approx(
        [1, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 15]
    )
    assert halves[1] == 0 and halves[3] == 2 * 2**-9


@pytest.mark.parametrize("shards", [1, 3])
def test_only_fp8_weights_and_their_scales_change(shards: int, tmp_path: Path) -> None:
    """Where the reference is right the result equals its own; a bf16 projection, which it would ruin, stays."""
    tensors = make_tensors()
    source = save_model(tmp_path / "source", tensors, shards=shards)
    _, tally = convert(source, tmp_path / "out")
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
    assert tally == conversion.Tally(weights=2, scales=2, values=2 * 300 * 256, rounded=rounded)
    assert 0 < rounded < tally.values / 8


def test_the_result_stands_for_the_same_weights(tmp_path: Path) -> None:
    """Dequantized, values differ by at most one FP8 step of the scale, most not at all."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    _, tally = convert(source, tmp_path / "out")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert before.shapes == after.shapes
    changed = 0
    for name in before.weights:
        old, new = before.read([name])[name].double(), after.read([name])[name].double()
        changed += int((old != new).sum())
        assert float((old - new).abs().max()) <= 1.01 * 2**-9 if "up_proj" in name else torch.equal(old, new)
    assert changed == tally.rounded


def test_ranges_of_the_golden_model_survive(tmp_path: Path) -> None:
    """The largest value of every weight is far above the values that are rounded."""
    source = paths.GOLDEN / "deepseek-v3-fp8-tiny" / "model"
    _, tally = convert(source, tmp_path / "out")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    ranges = [
        {name: float(weight.abs().max()) for name, weight in checkpoint.read(checkpoint.weights).items()}
        for checkpoint in (before, after)
    ]
    assert ranges[0] == ranges[1]
    assert (tally.weights, tally.values, tally.rounded) == (72, 2801664, 324)


def test_every_other_file_travels(tmp_path: Path) -> None:
    """Tokenizer, template, code, index and subdirectories are byte-identical; a download cache is left behind."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    before = hash_files(source)
    plan, _ = convert(source, tmp_path / "out")
    after = hash_files(tmp_path / "out")
    assert hash_files(source) == before
    assert set(after) == {name for name in before if not name.startswith(".cache")} | {RECORD_NAME}
    assert {name for name in before if name in after and before[name] != after[name]} == set(plan.shards)
    assert "extra/a/b.txt" in after and "model.safetensors.index.json" in after


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache holds links to blobs; the result holds files."""
    blobs = save_model(tmp_path / "blobs", make_tensors())
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    convert(source, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert {"tokenizer.json", "extra/a/b.txt", "model.safetensors"} <= set(hash_files(tmp_path / "out"))


def test_headers_keep_their_metadata(tmp_path: Path) -> None:
    """`format` and whatever else a weight file says of itself is still there, as is the order of its tensors."""
    metadata = {"format": "pt", "made_by": "someone"}
    source = save_model(tmp_path / "source", make_tensors(), metadata=metadata)
    convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
    spans = [list_spans(directory / "model.safetensors") for directory in (source, tmp_path / "out")]
    assert spans[0] == spans[1]


def test_static_activation_and_cache_scales_are_doubled_too(tmp_path: Path) -> None:
    """They were made for +-448 as well; those of layers that are not FP8, and upper bounds, stay."""
    one = torch.tensor([0.75])
    tensors = {
        "a.weight": make_fp8(16, 32),
        "a.weight_scale": torch.rand(16, 1).bfloat16(),
        "a.input_scale": one.clone(),
        "a.input_scale_ub": one.clone(),
        "attn.k_scale": one.clone(),
        "attn.v_scale": one.clone(),
        "b.weight": torch.randn(4, 4),
        "b.input_scale": one.clone(),
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
    before = hash_files(source)
    assert main(["convert-weights", "-m", str(source), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 FP8 weights halved, 2 scales doubled, 6 tensors as they are" in printed
    assert "model-00002-of-00002.safetensors  " in printed and "kB" in printed
    assert "tokenizer.json  26 B" in printed
    assert "not converted, though FP8: consolidated.safetensors" in printed
    assert not (tmp_path / "out").exists() and hash_files(source) == before


@pytest.mark.parametrize("place", [".", "inside", "inside/deep"])
def test_an_output_in_the_source_is_refused(place: str, tmp_path: Path) -> None:
    """The source stays as it is, whatever happens."""
    source = save_model(tmp_path / "source", make_tensors())
    with pytest.raises(UsageError, match="inside the checkpoint"):
        plan_conversion(source, source / place)


def test_an_output_with_other_files_is_refused(tmp_path: Path) -> None:
    """Neither somebody's directory nor the conversion of another checkpoint is written into."""
    source = save_model(tmp_path / "source", make_tensors())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        plan_conversion(source, tmp_path / "out")
    other = save_model(tmp_path / "other", make_tensors())
    convert(other, tmp_path / "converted")
    with pytest.raises(FileError, match="another checkpoint"):
        plan_conversion(source, tmp_path / "converted")


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
        plan_conversion(tmp_path / "out", tmp_path / "again")


def test_a_tensor_that_the_index_forgot_is_refused(tmp_path: Path) -> None:
    """vLLM loads whatever a weight file holds; half of it converted would be ruin."""
    source = save_model(tmp_path / "source", make_tensors(), shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if "layers.1.mlp.up" not in key}
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is FP8 and no part"):
        plan_conversion(source, tmp_path / "out")


def test_a_second_call_does_what_is_missing(tmp_path: Path) -> None:
    """Files that are done are kept; one that is missing or damaged, or whose source is new, is made again."""
    source = save_model(tmp_path / "source", make_tensors(), shards=3)
    plan, tally = convert(source, tmp_path / "out")
    complete = hash_files(tmp_path / "out")
    one, two, three = (tmp_path / "out" / name for name in plan.shards)
    kept = two.stat().st_ino
    one.unlink()
    three.write_bytes(three.read_bytes()[:-1])
    assert convert(source, tmp_path / "out")[1] == tally
    after = hash_files(tmp_path / "out")
    assert {name for name in after if after[name] != complete[name]} <= {RECORD_NAME}
    assert two.stat().st_ino == kept
    os.utime(source / two.name, ns=(1, 1))
    convert(source, tmp_path / "out")
    assert two.stat().st_ino != kept


def test_a_killed_call_is_continued(tmp_path: Path) -> None:
    """After a kill in the middle the source is as it was, no half file is in place, and a second call completes."""
    source = save_model(tmp_path / "source", make_tensors(12), shards=6)
    before = hash_files(source)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from gaudi_calib.checkpoints import convert_weights as conversion\n"
        "from gaudi_calib.checkpoints.convert_plan import plan_conversion\n"
        "write = conversion._write_halves\n"
        "def slow(*args):\n    time.sleep(0.2)\n    return write(*args)\n"
        "conversion._write_halves = slow\n"
        "plan = plan_conversion(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "conversion.convert_weights(plan)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)])
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    deadline = time.monotonic() + 60
    while not (out / shards[1]).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    present = [name for name in shards if (out / name).exists()]
    assert 2 <= len(present) < len(shards)
    assert json.loads((out / RECORD_NAME).read_text())["status"] == "running"
    inode = (out / shards[0]).stat().st_ino
    convert(source, out)
    convert(source, tmp_path / "whole")
    first, second = hash_files(out), hash_files(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {RECORD_NAME}
    assert json.loads((out / RECORD_NAME).read_text())["status"] == "ok"
    assert (out / shards[0]).stat().st_ino == inode
    assert not list(out.glob(".staging*")) and hash_files(source) == before


@pytest.mark.parametrize(
    ("name", "byte"),
    [
        ("model.layers.0.mlp.up_proj.weight", 200),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", 3),
        ("model.layers.0.self_attn.o_proj.weight", 11),
    ],
    ids=["halved", "doubled", "copied"],
)
def test_one_wrong_byte_is_found(name: str, byte: int, tmp_path: Path) -> None:
    """The comparison reads what is on the disk; a file with a mistake never gets its name."""
    source = save_model(tmp_path / "source", make_tensors(1))
    plan, _ = convert(source, tmp_path / "out")
    written = tmp_path / "out" / "model.safetensors"
    conversion.compare_shards(source / "model.safetensors", written, plan.actions)
    span = next(span for span in list_spans(written) if span.name == name)
    content = bytearray(written.read_bytes())
    content[span.start + byte] ^= 0x04
    written.write_bytes(content)
    with pytest.raises(FileError, match=f"'{name}' of model.safetensors is not what was written"):
        conversion.compare_shards(source / "model.safetensors", written, plan.actions)


def test_a_file_that_was_written_wrong_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is compared before it gets its name."""
    source = save_model(tmp_path / "source", make_tensors())
    monkeypatch.setattr(conversion, "halve", lambda chunk: chunk)
    with pytest.raises(FileError, match="is not what was written"):
        convert(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RECORD_NAME]


def test_the_comparison_knows_every_pair_of_codes() -> None:
    """Of the 254 halves of each value it accepts the right ones alone: neighbours only where a tie was rounded."""
    from gaudi_calib.checkpoints.halving import halve

    old = torch.arange(256, dtype=torch.uint8)
    new = torch.frombuffer(halve(bytearray(range(256))), dtype=torch.uint8)
    finite = ~ALL_CODES.float().isnan()
    assert is_half(old[finite], new[finite])
    accepted = sum(is_half(old[i : i + 1], old[j : j + 1]) for i in range(128) for j in range(128) if finite[i])
    assert accepted == 127 + 8


def test_memory_is_a_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many chunks is converted piece by piece, to the same result."""
    source = save_model(tmp_path / "source", make_tensors())
    convert(source, tmp_path / "whole")
    for module in ("convert_plan", "convert_weights"):
        monkeypatch.setattr(f"gaudi_calib.checkpoints.{module}.CHUNK_BYTES", 1000)
    seen: list[int] = []
    halve = conversion.halve
    monkeypatch.setattr(conversion, "halve", lambda chunk: seen.append(len(chunk)) or halve(chunk))
    convert(source, tmp_path / "pieces")
    assert max(seen) == 1000 and len(seen) > 100
    assert hash_files(tmp_path / "pieces")["model.safetensors"] == hash_files(tmp_path / "whole")["model.safetensors"]


def test_actions_of_a_mixed_checkpoint(tmp_path: Path) -> None:
    """Experts that are stacked, and scales in another file than their weight, are found."""
    tensors = {
        "experts.up": make_fp8(4 * 64, 64).reshape(4, 64, 64),
        "gate.weight": torch.randn(4, 64).bfloat16(),
        "experts.up_scale": torch.rand(4, 64, 1),
        "experts.up_input_scale": torch.rand(1),
    }
    plan, _ = convert(save_model(tmp_path / "source", tensors, CHANNEL_FP8, shards=2), tmp_path / "out")
    assert plan.actions == {
        "experts.up": Action.HALVE,
        "experts.up_scale": Action.DOUBLE,
        "experts.up_input_scale": Action.DOUBLE,
        "gate.weight": Action.COPY,
    }
