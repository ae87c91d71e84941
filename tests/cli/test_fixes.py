"""What errors and warnings advise is run as printed: then the command succeeds, or fails with the next honest error.

Commands run in a directory of their own, neither the one that the runs were made in nor theirs; the run's place has
a blank and a quote in its name. No fix is printed by `prepare`, `relocate`, `convert-weights` and `config` that
names a command.
"""

import ast
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gaudi_calib.advice import advise_repeating
from gaudi_calib.cli.main import main
from gaudi_calib.layout import CHANNEL_RANGES_NAME, MANIFEST_NAME
from tests.support.files import write_prompts
from tests.support.fixes import find_advised, follow, run_words, settle
from tests.support.paths import GOLDEN, ROOT

pytestmark = pytest.mark.torch

MODEL, EXPERTS = GOLDEN / "llama-tiny" / "model", GOLDEN / "mixtral-tiny" / "model"
REFERENCE = GOLDEN / "llama-tiny" / "tp2" / "g2"  # files that vllm-gaudi left
SCALES = "inc_output_hooks_maxabs_MAXABS_HW"
RANGES = "inc_output_hooks_maxabs"


@dataclass
class Place:
    """Runs that a test may damage.

    Attributes:
        out: holds the run `model`, of worlds 2 and 1 for both devices.
        other: holds a run of the same model on other data, for Gaudi 3.
        cwd: where commands run; `a checkpoint` in it is the model under another name than the run's.
        data: what the runs were measured on.
    """

    out: Path
    other: Path
    cwd: Path
    data: Path

    @property
    def root(self) -> Path:
        return self.out / "model"

    @property
    def g3(self) -> Path:
        return self.root / "g3"

    def remove(self, *patterns: str) -> None:
        """Remove files of the run."""
        for path in (path for pattern in patterns for path in self.root.glob(pattern)):
            path.unlink()

    def lose_channels(self) -> None:
        self.remove(CHANNEL_RANGES_NAME)

    def put_reference(self, name: str, files: str = "*") -> Path:
        """Put files of vllm-gaudi, without manifest and config, into a device directory called `name`."""
        directory = self.cwd / "theirs" / "model" / name
        directory.mkdir(parents=True)
        for path in REFERENCE.glob(files):
            shutil.copy(path, directory)
        return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the golden model on relative paths, and one of a model with experts, whole ones on each rank."""
    directory = tmp_path_factory.mktemp("made")
    write_prompts(directory / "a.jsonl")
    write_prompts(directory / "b.jsonl", [[3, 250, 77, 41, 8, 100, 2]])
    runs = [
        *(["-m", MODEL, "-d", "a.jsonl", "-o", "out", "-t", "2", "-r", "1"],),
        *(["-m", MODEL, "-d", "b.jsonl", "-o", "other", "-t", "2", "--device", "g3"],),
        *(["-m", EXPERTS, "-d", "a.jsonl", "-o", "experts", "-t", "2", "-u", "--cold-experts", "ignore"],),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for words in runs:
            assert main(["calibrate", "--engine", "torch", *map(str, words)]) == 0
    return directory


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    """A copy of the runs."""
    here = tmp_path / "it's here"
    for name in ("out", "other"):
        shutil.copytree(made / name, here / name)
        assert main(["relocate", str(here / name / "model")]) == 0
    cwd = tmp_path / "elsewhere"
    shutil.copytree(MODEL, cwd / "a checkpoint")
    return Place(here / "out", here / "other", cwd, made / "a.jsonl")


def serve(place: Place, *more: object, device: str = "g3", model: object = MODEL) -> list[object]:
    """The words of `serve --print`."""
    config = place.root / f"maxabs_quant_{device}.json"
    return ["serve", "-m", model, "--quant-config", config, "--print", "--device", device, *more]


def quantize(place: Place, *more: object) -> list[object]:
    return ["quantize", "-m", MODEL, "-o", place.out, *more]


def copy_rank(place: Place) -> None:
    """Give rank 1 of 2 the ranges of another run."""
    for suffix in ("json", "npz"):
        shutil.copy(place.other / f"model/g3/{RANGES}_1_2.{suffix}", place.g3)


def model_of_another_name(place: Place) -> list[object]:
    return serve(place, "-t", 4, model="a checkpoint")


def npz_missing(place: Place) -> list[object]:
    place.remove(f"g3/{RANGES}_1_2.npz")
    return serve(place, "-t", 2, model="a checkpoint")


def npz_missing_without_channels(place: Place) -> list[object]:
    place.lose_channels()
    return npz_missing(place)


def scales_missing(place: Place) -> list[object]:
    place.remove(f"g3/{SCALES}_1_2.*")
    return serve(place, "-t", 2, model="a checkpoint")


def scales_damaged(place: Place) -> list[object]:
    (place.g3 / f"{SCALES}_1_2.npz").write_bytes(b"")
    return serve(place, "-t", 2)


def scales_stale(place: Place) -> list[object]:
    path = place.root / "maxabs_quant_g3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale_params": {"input_backoff": 0.5}}))
    return serve(place, "-t", 2)


def ranges_of_another_run(place: Place) -> list[object]:
    copy_rank(place)
    return serve(place, "-t", 2)


def other_device(place: Place) -> list[object]:
    shutil.rmtree(place.g3)
    place.remove("maxabs_quant_g3.json")
    config = place.root / "maxabs_quant_g2.json"
    return ["serve", "-m", MODEL, "--quant-config", config, "--print", "--device", "g3", "-t", 2]


def never_finished(place: Place) -> list[object]:
    """A calibration of relative paths failed for its data, which were mended since."""
    data = place.cwd / "data.jsonl"
    data.write_text('{"prompt_token_ids": [1, 2]}\n{"prompt_token_ids": ["x"]}\n')
    words = ["calibrate", "-m", "a checkpoint", "-d", "data.jsonl", "-o", "new", "--engine", "torch", "-t", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.cwd)
        patch.setattr(sys, "argv", ["/usr/bin/gaudi-calib", *words])
        assert main(words) == 1
    write_prompts(data)
    root = place.cwd / "new" / "a checkpoint"
    (root / "maxabs_quant_g3.json").write_text(
        json.dumps({"mode": "QUANTIZE", "dump_stats_path": str(root / "g3/inc_output")})
    )
    place.cwd = place.out
    return ["serve", "-m", MODEL, "--quant-config", root / "maxabs_quant_g3.json", "--print", "--device", "g3", "-t", 2]


def no_ranges_of_the_world(place: Place) -> list[object]:
    place.lose_channels()
    return quantize(place, "-t", 4, "--device", "g3")


def no_ranges_of_the_device(place: Place) -> list[object]:
    place.lose_channels()
    shutil.rmtree(place.g3)
    return quantize(place, "-t", 2, "--device", "g3")


def all_devices_where_one_has_files(place: Place) -> list[object]:
    place.lose_channels()
    shutil.rmtree(place.root / "g2")
    return quantize(place, "-t", 4, "--device", "all")


def another_dtype(place: Place) -> list[object]:
    return quantize(place, "-t", 2, "--dtype", "float16", "--device", "g3")


def weights_trained_on(place: Place) -> list[object]:
    """The model at the same path has other weights than it had."""
    words = ["-m", "a checkpoint", "-o", place.out, "--name", "model"]
    for device in ("g2", "g3"):
        path = place.root / device / MANIFEST_NAME
        content = json.loads(path.read_text())
        model = content["model"] | {"name": str(place.cwd / "a checkpoint"), "fingerprint": "sha256:0"}
        path.write_text(json.dumps(content | {"model": model}))
    return ["quantize", *words, "-t", 2]


def ranges_that_a_merge_left_out(place: Place) -> list[object]:
    assert main(["merge", str(place.g3), str(place.other / "model/g3"), "-o", str(place.g3)]) == 0
    return quantize(place, "-t", 4, "--device", "g3")


def rank_missing(command: str) -> Callable[[Place], list[object]]:
    def provoke(place: Place) -> list[object]:
        place.remove("g3/*_1_2*")
        return {
            "unify": ["unify", place.g3, "-r", 1, "--from-world", 2],
            "expand": ["expand", place.g3, "-w", 4, "--from-world", 2],
            "quantize": quantize(place, "-t", 2, "--device", "g3"),
        }[command]

    return provoke


def rank_changed(command: str) -> Callable[[Place], list[object]]:
    def provoke(place: Place) -> list[object]:
        copy_rank(place)
        return {
            "postprocess": ["postprocess", place.g3],
            "unify": ["unify", place.g3, "-r", 1, "--from-world", 2],
            "merge": ["merge", place.g3, place.other / "model/g3", "-o", place.out.parent / "both/model/g3"],
        }[command]

    return provoke


def rank_missing_without_channels(place: Place) -> list[object]:
    place.lose_channels()
    return rank_missing("unify")(place)


def rank_missing_of_theirs(place: Place) -> list[object]:
    """vllm-gaudi's directory has world 2 alone, and `expand` starts from world 1."""
    place.put_reference("measured", f"{RANGES}_[01]_2*")
    return ["expand", "theirs/model/measured", "-w", 4, "--no-expert-parallel"]


