"""`quantize DIR`: scales of any directory of ranges, a run's or one that a Gaudi wrote."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.layout import MANIFEST_NAME
from gaudi_calib.manifest import record_run
from gaudi_calib.ranges.table import tabulate_scales
from gaudi_calib.rankfiles.store import read_ranges, read_scales
from gaudi_calib.runs.quantize import Scaling, quantize_dir
from gaudi_calib.scales.compute import compute_scales
from tests.support.files import snapshot
from tests.support.fixes import find_advised
from tests.support.paths import GOLDEN
from tests.support.topologies import make_ranks, write_world

REAL = GOLDEN / "real"
ARBITRARY = "MAXABS_ARBITRARY"


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A device directory as a Gaudi leaves it: two ranks, no manifest, no config."""
    return write_world(tmp_path / "measured" / "g2", make_ranks(1, 2, experts=2))


def names(directory: Path, tag: str) -> list[str]:
    return sorted(path.name for path in directory.glob(f"*_{tag}_*"))


def test_scales_go_beside_the_ranges(measured: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing but the scales is written, their paths are printed, and no manifest is made where there was none."""
    before = snapshot(measured)
    assert main(["quantize", str(measured)]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(Path(line).name for line in printed) == names(measured, "MAXABS_HW") and len(printed) == 4
    assert snapshot(measured, skipped=names(measured, "MAXABS_HW")) == before


def test_scales_elsewhere_make_a_directory_that_inc_reads(measured: Path, tmp_path: Path):
    """Ranges, lists of modules and scales, and what was read stays as it was; the device is asked for and known."""
    before, out = snapshot(measured), tmp_path / "elsewhere"
    quantize_dir(measured, out)
    assert snapshot(measured) == before
    assert {name: content for name, content in snapshot(out).items() if "MAXABS_HW" not in name} == before
    assert CalibrationDir(out).list_missing(2, method="MAXABS_HW") == []


def test_a_missing_npz_is_written_from_the_json(measured: Path):
    """INC reads nothing else; the json is left as it is, to the byte."""
    expected = snapshot(measured)
    for path in measured.glob("*.npz"):
        path.unlink()
    text = next(measured.glob("*_0_2.json"))
    text.write_text(json.dumps({**json.loads(text.read_text()), "LocalRank": -1}))
    changed = text.read_bytes()
    quantize_dir(measured)
    assert text.read_bytes() == changed
    after = snapshot(measured, skipped=[text.name, *names(measured, "MAXABS_HW")])
    assert {name: content for name, content in after.items() if "_1_2" in name} == {
        name: content for name, content in expected.items() if "_1_2" in name
    }


def test_one_world_of_several_and_all(measured: Path):
    """-t says which; without it every world gets scales."""
    write_world(measured, make_ranks(1, 4, experts=2))
    assert quantize_dir(measured, scaling=Scaling(world=4)).ranks == {4: (0, 1, 2, 3)}
    assert len(names(measured, "MAXABS_HW")) == 8
    assert quantize_dir(measured).ranks == {2: (0, 1), 4: (0, 1, 2, 3)}


def test_a_world_that_is_not_there_names_what_makes_it(measured: Path, capsys: pytest.CaptureFixture[str]):
    """The command that is advised works as printed."""
    write_world(measured, make_ranks(1, 2, experts=2, idle=[(0,), ()]))
    assert main(["quantize", str(measured), "-t", "1"]) == 1
    (made,) = find_advised(capsys.readouterr().err)
    assert main(shlex.split(made)[1:]) == 0
    assert main(["quantize", str(measured), "-t", "1"]) == 0


def test_ranks_that_are_missing_are_told(measured: Path, caplog: pytest.LogCaptureFixture):
    """Scales are per rank: those that are there get theirs."""
    for path in measured.glob("*_1_2*"):
        path.unlink()
    assert quantize_dir(measured).ranks == {2: (0,)}
    assert "no ranges of rank 1 of 2" in caplog.text and names(measured, "MAXABS_HW") == [
        f"inc_output_hooks_maxabs_MAXABS_HW_0_2.{end}" for end in ("json", "npz")
    ]


def test_what_nothing_tells_is_asked_for(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The device; a checkpoint where scales come from weights; which of two measurements: one option each."""
    nameless = measured.rename(tmp_path / "nameless")
    assert main(["quantize", str(nameless)]) == 2 and "--device g2" in capsys.readouterr().err
    words = ["quantize", str(nameless), "--device", "g3"]
    assert main([*words, "--scale-method", "maxabs_hw_opt_weight"]) == 2
    assert "-m MODEL" in capsys.readouterr().err
    for path in list(nameless.iterdir()):
        shutil.copy(path, nameless / path.name.replace("inc_output", "inc_measure_output"))
    assert main(words) == 1
    assert "--dump inc_measure_output or --dump inc_output" in capsys.readouterr().err
    assert main([*words, "--dump", "inc"]) == 1
    assert "--dump inc_measure_output or --dump inc_output" in capsys.readouterr().err
    assert main([*words, "--dump", "inc_measure_output"]) == 0
    assert names(nameless, "MAXABS_HW")[0] == "inc_measure_output_hooks_maxabs_MAXABS_HW_0_2.json"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["DIR", "--name", "run"], "--name goes with a run"),
        (["DIR", "-r", "1"], "-r/--rank goes with a run"),
        (["DIR", "--dtype", "float16", "--vllm", "0.20"], "--dtype, --vllm goes with a run"),
        (["DIR", "--device", "all"], "--device all goes with a run"),
        (["DIR", "--scale-method", "maxabs_hww"], "did you mean maxabs_hw"),
        (["-m", "MODEL"], "Missing -o"),
        ([], "Missing -m and -o"),
        (["-m", "MODEL", "-o", "OUT", "--dump", "a"], "--dump goes with DIR"),
        (["-m", "MODEL", "-o", "OUT", "--allow-idle-experts"], "--allow-idle-experts goes with DIR"),
        (["DIR", "--scale-method", "unit_scale"], "unit_scale has no scale files"),
        (["DIR", "--device", "g3"], "--device g3 contradicts"),
    ],
)
def test_what_does_not_go_together(words: list[str], told: str, measured: Path, capsys: pytest.CaptureFixture[str]):
    """A run and a directory are two forms of the command: nothing is written, and the message names the form."""
    before = snapshot(measured.parent)
    code = main(["quantize", *(str(measured) if word == "DIR" else word for word in words)])
    assert code == (1 if "did you mean" in told else 2) and told in capsys.readouterr().err
    assert snapshot(measured.parent) == before


