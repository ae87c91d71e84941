"""What all tests share."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.calibrated import Calibrated

# For torch, which is not loaded yet, and for child processes: matrices are tiny, and threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a checkpoint of `tiny.CHECKPOINTS`, made once per session; do not change it."""
    from tests.support.tiny import make_tiny_model

    @cache
    def make(checkpoint: str) -> Path:
        return make_tiny_model(checkpoint, tmp_path_factory.mktemp("tiny") / checkpoint)

    return make


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> "Calibrated":
    """A calibration of a tiny model by the torch engine, made once per session; copy it to change it."""
    from tests.support.calibrated import MODEL, calibrate_by_torch

    return calibrate_by_torch(MODEL, tmp_path_factory.mktemp("out"))
