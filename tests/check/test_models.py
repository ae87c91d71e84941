"""`check` of runs of tiny models of every family, and what it knows where the model is there."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gaudi_calib.check.path import Asked, check_path
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import read_json, write_json
from gaudi_calib.layout import CONVERGENCE_NAME, MANIFEST_NAME
from gaudi_calib.ranges.table import tabulate_ranges
from gaudi_calib.rankfiles.store import write_rank_set, write_rank_sets
from gaudi_calib.runs.calibrate import RunOptions, calibrate
from tests.support.files import write_prompts

pytestmark = pytest.mark.torch
KINDS = (
    *("llama", "mistral", "qwen2", "qwen3", "granite", "gemma2", "gemma3_text", "phi3"),
    *("opt", "gpt_neox", "falcon"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "llama4_text"),
    *("gpt_oss", "granitemoe", "granitemoehybrid", "glm4_moe"),
)
PROMPTS = [[(37 * row + 3 * place + place * place) % 300 for place in range(64)] for row in range(48)]


def make_run(model: Path, out: Path, **changes: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    data = write_prompts(out / "prompts.jsonl", PROMPTS)
    options = RunOptions(str(model), out, {"dataset": str(data)}, world=2, unified_world=1, engine="torch", **changes)
    return calibrate(options).root


def find(path: Path, **asked: str) -> set[str]:
    report = check_path(path, Asked(**asked))
    return {finding.kind for finding in (*report.errors, *report.warnings)}


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tiny_model("llama"), tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_run_of_every_family_has_no_finding(kind: str, tiny_model: Callable[[str], Path], tmp_path: Path):
    """For either device and every number of ranks; as the field serves it where the reference is known to fail."""
    preset = "field" if kind in ("qwen3", "qwen3_moe", "glm4_moe") else None
    report = check_path(make_run(tiny_model(kind), tmp_path, preset=preset))
    assert [(found.kind, found.what, found.where) for found in (*report.errors, *report.warnings)] == []
    assert len(report.places) == 2


def test_attention_that_is_known_to_fail_is_told(tiny_model: Callable[[str], Path], tmp_path: Path):
    """Where the model is there; the finding names the place and what takes other settings."""
    run = make_run(tiny_model("qwen3"), tmp_path, devices=("g3",))
    (found,) = check_path(run).warnings
    assert found.kind == "attention-fails"
    assert found.where == f"{run / 'maxabs_quant_g3.json'}, key blocklist"
    assert "vllm-hpu-extension#357" in str(found.why) and "--preset field" in str(found.fix)


def test_what_the_data_has_not_settled_is_told(llama: Path, tmp_path: Path):
    """Ranges of which the last sample set all but a few, and one that a single sample set; a cut record is damaged."""
    run = Path(shutil.copytree(llama, tmp_path / "llama"))
    for path in run.glob("maxabs_*.json"):
        write_json(path, {**read_json(path), "dump_stats_path": str(run / path.stem[-2:] / "inc_output")})
    path = run / CONVERGENCE_NAME
    record = read_json(path)
    ranges = [part for parts in record["nodes"].values() for part in parts.values()]
    ranges[0]["median"] = ranges[0]["moves"][-1][1] / 1024
    write_json(path, record)
    assert find(run) == {"sample-outlier"}
    last = record["samples"] - 1
    for part in ranges:
        part["median"] = part["moves"][-1][1] / 8
        part["moves"] = [[0, part["median"]], [last, part["moves"][-1][1]]]
    write_json(path, record)
    assert find(run) == {"data-unsettled"}
    path.write_text("{")
    assert find(run) == {"file-damaged"}


def test_modules_that_the_config_quantizes_have_ranges(tiny_model: Callable[[str], Path], tmp_path: Path):
    """What was blocked when it was measured has none; in files of unknown origin it may go by another name."""
    blocking = {"mode": "QUANTIZE", "blocklist": {"names": ["o_proj"]}, "dump_stats_path": "/x/y"}
    write_json(tmp_path / "quant.json", blocking)
    write_json(tmp_path / "measure.json", {**blocking, "mode": "MEASURE"})
    configs = {f"{name}_config": tmp_path / f"{name}.json" for name in ("quant", "measure")}
    run = make_run(tiny_model("llama"), tmp_path / "out", devices=("g3",), **configs)
    assert find(run) == set()
    path = run / "maxabs_quant_g3.json"
    write_json(path, {**read_json(path), "blocklist": {"names": [], "types": []}})
    assert find(run) == {"module-uncovered"}
    (run / "g3" / MANIFEST_NAME).unlink()
    assert find(run) == set()
    assert find(run, model=str(tiny_model("llama"))) == {"module-unmeasured"}


def test_files_of_a_card_are_complete_for_the_family(llama: Path, tiny_model: Callable[[str], Path], tmp_path: Path):
    """Without config and manifest, what the family's preset quantizes is what is needed."""
    ranks = CalibrationDir(llama / "g3").read_world(2)
    write_rank_sets(tmp_path, ranks)
    assert find(tmp_path, device="g3", model=str(tiny_model("llama"))) == set()
    for rank in ranks:
        table = tabulate_ranges(rank.nodes)
        kept = table.select(["1.mlp" not in name for name in table.inventory.names])
        write_rank_set(tmp_path, replace(rank, nodes=kept, modules=kept.inventory.names))
    assert find(tmp_path, device="g3") == set()
    assert find(tmp_path, device="g3", model=str(tiny_model("llama"))) == {"module-unmeasured"}


def test_a_pattern_that_matches_nothing_is_told(llama: Path, tmp_path: Path):
    """In a copy of a run, whose configs name the place where it was made."""
    run = Path(shutil.copytree(llama, tmp_path / "llama"))
    path = run / "maxabs_quant_g3.json"
    write_json(path, {**read_json(path), "blocklist": {"names": ["lm_hed"], "types": []}})
    assert find(run) == {"place-moved", "pattern-idle"}


def test_another_checkpoint_is_told(llama: Path, tiny_model: Callable[[str], Path]):
    """By its fingerprint."""
    assert find(llama, model=str(tiny_model("llama-tied"))) == {"model-foreign"}


def test_a_model_that_cannot_be_read_is_told(llama: Path, tmp_path: Path):
    """A directory without a checkpoint, and a name that is nowhere on this machine."""
    assert find(llama, model=str(tmp_path)) == {"model-unread"}
    assert find(llama, model="nobody/nothing") == {"model-unread"}
