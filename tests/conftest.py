"""Fixtures that several test files share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a checkpoint of `tiny.CHECKPOINTS`, made once per session; do not change it."""

    @cache
    def make(checkpoint: str) -> Path:
        return make_tiny_model(checkpoint, tmp_path_factory.mktemp("tiny") / checkpoint)

    return make
