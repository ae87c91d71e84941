"""Which accelerator this machine has. Imports neither torch nor Habana's package until one may be there."""

import importlib
import os
from dataclasses import dataclass
from importlib.util import find_spec

from gaudi_calib.errors import CalibrationError
from gaudi_calib.fp8 import DEVICES, Device

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


def require_gaudi(platform: Platform) -> Device:
    """Return the Gaudi of `platform`.

    Raises:
        CalibrationError: there is none.
    """
    if platform.device is None:
        raise CalibrationError(
            "no Gaudi on this machine",
            why=f"habana_frameworks finds none; running on {platform.name}",
            fix="run on a Gaudi node, or name the serving device with --device g2 or --device g3",
        )
    return platform.device


def _read_gaudi_name() -> str | None:
    """Return the device name that Habana's package reports, None without package or device."""
    if find_spec("habana_frameworks") is None:
        return None
    try:
        hpu = importlib.import_module("habana_frameworks.torch.hpu")
        return str(hpu.get_device_name()) if hpu.is_available() else None
    except Exception as error:  # driver and library mismatches raise many unrelated types
        raise CalibrationError(
            "habana_frameworks is installed but does not work",
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
