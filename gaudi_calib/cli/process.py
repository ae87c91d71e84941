"""The program as a process: how it ends when it is told to, and that its text is UTF-8 whatever the locale."""

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Ended(BaseException):
    """A signal asks this process to end; as KeyboardInterrupt, it is for nobody but `finally` and the program."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def orderly_ends() -> Iterator[None]:
    """Raise `Ended` when SIGTERM or SIGHUP comes, unless it is ignored (nohup), so that manifests and children end.

    What comes later is ignored: tidying up ends soon.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def use_utf8() -> None:
    """Start the program again in Python's UTF-8 mode where the locale is another: paths in configs are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def print_utf8() -> None:
    """Print UTF-8 whatever the locale, and names that are not as the bytes they are on disk."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=_UNENCODABLE)


def _encode_rest(error: UnicodeError) -> tuple[str | bytes, int]:
    """Turn what a file name has beside UTF-8 into its bytes again, and any other half character into an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


_UNENCODABLE = "gaudi_calib.unencodable"
codecs.register_error(_UNENCODABLE, _encode_rest)
