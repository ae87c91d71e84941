"""Files written by a second thread: the disk works while the next content is made."""

import queue
import threading
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
        self._queue: queue.Queue[tuple[Path, str | bytes] | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "BackgroundWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def write(self, path: Path, content: str | bytes) -> None:
        """Hand over a file; text is written as UTF-8."""
        self._raise()
        self._queue.put((path, content))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            path, content = item
            try:
                if self._error is None:
                    write_bytes(path, content.encode() if isinstance(content, str) else content)
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
