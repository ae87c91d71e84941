"""`check`: each finding provoked on a good calibration, made of ranges that real Gaudis measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gaudi_calib.check.kinds import ERRORS, WARNINGS
from gaudi_calib.check.path import Asked, check_path
from gaudi_calib.cli.main import main
from gaudi_calib.config.method_form import MethodForm, build_table
from gaudi_calib.config.methods import SCALE_METHODS, MethodTable
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.files import read_json, write_json
from gaudi_calib.fp8 import GAUDI3
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import CoverageFacts, DatasetFacts, Manifest, WorldFacts
from gaudi_calib.provenance import hash_paths
from gaudi_calib.ranges.kvcache import apply_kv_cache
from gaudi_calib.ranges.table import tabulate_ranges
from gaudi_calib.rankfiles.store import read_scales, write_rank_set, write_rank_sets
from gaudi_calib.runs.quantize import Scaling, quantize_dir
from gaudi_calib.scales.compute import compute_scales
from tests.support.files import snapshot
from tests.support.fixes import find_advised, follow
from tests.support.paths import GOLDEN

REAL = GOLDEN / "real"
WIDE = {
    "default": {
        "weight": {"granularity": "PTS", "scale_value_type": "MAXABS", "rounding_method": "IDENTITY", "backoff": 0.5},
        "activation": {"granularity": "PTS", "scale_value_type": "MAXABS", "rounding_method": "IDENTITY"},
    }
}
LLAMA, MOE = REAL / "llama-3.1-70b", REAL / "deepseek-r1"
RANKS = "inc_output_hooks_maxabs_{}_4.npz"
SCALES = "inc_output_hooks_maxabs_MAXABS_HW_{}_4.npz"
DATA = DatasetFacts(name="chats.jsonl", prompts=512, tokens=65536)


@pytest.fixture
def run(good_run: Path, tmp_path: Path) -> Path:
    """A copy of a run without a fault, which a test may damage."""
    root = Path(shutil.copytree(good_run, tmp_path / "llama"))
    edit_config(root, dump_stats_path=str(root / "g3" / "inc_output"))
    return root


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks without a fault: config, manifest, ranges and scales for Gaudi 3."""
    root = tmp_path_factory.mktemp("good") / "llama"
    place = root / "g3"
    ranks = [apply_kv_cache(rank) for rank in CalibrationDir(LLAMA).read_world(4)]
    place.mkdir(parents=True)
    write_rank_sets(place, ranks)
    content = {"mode": "QUANTIZE", "observer": "maxabs", "scale_method": "maxabs_hw"}
    write_json(root / "maxabs_quant_g3.json", {**content, "dump_stats_path": str(place / "inc_output")})
    made = Manifest(
        status="ok", device="g3", dataset=DATA, measured_world=4, worlds={4: WorldFacts()},
        files=hash_paths(place.iterdir()), measurement="sha256:0",
    )  # fmt: skip
    write_json(place / MANIFEST_NAME, made.model_dump(mode="json"))
    quantize_dir(place)
    return root


def find(path: Path, **asked: Any) -> set[str]:
    """Return the kinds of what `check` finds."""
    report = check_path(path, Asked(**asked))
    assert all(finding.kind in ERRORS for finding in report.errors)
    assert all(finding.kind in WARNINGS and finding.what and finding.where for finding in report.warnings)
    return {finding.kind for finding in (*report.errors, *report.warnings)}


def edit_manifest(root: Path, **changes: Any) -> None:
    path = root / "g3" / MANIFEST_NAME
    made = Manifest.model_validate(read_json(path))
    write_json(path, made.model_copy(update=changes).model_dump(mode="json"))


def edit_config(root: Path, **changes: Any) -> None:
    path = root / "maxabs_quant_g3.json"
    write_json(path, {**read_json(path), **changes})


def forget(root: Path) -> Path:
    """Take away what tells where the files come from."""
    return forget_in(root / "g3")


def forget_in(place: Path) -> Path:
    (place / MANIFEST_NAME).unlink()
    return place


