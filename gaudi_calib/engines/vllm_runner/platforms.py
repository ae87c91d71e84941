"""What runs now, asked without keeping the device: a Gaudi that this process has opened is busy for its children."""

import json
import subprocess
import sys
from importlib.util import find_spec

from gaudi_calib.engines.detect import Platform, detect_platform
from gaudi_calib.errors import CalibrationError
from gaudi_calib.fp8 import get_device

_HABANA = "habana_frameworks"


def detect_apart() -> Platform:
    """Return what `detect_platform` says; a Gaudi is asked in a process of its own.

    Raises:
        CalibrationError: Habana's software does not work, or the Gaudi is of another generation.
    """
    if find_spec(_HABANA) is None:
        return detect_platform()
    command = [sys.executable, "-m", "gaudi_calib", "detect", "--json"]
    child = subprocess.run(command, capture_output=True, text=True)
    try:
        facts = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise CalibrationError(
            "the devices of this machine cannot be told",
            why=child.stderr.strip()[-800:] or f"`gaudi-calib detect` ended with exit code {child.returncode}",
            fix="run `gaudi-calib detect`, and check that driver and habana-torch-plugin have the same version",
        ) from None
    return Platform(facts["platform"], get_device(facts["device"]) if facts["device"] else None)
