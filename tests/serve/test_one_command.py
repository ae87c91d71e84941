"""What `calibrate` prints is what `serve --print` prints."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from tests.support.calibrated import MODEL
from tests.support.files import write_prompts
from tests.support.fp8_models import convert
from tests.support.paths import GOLDEN

pytestmark = pytest.mark.torch

FP8_MODEL = GOLDEN / "deepseek-v3-fp8-tiny" / "model"
MANY, EXPERTS = "PT_HPU_ENABLE_LAZY_COLLECTIVES=true", "--enable-expert-parallel"
BLOCKS, HALVED = "VLLM_HPU_FORCE_CHANNEL_FP8=0", "VLLM_SCALE_ADJUSTMENT=0"


def copy_to_a_bad_name(tiny_model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "it's a $(model)"))


MAKERS: dict[str, Callable[..., Path]] = {
    "llama": lambda *_: MODEL,
    "mixtral": lambda tiny_model, _: tiny_model("mixtral"),
    "block-fp8": lambda *_: FP8_MODEL,
    "converted": lambda _, tmp_path: convert(FP8_MODEL, tmp_path / "converted")[0].out,
    "quoted": copy_to_a_bad_name,
}


@pytest.mark.parametrize(
    ("kind", "words", "count", "parts"),
    [
        ("llama", [], 4, [MANY, "--kv-cache-dtype fp8_inc"]),
        ("llama", ["--dtype", "float16"], 4, ["--dtype float16"]),
        ("mixtral", ["-u"], 4, [MANY, EXPERTS]),
        ("mixtral", ["--scale-method", "unit_scale", "-u"], 2, [MANY, EXPERTS]),
        ("block-fp8", ["--device", "g3"], 2, [MANY, BLOCKS]),
        ("converted", ["--device", "g2"], 2, [MANY, BLOCKS, HALVED]),
        ("quoted", [], 4, [MANY]),
    ],
    ids=["llama", "float16", "mixtral", "unit-scale", "block-fp8", "converted", "quoted"],
)
def test_calibrate_prints_what_serve_prints(kind, words, count, parts, tiny_model, tmp_path, capsys):
    """For each device and world, character by character; what a shell makes of the line is what is served."""
    model = MAKERS[kind](tiny_model, tmp_path)
    out = tmp_path / "out put"
    out.mkdir()
    run = ["-m", model, "-o", out, "-t", 2, "-r", 1, "-d", write_prompts(tmp_path), "--engine", "torch"]
    assert main(["calibrate", *map(str, run), "--cold-experts", "ignore", *words]) == 0
    printed = capsys.readouterr().out
    blocks = re.findall(r"^On Gaudi (\d), (\d) cards?:\n(.*)\n", printed, re.MULTILINE)
    assert len(blocks) == count
    for number, world, line in blocks:
        config = out / model.name.lower() / f"maxabs_quant_g{number}.json"
        serve = ["serve", "-m", str(model), "--quant-config", str(config), "-t", world, "--device", f"g{number}"]
        assert main([*serve, "--print"]) == 0
        assert capsys.readouterr().out == line + "\n"
        read = shlex.split(line)
        assert f"QUANT_CONFIG={config}" in read and str(model) in read
        if world == "2":
            assert [text for text in parts if text not in line] == []
    assert "gaudi-calib relocate" in printed.splitlines()[-1]