def edit_ranges(root: Path, node: str, part: str, value: float, *, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """Write `value`, or that many times what is there where it is a factor (1j), and scales that follow."""
    place = forget(root)
    for rank in CalibrationDir(place).read_world(4):
        table = tabulate_ranges(rank.nodes)
        for position in range(table.inventory.size) if rank.rank in ranks else ():
            if all(map(str.__contains__, table.describe_number(position), (node, part))):
                old = table.numbers[position]
                table.numbers[position] = old * np.imag(value) if isinstance(value, complex) else value
        write_rank_set(place, rank)
    for path in place.glob("*MAXABS_HW*"):
        path.unlink()
    if np.isfinite(value):
        quantize_dir(place)


def edit_scales(root: Path, change: Callable[[float], float]) -> None:
    place = forget(root)
    for path in place.glob("*MAXABS_HW*.json"):
        scales = read_scales(path)
        scales.nodes.numbers[:] = [change(number) for number in scales.nodes.numbers.tolist()]
        write_rank_set(place, scales, method="MAXABS_HW")


def replace_scales(root: Path, device: str | None, method: str = "MAXABS_HW") -> None:
    """Put scales of another device or method in the place of those that belong there."""
    place = forget(root)
    other = Path(shutil.copytree(place, root / "other"))
    for path in other.glob("*MAXABS_HW*"):
        path.unlink()
    quantize_dir(other, scaling=Scaling(method=method.lower(), device=device or "g3"))
    for path in other.glob(f"*_{method}_*"):
        shutil.copy(path, place / path.name.replace(method, "MAXABS_HW"))
    shutil.rmtree(other)


def drop_node(root: Path, ranks: tuple[int, ...] = (2,)) -> None:
    place = forget(root)
    for rank in CalibrationDir(place).read_world(4):
        table = tabulate_ranges(rank.nodes)
        if rank.rank in ranks:
            keep = ["o_proj" not in name for name in table.inventory.names]
            write_rank_set(place, type(rank)(rank.rank, 4, table.select(keep), rank.modules, rank.num_samples))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def swap_json(root: Path) -> None:
    place = forget(root)
    shutil.copy(place / "inc_output_hooks_maxabs_1_4.json", place / "inc_output_hooks_maxabs_0_4.json")


def fail(root: Path, status: str, *, with_last: bool) -> None:
    path = root / "g3" / MANIFEST_NAME
    last = Manifest.model_validate(read_json(path)) if with_last else None
    write_json(path, Manifest(status=status, error="killed", last_good=last).model_dump(mode="json"))


def move(root: Path) -> None:
    """The run was copied; its config names the place where it was made, which is there no longer."""
    edit_config(root, dump_stats_path="/made/elsewhere/g3/inc_output")


COLD = CoverageFacts(policy="ignore", min_tokens=8, tokens={"moe_op": [9, 3]}, cold={"moe_op": [1]})
FAULTS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "config error": (lambda run: edit_config(run, scale_metod="maxabs_hw"), {"config-invalid"}),
    "measure config": (
        lambda run: write_json(run / "maxabs_measure_g3.json", {"mode": "MEASURE", "observer": "minmax"}),
        {"config-invalid"},
    ),
    "ignored key": (lambda run: edit_config(run, local_rank=0), {"config"}),
    "moved": (move, {"place-moved"}),
    "leads nowhere": (lambda run: edit_config(run, dump_stats_path="/no/where/x"), {"place-missing"}),
    "empty": (lambda run: shutil.rmtree(run / "g3"), {"place-missing"}),
    "running": (lambda run: fail(run, "running", with_last=False), {"run-unfinished"}),
    "failed later": (lambda run: fail(run, "failed", with_last=True), {"run-repeated"}),
    "rank lost": (
        lambda run: [path.unlink() for path in (run / "g3").glob("*_3_4*") if "HW" not in path.name],
        {"rank-missing", "scales-stale"},
    ),
    "npz lost": (lambda run: (run / "g3" / SCALES.format(1)).unlink(), {"npz-missing"}),
    "cut short": (
        lambda run: damage(run / "g3" / RANKS.format(1)), {"file-changed", "file-damaged", "scales-stale"},
    ),
    "cut short, unrecorded": (lambda run: [forget(run), damage(run / "g3" / RANKS.format(1))], {"file-damaged"}),
    "scales cut short": (lambda run: [forget(run), damage(run / "g3" / SCALES.format(1))], {"file-damaged"}),
    "directory for a file": (
        lambda run: [(run / "g3" / SCALES.format(1)).unlink(), (run / "g3" / SCALES.format(1)).mkdir()],
        {"npz-missing"},
    ),
    "list of modules": (
        lambda run: (forget(run) / "inc_output_hooks_maxabs_1_4_mod_list.json").write_text("[1, 2]"), {"file-damaged"},
    ),
    "json edited": (swap_json, {"file-damaged"}),
    "manifest cut short": (lambda run: damage(run / "g3" / MANIFEST_NAME), {"file-damaged"}),
    "node lost on a rank": (drop_node, {"nodes-differ", "module-silent", "scales-foreign"}),
    "node lost": (
        lambda run: [drop_node(run, (0, 1, 2, 3)), quantize_dir(run / "g3")], {"module-silent"},
    ),
    "NaN": (lambda run: edit_ranges(run, "o_proj", "inputs[0]", np.nan), {"range-damaged", "scales-missing"}),
    "inf": (lambda run: edit_ranges(run, "qkv_proj", "weight", np.inf), {"range-damaged", "scales-missing"}),
    "zero": (lambda run: edit_ranges(run, "4.mlp.down_proj", "inputs[0]", 0.0), {"range-zero"}),
    "too large": (lambda run: edit_ranges(run, "4.mlp.down_proj", "inputs[0]", 60000.0), {"range-beyond"}),
    "odd rank": (lambda run: edit_ranges(run, "layers", "inputs", 2j, ranks=(2,)), {"rank-outlier"}),
    "cache": (lambda run: edit_ranges(run, "k_cache", "inputs[0]", 2j), {"kv-cache"}),
    "scales lost": (
        lambda run: [path.unlink() for path in (run / "g3").glob("*HW_2_4*")], {"scales-missing"},
    ),
    "other method": (lambda run: edit_config(run, scale_method="maxabs_pow2"), {"scales-missing"}),
    "other backoff": (
        lambda run: edit_config(run, scale_method="maxabs_hw", scale_params={"input_backoff": 1.0}),
        {"config", "scales-stale", "scales-otherwise"},
    ),
    "scales of g2": (lambda run: replace_scales(run, "g2"), {"scales-otherwise"}),
    "scales of another method": (lambda run: replace_scales(run, None, "MAXABS_ARBITRARY"), {"scales-otherwise"}),
    "scales edited": (lambda run: edit_scales(run, lambda scale: scale * 3), {"scales-differ"}),
    "scales of 0": (lambda run: edit_scales(run, lambda scale: 0.0), {"scales-zero", "scales-differ"}),
    "few prompts": (
        lambda run: edit_manifest(run, dataset=DATA.model_copy(update={"prompts": 3})), {"data-little"},
    ),
    "cold experts": (lambda run: edit_manifest(run, expert_coverage=COLD), {"expert-cold"}),
    "no device": (lambda run: [forget(run), (run / "g3").rename(run / "x")], {"device-unknown"}),
}  # fmt: skip


