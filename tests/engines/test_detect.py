"""`detect`: a Gaudi is named, a broken installation is told, anything else is cpu or cuda."""

import json

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.engines import detect
from gaudi_calib.errors import CalibrationError
from gaudi_calib.fp8 import GAUDI2, GAUDI3


@pytest.fixture
def habana(tmp_path, monkeypatch):
    """Return a function that puts a `habana_frameworks` package with this `torch/hpu.py` on the path."""
    import sys

    def install(source: str) -> None:
        package = tmp_path / "habana_frameworks" / "torch"
        package.mkdir(parents=True)
        for directory in (package.parent, package):
            (directory / "__init__.py").write_text("")
        (package / "hpu.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "habana_frameworks"]:
        del sys.modules[name]


@pytest.fixture
def no_gpu(monkeypatch):
    """Let the machine have no GPU, whatever it has."""
    monkeypatch.setattr(detect, "_GPU_FILES", ())


def describe(name: str, *, available: bool = True) -> str:
    return f"def is_available():\n    return {available}\n\ndef get_device_name():\n    return {name!r}\n"


@pytest.mark.parametrize(("name", "device"), [("GAUDI2", GAUDI2), ("GAUDI3", GAUDI3), ("GAUDI2D", GAUDI2)])
def test_a_gaudi_is_named(name, device, habana, capsys):
    """Platform hpu with the generation, on stdout as g2 or g3."""
    habana(describe(name))
    assert detect.detect_platform() == detect.Platform("hpu", device)
    assert main(["detect", "--require-gaudi"]) == 0
    assert capsys.readouterr().out == f"{device.name}\n"


def test_software_without_a_device_is_not_a_gaudi(habana, no_gpu):
    """Habana's package alone, on a machine without the card, means cpu."""
    habana(describe("GAUDI3", available=False))
    assert detect.detect_platform() == detect.Platform("cpu")


def test_a_first_generation_gaudi_is_refused(habana):
    """It has no FP8."""
    habana(describe("GAUDI"))
    with pytest.raises(CalibrationError, match="unsupported Gaudi 'GAUDI'"):
        detect.detect_platform()


def test_a_broken_installation_is_told(habana):
    """A package that does not load is an error, not a quiet fall-back to the CPU."""
    habana("raise ImportError('libSynapse.so: cannot open shared object file')")
    with pytest.raises(CalibrationError, match=r"installed but does not work(.|\n)*libSynapse\.so"):
        detect.detect_platform()


def test_without_a_gaudi_the_command_says_what_runs(no_gpu, capsys):
    """Plain and JSON output name the platform; --require-gaudi turns it into a failure with a remedy."""
    assert main(["detect"]) == 0
    assert capsys.readouterr().out == "cpu\n"
    assert main(["detect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"platform": "cpu", "device": None}
    assert main(["detect", "--require-gaudi"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: no Gaudi on this machine")
    assert "--device g2 or --device g3" in captured.err
