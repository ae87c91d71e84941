"""Fixtures that several test files share."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a checkpoint of `tiny.CHECKPOINTS`, made once per session; do not change it."""

    from tests.support.tiny import make_tiny_model

    @cache
    def make(checkpoint: str) -> Path:
        return make_tiny_model(checkpoint, tmp_path_factory.mktemp("tiny") / checkpoint)

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: where matrices are tiny, more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
