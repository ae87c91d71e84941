"""Files written by a second thread: the disk works while the next content is made."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from gaudi_calib.files import write_bytes

_WAITING = 2  # contents kept in memory at most


class BackgroundWriter:
    """Writes files in the order they are given; leaving the block waits for them.

    Raises (from `write` or at the end of the block):
        FileError: a file could not be written; the ones after it were not tried.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def write(self, path: Path, content: bytes) -> None:
        """Hand over a file."""
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._write, path, content))

    def _write(self, path: Path, content: bytes) -> None:
        if self._failed:
            return
        self._failed = True
        write_bytes(path, content)
        self._failed = False