def test_the_config_beside_it_says_how(measured: Path, capsys: pytest.CaptureFixture[str]):
    """Method, backoffs and lists are those of the QUANT_CONFIG that INC will read, and its path is printed."""
    config = measured.parent / "maxabs_quant_g2.json"
    method = {"default": {"weight": {"scale_value_type": "MAXABS", "rounding_method": "POW2", "backoff": 0.5}}}
    method["default"]["activation"] = {**method["default"]["weight"], "backoff": 1.0}
    content = {"mode": "QUANTIZE", "scale_method": method, "blocklist": {"types": [], "names": [r"q_proj$|o_proj$"]}}
    config.write_text(json.dumps({**content, "dump_stats_path": str(measured / "inc_output")}))
    assert main(["quantize", str(measured), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quant_config"] == str(config) and told["ranks"] == {"2": [0, 1]} and told["method"] == "MAXABS_POW2"
    ranges, scales = (
        read(measured / f"inc_output_hooks_maxabs{tag}_0_2.json").nodes
        for read, tag in ((read_ranges, ""), (read_scales, "_MAXABS_POW2"))
    )
    assert [name for name in ranges if name not in scales] == [
        name for name in ranges if name.endswith(("q_proj", "o_proj"))
    ]
    name = next(name for name in scales if name.endswith("k_cache"))
    assert scales[name].inputs[0] == 2.0 ** np.ceil(np.log2(ranges[name].inputs[0][0] / 240))


def test_without_a_config_scales_are_in_what_was_measured(measured: Path):
    """A run that only measured, for a model that is served in float16, has scales that bfloat16 cannot hold."""
    with record_run(measured / MANIFEST_NAME, device="g2", dtype="float16") as record:
        record.update(files=CalibrationDir(measured).hash_files())
    quantize_dir(measured, scaling=Scaling(method="maxabs_arbitrary"))
    (ranges,), scales = CalibrationDir(measured).read_world(2)[:1], CalibrationDir(measured).find_scales(2, ARBITRARY)
    expected = compute_scales(ranges, ARBITRARY, GAUDI2, weights=lambda _: None, hp_dtype="FP16")
    assert (
        tabulate_scales(read_scales(scales[0]).nodes).numbers.tolist()
        == tabulate_scales(expected.nodes).numbers.tolist()
    )
    origins = CalibrationDir(measured).manifest.scales.values()
    assert {origin.settings["hp_dtype"] for origin in origins} == {"FP16"}


def test_another_method_than_the_config_serves_with(measured: Path, caplog: pytest.LogCaptureFixture):
    """Its lists apply all the same; that INC will not read these scales is said, and the config is left alone."""
    config = measured.parent / "maxabs_quant_g2.json"
    content = {"mode": "QUANTIZE", "scale_method": "maxabs_hw", "blocklist": {"types": [], "names": ["k_cache"]}}
    config.write_text(json.dumps({**content, "dump_stats_path": str(measured / "inc_output")}))
    before = config.read_bytes()
    quantize_dir(measured, scaling=Scaling(method="maxabs_pow2"))
    scales = read_scales(measured / "inc_output_hooks_maxabs_MAXABS_POW2_0_2.json").nodes
    assert scales and not any("k_cache" in name for name in scales)
    assert f"{config} serves with maxabs_hw" in caplog.text and config.read_bytes() == before


def test_a_config_of_ones_own(measured: Path, tmp_path: Path):
    """--config-quant in the place of the run's; a config that measures is refused."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"mode": "QUANTIZE", "scale_method": "maxabs_pow2", "dump_stats_path": "x/inc_output"}))
    words = ["quantize", str(measured), "--config-quant", str(path)]
    assert main(words) == 0 and len(names(measured, "MAXABS_POW2")) == 4
    assert main([*words, "--scale-method", "maxabs_hw"]) == 2
    path.write_text(json.dumps({"mode": "MEASURE", "dump_stats_path": "x/inc_output"}))
    assert main(words) == 1


def test_files_without_a_rank_get_one(measured: Path, caplog: pytest.LogCaptureFixture):
    """INC under vLLM looks for `_0_1`: ranges are written so, and the old files move aside with their scales."""
    source = shutil.copytree(REAL / "llama-2-7b", measured.parent / "old" / "g2")
    (source / "VERSION").unlink()
    old = snapshot(source)
    quantize_dir(source)
    assert "were moved to" in caplog.text and snapshot(source / "replaced") == old
    place = CalibrationDir(source)
    assert place.list_missing(1) == place.list_missing(1, method="MAXABS_HW") == []
    assert quantize_dir(source).ranks == {1: (0,)}


def test_a_bad_range_changes_nothing(measured: Path, capsys: pytest.CaptureFixture[str]):
    """Whichever rank has it."""
    path = measured / "inc_output_hooks_maxabs_1_2.json"
    content = json.loads(path.read_text())
    content["Nodes"][next(name for name in content["Nodes"] if name.endswith("k_cache"))]["inputs"] = [[[float("nan")]]]
    path.write_text(json.dumps(content))
    path.with_suffix(".npz").unlink()
    before = snapshot(measured)
    assert main(["quantize", str(measured)]) == 1 and "is nan" in capsys.readouterr().err
    assert snapshot(measured) == before


def test_experts_that_saw_no_token(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A method without a smallest scale is refused or, on request, writes 0 as INC does; maxabs_hw warns."""
    idle = write_world(tmp_path / "idle" / "g3", make_ranks(1, 2, experts=4, idle=[(0, 2), ()]))
    words = ["quantize", str(idle), "--scale-method", "maxabs_arbitrary"]
    assert main(words) == 1
    assert (
        "no token would get a scale of 0: 2 in 1 layer" in (error := capsys.readouterr().err)
        and "--allow-idle-experts" in error
    )
    assert main([*words, "--allow-idle-experts"]) == 0 and "saw no token: 2" in capsys.readouterr().err
    scales = read_scales(idle / "inc_output_hooks_maxabs_MAXABS_ARBITRARY_0_2.json").nodes
    assert [scale == 0 for scale in next(n for name, n in scales.items() if name.endswith("moe_op")).inputs[1:]] == [
        *(True, False, True, False)
    ]
    assert main(["unify", str(idle), "-r", "1"]) == 1 and "--skip-scales" in capsys.readouterr().err
    assert main(["unify", str(idle), "-r", "1", "--skip-scales"]) == 0
    assert main(["quantize", str(idle), "-t", "2"]) == 0 and "saw no token: 2" in capsys.readouterr().err


def test_npz_alone_is_a_measurement(measured: Path, tmp_path: Path):
    """It is all that INC reads; the json comes back with the scales."""
    expected = snapshot(measured)
    for path in measured.glob("*[0-9].json"):
        path.unlink()
    quantize_dir(measured)
    assert snapshot(measured, skipped=names(measured, "MAXABS_HW")) == expected
