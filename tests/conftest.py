"""What all tests share."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

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
