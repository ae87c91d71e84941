"""Running a phase in a process of its own, and leaving nothing behind.

The child leads a process group. Whatever is still in it when the phase is over, done, failed or
interrupted, is ended; when this process is killed, the child notices and ends itself.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from gaudi_calib.engines.vllm_runner.phases import Phase
from gaudi_calib.errors import CalibrationError
from gaudi_calib.files import read_json, write_json

_log = logging.getLogger(__name__)

_CHILD = "gaudi_calib.engines.vllm_runner.child"
_TAIL_LINES = 15
_GRACE_S = 10.0

# What went wrong first; vLLM's last lines only tell that something did. Warnings have tracebacks, too.
_CAUSE = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception): .+|\S* ?proc \S+ died unexpectedly .+")
_NO_CAUSE = re.compile(r" (?:WARNING|INFO|DEBUG) ")


class _Output:
    """What a phase prints, as far as an error repeats it.

    Attributes:
        tail: the last lines.
        cause: the first line that says what went wrong.
    """

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.cause: str | None = None

    def take(self, line: str) -> None:
        """Take in the next line."""
        self.tail.append(line)
        if self.cause is None and not _NO_CAUSE.search(line):
            found = _CAUSE.search(line)
            self.cause = found and found[0]


def run_phase(phase: Phase, log: Path) -> dict[str, Any]:
    """Run `phase` and return what its process reports (see child.py).

    Args:
        log: where its output goes, beside standard error.

    Raises:
        CalibrationError: it failed; has the last lines of the log. Nothing of it still runs.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gaudi-calib-") as scratch:
        spec, result = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        write_json(spec, _to_spec(phase), indent=None)
        code, output = _run_child([str(spec), str(result)], phase, log)
        report = read_json(result) if result.is_file() else {}
    if code != 0 or "error" in report or not report:
        raise _explain_failure(phase, log, code, output.cause or report.get("error"), output.tail)
    return report


def _to_spec(phase: Phase) -> dict[str, Any]:
    return {
        "model": phase.model,
        "args": dict(phase.settings.args),
        "prompts": [list(ids) for ids in phase.prompts],
        "max_new_tokens": list(phase.max_new_tokens),
        "batch_size": phase.batch_size,
        "saving": phase.saving,
    }


def _run_child(arguments: list[str], phase: Phase, log: Path) -> tuple[int, _Output]:
    """Return the exit code and the output."""
    output = _Output()
    child = subprocess.Popen(
        [sys.executable, "-m", _CHILD, *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **phase.settings.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        file.write(f"# {phase.name}: {phase.settings.env}\n# {dict(phase.settings.args)}\n")
        reader = threading.Thread(target=_mirror, args=(child.stdout, file, output), daemon=True)
        reader.start()
        try:
            code = child.wait()
        finally:
            end_group(child.pid)
            child.wait()
            reader.join(_GRACE_S)
    return code, output


def _mirror(source: IO[bytes], file: IO[str], output: _Output) -> None:
    for raw in source:
        line = raw.decode(errors="replace")
        with contextlib.suppress(ValueError):  # closed: a process that left the group still holds the pipe
            file.write(line)
            file.flush()
        sys.stderr.write(line)
        output.take(line.rstrip())


def end_group(group: int, grace_s: float = _GRACE_S) -> None:
    """End the processes of a group: ask first, kill those that are left after `grace_s` seconds."""
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        deadline = time.monotonic() + wait_s
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        while list_group(group):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def list_group(group: int) -> list[int]:
    """Return the running processes of a group; those that only wait to be collected do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member_of = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(member_of) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _explain_failure(phase: Phase, log: Path, code: int, cause: str | None, tail: Iterable[str]) -> CalibrationError:
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    lines = "".join(f"\n    {line}" for line in tail)
    reason = f"{cause.splitlines()[0]}; " if cause else ""
    return CalibrationError(
        f"the {phase.name} phase failed ({how})",
        where=log,
        why=f"{reason}its log ends with:{lines}",
        fix="read the log from its first error; out of memory: lower -b, --max-model-len or --gpu-memory-utilization; "
        "files of earlier runs are as they were",
    )