def test_a_good_run_has_no_finding(run: Path):
    """Nor has its device directory, its QUANT_CONFIG, or the same files without a manifest."""
    for path in (run, run / "g3", run / "maxabs_quant_g3.json"):
        assert (path, find(path)) == (path, set())
    assert find(run, world=4, device="g3") == set()
    assert find(forget(run)) == set()


def test_configs_of_others_are_not_looked_at(run: Path):
    """Anything may lie beside a directory of ranges."""
    edit_config(run, dump_stats_path="/no/where/x")
    (run / "maxabs_quant_g3.json").rename(run / "another.json")
    (run / "g3").rename(run / "ranges")
    assert find(forget_in(run / "ranges"), device="g3") == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(run: Path, fault: str):
    """That fault, and nothing that does not follow from it."""
    corrupt, expected = FAULTS[fault]
    corrupt(run)
    assert find(run / "x" if fault == "no device" else run) == expected


def copy_moe(tmp_path: Path) -> Path:
    place = tmp_path / "g3"
    place.mkdir()
    write_rank_sets(place, [apply_kv_cache(rank) for rank in CalibrationDir(MOE).read_world(8)])
    return place


def set_experts(place: Path, value: float, *, experts: slice, ranks: tuple[int, ...]) -> None:
    """Write the maxima of some experts of the fused op, on some ranks."""
    for rank in CalibrationDir(place).read_world(8):
        table = tabulate_ranges(rank.nodes)
        for name, shape, start in zip(table.inventory.names, table.inventory.shapes, table.inventory.starts):
            if name.endswith("moe_op"):
                outputs = table.numbers[start + len(shape.inputs) + 1 : start + shape.size]
                outputs[experts if rank.rank in ranks else slice(0)] = value
                outputs[outputs == 0] = value or 0.0 if rank.rank not in ranks else outputs[outputs == 0]
        write_rank_set(place, rank)


