"""`gaudi-calib` in a process of its own, as a user starts it."""

import os
import resource
import signal
import subprocess
import sys
from typing import Any

from tests.support import paths

COMMAND = (sys.executable, "-m", "gaudi_calib")


def run_cli(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        options: of `subprocess.run`.
    """
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False, **options)


def start_cli(*words: object, **options: Any) -> subprocess.Popen:
    """Start a command that hears SIGINT, as in a terminal.

    In the background of a shell (`nohup make test &`) SIGINT is ignored, and children inherit that.

    Args:
        options: of `subprocess.Popen`.
    """
    return subprocess.Popen([*COMMAND, *map(str, words)], preexec_fn=_hear_sigint, **options)


def _hear_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_limited(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python `code` with arguments in 2 GiB of memory and 30 s of a processor."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=paths.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=_limit,
    )


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