def nothing_to_merge_in_common(place: Place) -> list[object]:
    place.remove("g3/*_0_1*")
    place.lose_channels()
    theirs = place.put_reference("g3", f"{RANGES}_[01]_2*")
    assert main(["unify", str(theirs), "-r", "1", "--no-expert-parallel"]) == 0
    for path in theirs.glob("*_2*"):
        path.unlink()
    return ["merge", place.g3, "theirs/model/g3", "-o", "both"]


def scales_of_theirs_missing(place: Place) -> list[object]:
    """vllm-gaudi's run for Gaudi 2, of which only the config's name and the directory's tell the device."""
    root = place.put_reference("g2", f"{RANGES}_[01]_2*").parent
    path = root / "maxabs_quant_g2.json"
    path.write_text(json.dumps({"mode": "QUANTIZE", "dump_stats_path": str(root / "g2/inc_output")}))
    return ["serve", "-m", "a checkpoint", "--quant-config", path, "--print", "--device", "g2", "-t", 2]


def calibrate_another_checkpoint(place: Place) -> list[object]:
    """The fix moves the calibration of the other one away."""
    (place.cwd / "new").mkdir()
    model = (place.cwd / "a checkpoint").rename(place.cwd / "new/Model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5 + config["rms_norm_eps"]}))
    return ["calibrate", "-m", model, "-d", place.data, "-o", place.out, "--engine", "torch"]


def measure_another_checkpoint(place: Place) -> list[object]:
    return ["measure", *calibrate_another_checkpoint(place)[1:]]


SITUATIONS = [
    *(model_of_another_name, npz_missing, npz_missing_without_channels, scales_missing, scales_damaged, scales_stale),
    *(ranges_of_another_run, other_device, never_finished),
    *(no_ranges_of_the_world, no_ranges_of_the_device, all_devices_where_one_has_files, another_dtype),
    *(weights_trained_on, ranges_that_a_merge_left_out),
    *(rank_missing_without_channels, rank_missing_of_theirs, nothing_to_merge_in_common),
    *(scales_of_theirs_missing, calibrate_another_checkpoint, measure_another_checkpoint),
    *(pytest.param(rank_missing(command), id=f"rank_missing-{command}") for command in ("unify", "expand", "quantize")),
    *(
        pytest.param(rank_changed(command), id=f"rank_changed-{command}")
        for command in ("postprocess", "unify", "merge")
    ),
]


@pytest.mark.parametrize("provoke", SITUATIONS)
def test_what_an_error_advises_mends_it(
    provoke: Callable[[Place], list[object]], place: Place, capsys: pytest.CaptureFixture
) -> None:
    """The command that failed succeeds, after what its errors advise was run as printed."""
    words = ["gaudi-calib", *map(str, provoke(place))]
    assert run_words(words, place.cwd, capsys).code in (1, 2)
    settle(words, place.cwd, capsys)


def test_what_is_redacted_has_to_be_filled_in() -> None:
    """A manifest keeps no secrets, so that a command with one cannot be repeated as it is, and that is said."""
    fix = advise_repeating(["/bin/gaudi-calib", "measure", "--env", "HF_TOKEN=[redacted]"], str(Path.cwd()))
    assert fix == "run it again, with what is [redacted] filled in: gaudi-calib measure --env 'HF_TOKEN=[redacted]'"


def test_a_device_without_files_stays_without(place: Place, capsys: pytest.CaptureFixture) -> None:
    """`quantize --device all` that fails leaves no manifest of a device that the run does not have."""
    words = ["gaudi-calib", *map(str, all_devices_where_one_has_files(place))]
    assert run_words(words, place.cwd, capsys).code == 1
    assert not (place.root / "g2").exists()


def test_no_other_device_is_advised(place: Place, capsys: pytest.CaptureFixture) -> None:
    """Files of Gaudi 2 that somebody left are made anew for Gaudi 2."""
    told = run_words(["gaudi-calib", *map(str, scales_of_theirs_missing(place))], place.cwd, capsys)
    assert "--device g2" in told.err and "g3" not in told.err


def test_the_shell_takes_it_as_printed(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Blanks and quotes in paths are quoted for it."""
    told = run_words(["gaudi-calib", *map(str, moved_run("serve")(place))], place.cwd, capsys)
    (line,) = find_advised(told.err)
    program = tmp_path / "gaudi-calib"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gaudi_calib "$@"\n')
    program.chmod(0o755)
    assert run_words(["sh", "-c", line], place.cwd, capsys, PATH=f"{tmp_path}:{os.environ['PATH']}").code == 0
    assert str(place.root) in json.loads((place.root / "maxabs_quant_g3.json").read_text())["dump_stats_path"]


def test_an_unblocked_module_gets_ranges(place: Place, capsys: pytest.CaptureFixture) -> None:
    """Once it is unblocked in the MEASURE config, too, as the fix says first, what it says then gives it ranges."""
    configs = [place.root / f"maxabs_{phase}_g3.json" for phase in ("measure", "quant")]

    def block(path: Path, *names: str) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"blocklist": {"types": [], "names": names}}))

    for path in configs:
        block(path, "matmul_qk")
    words = ["-m", MODEL, "-d", place.data, "-o", place.out, "-t", 2, "--device", "g3", "--engine", "torch"]
    assert main(["calibrate", *map(str, words)]) == 0
    block(configs[1])
    words = ["gaudi-calib", *map(str, quantize(place, "-t", 2, "--device", "g3"))]
    (advised,) = find_advised(run_words(words, place.cwd, capsys).err)
    block(configs[0])
    follow(advised, place.cwd, capsys)
    assert run_words(words, place.cwd, capsys).code == 0
    assert any("matmul_qk" in name for name in json.loads((place.g3 / f"{RANGES}_1_2.json").read_text())["Nodes"])


# What must work once a fix was followed that reaches the same by another way, and which of those that are printed.
OTHER_WAYS = [
    pytest.param(
        ("reshard", "RUN", "-t", 4, "--device", "g3"), lambda place: place.lose_channels(), 0, id="no-channels"
    ),
    pytest.param(("reshard", "RUN", "-t", 4, "--device", "g3"), ranges_that_a_merge_left_out, 1, id="left-out"),
]


@pytest.mark.parametrize(("words", "damage", "way"), OTHER_WAYS)
def test_another_way_to_the_same_files(
    words: tuple[object, ...],
    damage: Callable[[Place], object],
    way: int,
    place: Place,
    capsys: pytest.CaptureFixture,
) -> None:
    """Where a command cannot work here, another that is advised makes the ranges that were asked for."""
    damage(place)
    words = ("gaudi-calib", *(str(place.root) if word == "RUN" else str(word) for word in words))
    told = run_words([*words], place.cwd, capsys)
    assert told.code == 1
    follow(find_advised(told.err)[way], place.cwd, capsys)
    settle(["gaudi-calib", *map(str, quantize(place, "-t", 4, "--device", "g3"))], place.cwd, capsys)
    assert run_words(["gaudi-calib", *map(str, serve(place, "-t", 4))], place.cwd, capsys).code == 0


# Warnings and notes that advise a command: how to provoke one, and what says that it was followed.
def moved_run(command: str) -> Callable[[Place], list[object]]:
    def provoke(place: Place) -> list[object]:
        place.out = place.out.rename(place.out.with_name("moved here"))
        return {
            "serve": serve(place, "-t", 2),
            "quantize": quantize(place, "-t", 2, "--device", "g3"),
            "unify": ["unify", place.g3, "-r", 1, "--from-world", 2],
            "reshard": ["reshard", place.root, "-t", 4],
            "merge": ["merge", place.g3, place.other / "model/g3", "-o", place.cwd / "both/model/g3"],
        }[command]

    return provoke


def scales_of_two_methods(place: Place) -> list[object]:
    """Ranks get slices of experts in place of whole ones; scales of the method that is not served are stale then."""
    place.out = place.out.with_name("experts")
    shutil.copytree(place.data.parent / "experts", place.out)
    assert main(["relocate", str(place.root)]) == 0
    words = ["quantize", "-m", EXPERTS, "-o", place.out, "-t", 2, "--device", "g2", "--scale-method"]
    assert main([*map(str, words), "maxabs_pow2"]) == 0
    return [*words, "maxabs_hw", "--no-expert-parallel"]


def merged_ranges(place: Place) -> list[object]:
    return ["merge", place.g3, place.other / "model/g3", "-o", "both/model/g3"]


def scales_that_need_weights(place: Place) -> list[object]:
    method = "maxabs_pow2_opt_weight"
    assert main([*map(str, quantize(place, "-t", 2, "--device", "g3", "--scale-method", method))]) == 0
    return ["unify", place.g3, "-r", 1, "-o", "one/model/g3", "--from-world", 2]


NOTES = [
    *(
        pytest.param(moved_run(command), id=f"moved-{command}")
        for command in ("serve", "quantize", "unify", "reshard", "merge")
    ),
    *(scales_of_two_methods, merged_ranges, scales_that_need_weights),
]


@pytest.mark.parametrize("provoke", NOTES)
def test_what_a_warning_advises_works(
    provoke: Callable[[Place], list[object]], place: Place, capsys: pytest.CaptureFixture
) -> None:
    """Each command that a warning or a note advises runs, and the warning does not come again."""
    words = ["gaudi-calib", *map(str, provoke(place))]
    told = run_words(words, place.cwd, capsys)
    assert told.code == 0, told.err
    advised = [line for line in find_advised(told.err) if line != "gaudi-calib relocate DIR"]
    assert advised, told.err
    for line in dict.fromkeys(advised):
        follow(line, place.cwd, capsys)
    again = run_words(words, place.cwd, capsys)
    assert again.code == 0 and "has moved" not in again.err and "is stale" not in again.err


def test_whole_experts_of_a_dense_model_serve(place: Place, capsys: pytest.CaptureFixture) -> None:
    """-u has no effect, and no fix is needed."""
    told = run_words(["gaudi-calib", *map(str, serve(place, "-t", 2, "-u"))], place.cwd, capsys)
    assert told.code == 0 and "no effect" in told.err and not find_advised(told.err)


@pytest.fixture
def experts(made: Path, tmp_path: Path) -> Path:
    """Files as the reference leaves them: ranks with whole experts, and nothing that says so."""
    directory = tmp_path / "out" / "model" / "g2"
    directory.mkdir(parents=True)
    for path in (made / "experts/model/g2").glob(f"{RANGES}_[01]_2*"):
        shutil.copy(path, directory)
    return directory


def test_whole_experts_of_the_reference_are_found_or_named(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`quantize` finds how experts are shared; told otherwise it names -u, which then works."""
    words = ["quantize", "-m", EXPERTS, "-o", tmp_path / "out", "-t", 2, "--device", "g2"]
    told = run_words(["gaudi-calib", *map(str, words), "--no-expert-parallel"], tmp_path, capsys)
    assert told.code == 1 and "give -u" in told.err
    settle(["gaudi-calib", *map(str, words), "--no-expert-parallel"], tmp_path, capsys)
    config = experts.parent / "maxabs_quant_g2.json"
    serving = ["gaudi-calib", "serve", "-m", EXPERTS, "--quant-config", config, "--print", "--device", "g2", "-t", 2]
    assert "--enable-expert-parallel" in run_words([*map(str, serving)], tmp_path, capsys).out


def test_one_rank_of_the_reference_shares_no_experts(tmp_path: Path) -> None:
    """It is not asked how it shares them: all are its own."""
    shutil.copytree(EXPERTS.parent / "tp1" / "g2", tmp_path / "out/model/g2")
    assert main(["quantize", "-m", str(EXPERTS), "-o", str(tmp_path / "out"), "-t", "1", "--device", "g2"]) == 0


STEP_4 = [sys.executable, str(ROOT / "scripts/step-4-quantize-scales.py"), "-m", str(EXPERTS), "--device", "g2"]


def write_step_config(made: Path, directory: Path) -> dict[str, str]:
    """Return the environment in which a step reads `directory`, with what the family blocks."""
    content = json.loads((made / "experts/model/maxabs_quant_g2.json").read_text())
    path = directory.parent / "step 4.json"
    path.write_text(json.dumps(content | {"dump_stats_path": str(directory / "inc_output")}))
    return {"QUANT_CONFIG": str(path)}


@pytest.mark.parametrize("layout", ["run", "any"])
def test_step_4_takes_whole_experts(
    layout: str, made: Path, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The step finds how experts are shared, and -u, which its error names, is a flag that it takes."""
    directory = experts if layout == "run" else experts.rename(tmp_path / "measured")
    env = write_step_config(made, directory)
    words = [*STEP_4, "--tensor-parallel-size", "2", "--no-expert-parallel"]
    assert "give -u" in run_words(words, tmp_path, capsys, **env).err
    settle(words, tmp_path, capsys, env=env)
    assert len(list(directory.glob(f"{SCALES}_[01]_2.npz"))) == 2


def test_step_4_advises_on_the_directory_that_it_reads(
    made: Path, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Not on the one it works in, which is gone when the fix is read."""
    directory = experts.rename(tmp_path / "measured")
    env = write_step_config(made, directory)
    settle([*STEP_4, "--tensor-parallel-size", "1"], tmp_path, capsys, env=env)
    assert (directory / f"{SCALES}_0_1.npz").is_file()
    path = Path(env["QUANT_CONFIG"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blocklist": {"types": [], "names": []}}))
    told = run_words([*STEP_4, "--tensor-parallel-size", "1"], tmp_path, capsys, **env)
    assert told.code == 1 and f"block them in {path};" in told.err and ".step-" not in told.err


@pytest.mark.parametrize("step", ["2-measure-scales", "4-quantize-scales"])
def test_the_steps_say_what_prints_a_quant_config(step: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command in the fix prints configs of that model."""
    words = [sys.executable, str(ROOT / f"scripts/step-{step}.py"), "-m", str(MODEL), "--device", "g3"]
    told = run_words([*words, *(["-d", "builtin"] if step.startswith("2") else [])], tmp_path, capsys)
    (advised,) = find_advised(told.err)
    printed = run_words(shlex.split(advised), tmp_path, capsys)
    assert printed.code == 0 and '"mode": "QUANTIZE"' in printed.out


def test_a_config_with_many_errors_names_what_lists_them(place: Place, capsys: pytest.CaptureFixture) -> None:
    """`config validate` runs on that file, and lists what the error left out."""
    path = place.cwd / "my config.json"
    path.write_text(json.dumps({"mode": "QUANTIZE", "use_qdq": "maybe", "blocklst": {}}))
    told = run_words(["gaudi-calib", *map(str, quantize(place, "--config-quant", path))], place.cwd, capsys)
    (advised,) = find_advised(told.err)
    listed = run_words(shlex.split(advised), place.cwd, capsys)
    assert listed.code == 1 and "blocklst" in listed.out and "use_qdq" in listed.out


# Commands that the code spells out, and why; every other one is put together, by `gaudi_calib.advice`, of real values.
SPELLED_OUT = {
    "gaudi-calib relocate DIR": "where the run will be moved to is not known yet",
    "gaudi-calib -v COMMAND ...": "of an unexpected error: whatever was run",
    "gaudi-calib --help": "complete",
    "gaudi-calib config presets": "complete",
    "gaudi-calib detect": "complete",
}


def list_strings(path: Path) -> list[str]:
    """Return the strings of a source file but for docstrings and epilogs; the program's name stands for PROGRAM."""
    tree = ast.parse(path.read_text())
    hidden = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    hidden |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "epilog"}
    hidden |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in (node for node in ast.walk(tree) if id(node) not in hidden):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else ast.unparse(part.value) for part in node.values)
            found.append("".join("gaudi-calib" if part == "PROGRAM" else str(part) for part in parts))
    return found


def test_commands_are_put_together_of_real_values() -> None:
    """Advice names real paths: only the commands of `SPELLED_OUT`, each with its reason there, stand in the code."""
    found: set[str] = set()
    for path in sorted([*ROOT.glob("gaudi_calib/**/*.py"), *ROOT.glob("scripts/*.py")]):
        for text in list_strings(path):
            found |= set(
                re.findall(r"(?<=`)gaudi-calib [^`]*|\bgaudi-calib (?!writes|computes|that)[a-z][^`\n]*", text)
            )
    assert found == set(SPELLED_OUT)