def test_idle_experts_are_counted(tmp_path: Path):
    """As many as the ranks have together; scales of 0 of a method that has them are errors."""
    place = copy_moe(tmp_path)
    set_experts(place, 1.0, experts=slice(None), ranks=tuple(range(8)))
    assert find(place) == set()
    set_experts(place, 0.0, experts=slice(3), ranks=(1, 5))
    assert find(place) == {"expert-idle"}
    (finding,) = check_path(place).warnings
    layers = len(
        {name for name in tabulate_ranges(CalibrationDir(place).read_world(8)[0].nodes) if name[-6:] == "moe_op"}
    )
    assert finding.what.startswith(f"experts that saw no token: {6 * layers} of {256 * layers} ")
    quantize_dir(place, scaling=Scaling(method="maxabs_arbitrary", allows_idle=True))
    assert find(place) == {"expert-idle", "scales-zero"}


def test_a_layer_of_dead_experts_is_an_error(tmp_path: Path):
    """Nothing of what it computes is left when serving."""
    place = copy_moe(tmp_path)
    set_experts(place, 0.0, experts=slice(None), ranks=tuple(range(8)))
    assert find(place) == {"expert-idle", "layer-dead"}


def test_a_range_of_an_expert_can_be_too_large(tmp_path: Path):
    """It is clipped as any other."""
    place = copy_moe(tmp_path)
    set_experts(place, 1.0, experts=slice(None), ranks=tuple(range(8)))
    set_experts(place, 120832.0, experts=slice(1), ranks=(2,))
    assert find(place) == {"range-beyond"}


def test_a_layer_unlike_the_others_is_told(tmp_path: Path):
    """Twenty times what is usual for a range of its kind."""
    place = tmp_path / "g3"
    place.mkdir()
    rank = CalibrationDir(LLAMA).read_world(1)[0]
    table = tabulate_ranges(apply_kv_cache(rank).nodes)
    layers = [name for name in table.inventory.names if ".4." in name]
    nodes = {name.replace(".4.", f".{layer}."): table[name] for layer in range(6) for name in layers}
    whole = tabulate_ranges(nodes)
    write_rank_set(place, type(rank)(0, 1, whole, tuple(nodes), None))
    assert find(place) == set()
    whole.numbers[whole.inventory.starts[5 * len(layers)] :] *= 20
    write_rank_set(place, type(rank)(0, 1, whole, tuple(nodes), None))
    report = check_path(place)
    assert [finding.kind for finding in report.warnings] == ["layer-outlier"]
    assert report.warnings[0].where == "layer 5 on 1 rank (20 times)"


def test_scales_that_somebody_merged_are_recognized(run: Path):
    """Maxima of the scales of two ranks in the place of scales of the maxima."""
    forget(run)
    merged = json.loads((REAL / "llama-3.1-70b_merged.json").read_text())
    place = run / "g3"
    for path in place.iterdir():
        path.unlink()
    for method, nodes in (("", merged["ranges"]), ("_MAXABS_HW", merged["scales"])):
        content = {"GlobalRank": None, "LocalRank": -1, "Mode": "Scale" if method else "DynamicRange", "Nodes": nodes}
        write_json(place / f"inc_output_hooks_maxabs{method}_0_1.json", content)
    assert "scales-otherwise" in find(place)
    (why,) = [found.why for found in check_path(place).warnings if found.kind == "scales-otherwise"]
    assert "maxima of the scales" in str(why)


