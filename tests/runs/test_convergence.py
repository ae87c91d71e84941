"""What a run records of how its ranges came about, what it says about them, and what becomes of that later."""

import json
import shutil
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import FileError
from gaudi_calib.files import hash_file
from gaudi_calib.layout import CHANNEL_RANGES_NAME, CONVERGENCE_NAME
from gaudi_calib.runs.calibrate import calibrate, list_files
from gaudi_calib.runs.convergence import find_unsettled_dir
from gaudi_calib.runs.options import RunOptions
from tests.support import paths
from tests.support.files import EIGHT_PROMPTS, snapshot, write_prompts

pytestmark = pytest.mark.torch

MODEL = paths.GOLDEN / "llama-tiny" / "model"


def options(data: Path, out: Path, **changes) -> RunOptions:
    facts = {"model": str(MODEL), "out": out, "dataset": {"dataset": str(data)}, "engine": "torch"}
    return RunOptions(**{**facts, "devices": ("g3",), **changes})


def measure_into(out: Path, prompts: tuple[tuple[int, ...], ...] = EIGHT_PROMPTS, **changes) -> Path:
    """Calibrate on `prompts` and return the run directory."""
    out.mkdir()
    return calibrate(options(write_prompts(out, prompts), out, **changes)).root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run on eight prompts; do not change it."""
    return measure_into(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage."""
    return shutil.copytree(made, tmp_path / "run")


def find(run: Path) -> list[str]:
    return [finding.what for finding in find_unsettled_dir(CalibrationDir(run / "g3"))]


def test_a_run_records_how_its_ranges_came_about(made: Path):
    """Beside the channel ranges it is of; samples are told by their rows; `--dry-run` names the file."""
    record = json.loads((made / CONVERGENCE_NAME).read_text())
    assert record["measurement"] == hash_file(made / CHANNEL_RANGES_NAME)
    dataset = made.parent / "prompts.jsonl"
    assert record["origins"] == [f"{dataset}, row {number}" for number in range(1, 9)]
    ranges = json.loads((made / "g3" / "inc_output_hooks_maxabs_0_1.json").read_text())["Nodes"]
    for name, parts in record["nodes"].items():
        for part, progress in parts.items():
            kind, index = part.rstrip("]").split("[")
            assert progress["moves"][-1][1] == ranges[name][kind][int(index)][0][0], f"{name} {part}"
    assert made / CONVERGENCE_NAME in list_files(options(dataset, made.parent))


def test_too_little_data_is_said_at_the_end_and_told_of_the_directory(tmp_path: Path):
    """One sample has nothing to compare with; with eight like it nothing is said."""
    out = tmp_path / "out"
    out.mkdir()
    result = calibrate(options(write_prompts(out, EIGHT_PROMPTS[:1]), out))
    (warning,) = [text for text in result.warnings if "too little data" in text]
    assert "-l 4" in warning
    assert find(result.root) and all(what in "".join(result.warnings) for what in find(result.root))
    again = calibrate(options(write_prompts(out, EIGHT_PROMPTS[:1] * 8), out))
    assert find(again.root) == [] and not [text for text in again.warnings if "samples" in text]


def test_names_are_those_of_the_vllm_that_serves(tmp_path: Path):
    """As in the rank files: an older one calls the experts otherwise."""
    model = str(paths.GOLDEN / "mixtral-tiny" / "model")
    root = measure_into(tmp_path / "out", EIGHT_PROMPTS[:1], model=model, vllm="0.10")
    (finding,) = find_unsettled_dir(CalibrationDir(root / "g3"))
    assert "experts.moe_op" in str(finding.where) and "routed_experts" not in str(finding.where)


def test_later_commands_leave_the_record_alone(run: Path):
    """Scales of another method, and ranges of another world, are of the same measurement."""
    before = (run / CONVERGENCE_NAME).read_bytes()
    words = ["-m", MODEL, "-o", run.parent, "--name", run.name, "--device", "g3", "--scale-method", "maxabs_pow2"]
    assert main(["quantize", *map(str, words)]) == 0
    assert main(["reshard", str(run), "-t", "2"]) == 0
    assert (run / CONVERGENCE_NAME).read_bytes() == before
    assert find(run) == []


def test_a_merge_has_no_record(run: Path, tmp_path: Path):
    """Samples of several runs have no order; in place, the record moves away with what it was of."""
    other = measure_into(tmp_path / "other", EIGHT_PROMPTS[3:])
    assert main(["merge", str(run), str(other), "-o", str(tmp_path / "merged")]) == 0
    assert not (tmp_path / "merged" / CONVERGENCE_NAME).exists() and find(tmp_path / "merged") == []
    assert main(["merge", str(run), str(other), "-o", str(run)]) == 0
    assert not (run / CONVERGENCE_NAME).exists() and (run / "replaced" / CONVERGENCE_NAME).is_file()


def test_a_record_of_another_measurement_is_passed_over(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One that was copied says nothing about these ranges; without a manifest nobody knows."""
    shutil.copy(measure_into(tmp_path / "other", EIGHT_PROMPTS[:1]) / CONVERGENCE_NAME, run)
    assert find(run) == []
    assert "is of another measurement" in caplog.text
    (run / "g3" / "calibration_manifest.json").unlink()
    assert find(run) == []


DAMAGES = {
    "cut": lambda record: json.dumps(record)[:-40],
    "empty": lambda record: "",
    "a list": lambda record: "[]",
    "a number": lambda record: "7",
    "another version": lambda record: json.dumps({**record, "format": 2}),
    "no samples": lambda record: json.dumps({**record, "samples": None}),
    "origins of others": lambda record: json.dumps({**record, "origins": ["a"]}),
    "nodes of nothing": lambda record: json.dumps({**record, "nodes": [1]}),
    **{
        f"median {median}, moves {moves}": lambda record, median=median, moves=moves: json.dumps(
            {**record, "nodes": {"lm_head": {"inputs[0]": {"median": median, "moves": moves}}}}
        )
        for median, moves in [
            (1, []),
            (1, [[9, 1.0]]),
            (1, [[-1, 1.0]]),
            (1, [[3, 2.0], [1, 4.0]]),
            (1, [[0, 2.0], [1, 1.0]]),
            (1, [[0, float("nan")]]),
            (1, [[0]]),
            (float("nan"), [[0, 1.0]]),
            (-1, [[0, 1.0]]),
        ]
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_a_clear_error_and_keeps_nobody_from_working(damage: str, run: Path):
    """Only who asks for the record reads it: scales come from the ranges."""
    path = run / CONVERGENCE_NAME
    path.write_text(DAMAGES[damage](json.loads(path.read_text())))
    with pytest.raises(FileError) as caught:
        find(run)
    assert str(path) in str(caught.value) and caught.value.fix
    assert main(["reshard", str(run), "-t", "2"]) == 0


def test_a_failed_measurement_leaves_the_record_of_the_last_good_one(run: Path, tmp_path: Path):
    """It is staged with the files it is of."""
    before = snapshot(run, skipped=["calibration_manifest.json"])
    bad = write_prompts(tmp_path / "bad.jsonl", [[1, 2], [10**6]])
    words = ["-m", MODEL, "-d", bad, "-o", run.parent, "--name", run.name, "--engine", "torch", "--device", "g3"]
    assert main(["calibrate", *map(str, words)]) == 1
    assert snapshot(run, skipped=["calibration_manifest.json"]) == before
