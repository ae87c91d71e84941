"""`gaudi-calib config`: show, validate, presets, schema."""

import json

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.config.methods import SCALE_METHODS
from gaudi_calib.config.model import describe_schema
from gaudi_calib.models.families import FAMILIES


@pytest.fixture
def model(tmp_path):
    """A directory with the config.json of a family that has a rule of its own."""
    directory = tmp_path / "Some-Model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "mixtral"}')
    return directory


def test_show_prints_what_a_run_would_write(model, tmp_path, capsys):
    """stdout is JSON alone: contents by absolute path, for the device asked for."""
    assert main(["config", "show", "-m", str(model), "-o", str(tmp_path / "out"), "--device", "g3"]) == 0
    shown = json.loads(capsys.readouterr().out)
    root = tmp_path / "out" / "some-model"
    assert list(shown) == [str(root / f"maxabs_{phase}_g3.json") for phase in ("measure", "quant")]
    serving = shown[str(root / "maxabs_quant_g3.json")]
    assert serving["blocklist"]["names"] == ["self_attn", "lm_head"]
    assert serving["dump_stats_path"] == str(root / "g3" / "inc_output")
    assert not (tmp_path / "out").exists()


def test_show_puts_warnings_on_stderr(capsys):
    """A per-channel method says once which variable serving needs."""
    method = "act_maxabs_hw_weights_pcs_maxabs_pow2"
    assert main(["config", "show", "--family", "llama", "--scale-method", method]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 4
    assert captured.err.count("RUNTIME_SCALE_PATCHING=0 in the environment") == 1


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ([], 2, "give either a model directory or a family"),
        (["--family", "lama"], 2, "did you mean 'llama'?"),
        (["--family", "llama", "--scale-method", "maxabs_hv"], 1, "did you mean maxabs_hw?"),
        (["-m", "no-such-directory"], 1, "no config.json"),
        (["--family", "llama", "--device", "g4"], 2, "'g4' is not one of"),
    ],
    ids=["nothing", "family", "method", "model", "device"],
)
def test_show_refuses_with_a_remedy(arguments, exit_code, message, capsys):
    """Wrong arguments print nothing on stdout."""
    assert main(["config", "show", *arguments]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_validate_lists_everything_about_every_file(tmp_path, capsys):
    """Errors and warnings of all files, each with a remedy; one error makes the exit code 1."""
    content = {"mode": "QUANTIZE", "dump_stats_path": "out/inc_output"}
    files = {
        "good": content,
        "warned": {**content, "scale_params": {"input_backoff": 0.5}},
        "bad": {**content, "blocklst": {}, "use_qdq": 1},
    }
    paths = {}
    for name, value in files.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(value))
    paths["broken"] = tmp_path / "broken.json"
    paths["broken"].write_text("{")
    paths["missing"] = tmp_path / "missing.json"

    assert main(["config", "validate", str(paths["good"]), str(paths["warned"])]) == 0
    text = capsys.readouterr().out
    assert f"{paths['good']}: ok\n" in text
    assert f"{paths['warned']}: ok, 1 warning\n" in text

    assert main(["config", "validate", *map(str, paths.values()), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(row["file"], row["severity"], row["where"]) for row in rows] == [
        (str(paths["warned"]), "warning", "scale_params"),
        (str(paths["bad"]), "error", "use_qdq"),
        (str(paths["bad"]), "error", "blocklst"),
        (str(paths["broken"]), "error", ""),
        (str(paths["missing"]), "error", ""),
    ]
    assert all(row["fix"] for row in rows)


def test_validate_checks_the_serving_device(tmp_path, capsys):
    """Gaudi 3 scales are fine on Gaudi 3 and refused on Gaudi 2."""
    path = tmp_path / "quant.json"
    path.write_text('{"mode": "QUANTIZE", "device_for_scales": "GAUDI3", "dump_stats_path": "out/inc_output"}')
    assert [main(["config", "validate", *device, str(path)]) for device in ([], ["--device", "g3"])] == [0, 0]
    assert main(["config", "validate", "--device", "g2", str(path)]) == 1
    assert "device_for_scales GAUDI3 does not work on g2" in capsys.readouterr().out


def test_presets_list_every_family_and_method(capsys):
    """The table and the JSON name all of them."""
    assert main(["config", "presets"]) == 0
    table = capsys.readouterr().out
    assert main(["config", "presets", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    families, methods = [family.name for family in FAMILIES], [name.lower() for name in SCALE_METHODS]
    assert [row["name"] for row in described["families"]] == families
    assert [row["name"] for row in described["scale_methods"]] == methods
    assert [line.split()[0] for line in table.splitlines() if line.partition(" ")[0] in families + methods] == (
        families + methods
    )


def test_schema_is_printed_as_json(capsys):
    """`config schema` prints the schema of the library call."""
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(describe_schema()))
