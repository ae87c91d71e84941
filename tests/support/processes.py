"""`gaudi-calib` in a process of its own, as a user starts it."""

import signal
import subprocess
import sys
from typing import Any

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