@pytest.mark.parametrize(
    ("table", "on_cpu", "why"),
    [
        (MethodTable(SCALE_METHODS["MAXABS_ARBITRARY"]), True, "maxabs_arbitrary on g3 as INC computes it on a CPU"),
        (MethodTable(SCALE_METHODS["MAXABS_HW"]), False, "maxabs_hw on g3"),
        (build_table(MethodForm.model_validate(WIDE)), False, "backoffs 1.0 (activations) and 0.5 (weights)"),
    ],
    ids=["arithmetic", "method", "backoff"],
)
def test_scales_made_otherwise_are_explained(run: Path, table: MethodTable, on_cpu: bool, why: str):
    """By the arithmetic of a CPU, another method, or another backoff, under the name of MAXABS_ARBITRARY."""
    place = forget(run)
    for rank in CalibrationDir(place).read_world(4):
        scales = compute_scales(rank, table, GAUDI3, weights=lambda _: None, as_on_cpu=on_cpu)
        write_rank_set(place, scales, method="MAXABS_ARBITRARY")
    (finding,) = check_path(place).warnings
    assert finding.kind == "scales-otherwise" and why in str(finding.why)


def test_a_world_that_is_not_there_is_an_error_that_says_what_makes_it(run: Path, capsys: pytest.CaptureFixture):
    """The command it names makes it."""
    assert find(run, world=2) == {"world-missing"}
    assert main(["check", str(run), "-t", "2", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["severity"] == "error" and f"gaudi-calib unify {run / 'g3'} -r 2 --from-world 4" in row["fix"]


MENDED: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "npz": (lambda run: (run / "g3" / SCALES.format(1)).unlink(), set()),
    "all npz": (lambda run: [forget(run), *(path.unlink() for path in (run / "g3").glob("*.npz"))], set()),
    "cache": (FAULTS["cache"][0], set()),
    "scales lost": (FAULTS["scales lost"][0], set()),
    "stale": (FAULTS["other backoff"][0], {"config"}),
    "other method": (FAULTS["other method"][0], set()),
    "moved": (FAULTS["moved"][0], set()),
    "damaged": (FAULTS["cut short, unrecorded"][0], {"file-damaged"}),
    "edited": (FAULTS["scales edited"][0], {"scales-differ"}),
    "nothing": (lambda run: None, set()),
}


@pytest.mark.parametrize("fault", MENDED)
def test_fix_mends_what_is_safe_to_mend(run: Path, fault: str):
    """And nothing else; a second time nothing changes."""
    corrupt, left = MENDED[fault]
    corrupt(run)
    report = check_path(run, fixes=True)
    assert {finding.kind for finding in (*report.errors, *report.warnings)} == left
    assert bool(report.done) == (fault not in ("nothing", "damaged", "edited"))
    before = snapshot(run)
    assert check_path(run, fixes=True).done == ()
    assert snapshot(run) == before


def test_fix_of_one_world_keeps_the_scales_of_the_others(run: Path):
    """The ranges of all of them change; what cannot be computed anew stays as it is."""
    forget(run)
    place = run / "g3"
    write_rank_sets(place, [apply_kv_cache(rank) for rank in CalibrationDir(LLAMA).read_world(2)])
    quantize_dir(place)
    for rank in CalibrationDir(place).read_world(4):
        table = tabulate_ranges(rank.nodes)
        table.numbers[[table.inventory.starts[row] for row, name in enumerate(table) if name.endswith("k_cache")]] *= 2
        write_rank_set(place, rank)
    assert "kv-cache" in find(run)
    assert check_path(run, Asked(world=4), fixes=True).errors == ()
    assert find(run) == set()


def test_fix_leaves_scales_that_it_cannot_compute(run: Path):
    """Those of a method that takes the weights: the ranges stay, too, and a second time nothing is done."""
    FAULTS["cache"][0](run)
    place = run / "g3"
    for path in list(place.glob("*_MAXABS_HW_*")):
        path.rename(path.with_name(path.name.replace("MAXABS_HW", "ACT_MAXABS_HW_WEIGHTS_PCS_MAXABS_POW2")))
    (run / "maxabs_quant_g3.json").unlink()
    before = snapshot(run)
    assert check_path(run, fixes=True).done == ()
    assert snapshot(run) == before and find(run) == {"kv-cache"}


def test_a_restored_npz_is_the_one_that_was_lost(run: Path):
    """To the byte, so that the manifest still knows it."""
    before = snapshot(run)
    for path in (run / "g3").glob("*.npz"):
        path.unlink()
    assert check_path(run, fixes=True).errors == ()
    assert snapshot(run) == before


@pytest.mark.parametrize("fault", ["npz lost", "cache", "scales lost", "other method", "other backoff", "moved"])
def test_the_command_that_a_fix_names_mends_it(run: Path, fault: str, capsys: pytest.CaptureFixture[str]):
    """As it is printed."""
    FAULTS[fault][0](run)
    report = check_path(run)
    told = [found for found in (*report.errors, *report.warnings) if found.kind != "config"]
    for line in dict.fromkeys(line for found in told for line in find_advised(str(found))):
        follow(line, run, capsys)
    assert told and find(run) - {"config"} == set()


def test_several_measurements_of_a_directory_are_each_looked_at(run: Path):
    """What their commands do not tell apart by rank and world, they do by name."""
    place = forget(run)
    for path in list(place.iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("inc_output", "inc_measure_output")))
    assert find(place) == set()
    (place / SCALES.format(2).replace("inc_output", "inc_measure_output")).unlink()
    (place / SCALES.format(2).replace("inc_output", "inc_measure_output")).with_suffix(".json").unlink()
    (finding,) = check_path(place).errors
    assert finding.kind == "scales-missing" and "--dump inc_measure_output" in str(finding.fix)
    assert check_path(place, fixes=True).errors == ()


