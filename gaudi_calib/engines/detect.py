"""What runs now: a Gaudi, a GPU or the CPU. Loads neither torch nor Habana's package until one may be there."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from gaudi_calib.errors import CalibrationError
from gaudi_calib.fp8 import DEVICES, Device, get_device

_HABANA = "habana_frameworks"
# Device files of NVIDIA (native, WSL) and AMD GPUs, both `cuda` to torch.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@dataclass(frozen=True)
class Platform:
    """What runs now.

    Attributes:
        name: `hpu`, `cuda` or `cpu`.
        device: the Gaudi, or None where the platform is not `hpu`.
    """

    name: str
    device: Device | None = None


def detect_platform() -> Platform:
    """Return the accelerator of this machine: a Gaudi, else a GPU that torch can use, else the CPU.

    Raises:
        CalibrationError: Habana's software is installed but does not load, or the Gaudi is
            neither a Gaudi 2 nor a Gaudi 3.
    """
    name = _read_gaudi_name()
    if name is not None:
        return Platform("hpu", _find_device(name))
    return Platform("cuda" if _has_gpu() else "cpu")


def detect_apart() -> Platform:
    """Return what `detect_platform` says, without keeping the device.

    A Gaudi that this process has opened is busy for its children, so it is asked in a process of its own.

    Raises:
        CalibrationError: Habana's software does not work, or the Gaudi is of another generation.
    """
    if find_spec(_HABANA) is None:
        return detect_platform()
    command = [sys.executable, "-m", "gaudi_calib", "detect", "--json"]
    child = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    try:
        facts = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise CalibrationError(
            "the devices of this machine could not be detected",
            why=child.stderr.strip()[-800:] or f"`gaudi-calib detect` ended with exit code {child.returncode}",
            fix="run `gaudi-calib detect`, and check that driver and habana-torch-plugin have the same version",
        ) from None
    return Platform(facts["platform"], get_device(facts["device"]) if facts["device"] else None)


def require_gaudi(platform: Platform) -> Device:
    """Return the Gaudi of `platform`.

    Raises:
        CalibrationError: there is none.
    """
    if platform.device is None:
        raise CalibrationError(
            "no Gaudi on this machine",
            why=f"{_HABANA} finds none; running on {platform.name}",
            fix="run on a Gaudi node, or name the serving device with --device g2 or --device g3",
        )
    return platform.device


def _read_gaudi_name() -> str | None:
    """Return the device name that Habana's package reports, None without package or device."""
    if find_spec(_HABANA) is None:
        return None
    try:
        hpu = importlib.import_module(f"{_HABANA}.torch.hpu")
        return str(hpu.get_device_name()) if hpu.is_available() else None
    except Exception as error:  # driver and library mismatches raise many unrelated types
        raise CalibrationError(
            f"{_HABANA} is installed but does not work",
            why=f"{type(error).__name__}: {error}",
            fix="check that driver, firmware and habana-torch-plugin have the same version (`hl-smi`)",
        ) from error


def _find_device(name: str) -> Device:
    for device in DEVICES.values():
        if name.upper().startswith(device.inc_name):
            return device
    raise CalibrationError(
        f"unsupported Gaudi {name!r}",
        why="only Gaudi 2 and Gaudi 3 serve with FP8",
        fix="name the serving device with --device g2 or --device g3",
    )


def _has_gpu() -> bool:
    if not any(os.path.exists(path) for path in _GPU_FILES) or find_spec("torch") is None:
        return False
    return bool(importlib.import_module("torch").cuda.is_available())