# What is found in excerpts of published sets, which have no `.npz`.
PUBLISHED = {
    "deepseek-r1": ("g3", {"npz-missing", "expert-idle"}),
    "llama-2-7b": ("g2", {"npz-missing"}),
    "llama-3.1-70b": ("g3", {"npz-missing", "scales-otherwise"}),
    "llama-4-maverick": ("g3", {"npz-missing", "rank-missing"}),
    "llama-4-maverick-ep8": ("g3", {"npz-missing", "expert-idle"}),
    "mixtral-8x7b": ("g3", {"kv-cache", "scales-otherwise"}),
    "qwen3-235b": ("g2", {"npz-missing", "expert-idle"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets(name: str):
    """What was found by hand, and no more."""
    device, expected = PUBLISHED[name]
    assert find(REAL / name, device=device) == expected


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("nowhere",), 2, "does not exist"),
        ((REAL,), 1, "no ranges in the directory"),
        ((LLAMA / "inc_output_hooks_maxabs_0_1.json",), 1, "unknown key"),
        ((LLAMA, "--device", "g3", "-m", "./no-model"), 1, "no model directory"),
        ((LLAMA, "-t", 3, "--device", "g3"), 1, "no ranges of rank 0 of 3"),
    ],
    ids=["missing", "no ranges", "no config", "no model", "no world"],
)
def test_what_is_no_calibration_is_told(words: tuple, code: int, what: str, capsys: pytest.CaptureFixture):
    """What, where and a fix; nothing unexpected."""
    assert main(["check", *map(str, words)]) == code
    printed = capsys.readouterr()
    assert what in printed.out + printed.err and "unexpected" not in printed.err


def test_every_kind_is_provoked():
    """The table of kinds has no row that no test shows."""
    shown = set().union(*(expected for _, expected in FAULTS.values()), *(kinds for _, kinds in PUBLISHED.values()))
    here = Path(__file__).read_text()
    elsewhere = Path(__file__).with_name("test_models.py").read_text()
    assert {
        kind for kind in {**ERRORS, **WARNINGS} if kind not in shown and f'"{kind}"' not in here + elsewhere
    } == set()
