"""Rows that cannot be used: an error each, and how many of them may be left out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gaudi_calib.errors import DataError

_log = logging.getLogger(__name__)


class RowError(DataError):
    """One row of a dataset cannot be used; the others may be."""


class BadRows:
    """The rows left out so far, because they cannot be used.

    Every one is looked at before the first is raised, so that the error says how many there are.
    """

    def __init__(self, allowed: int = 0):
        """Let `allowed` rows be left out, of all datasets together."""
        self._allowed = allowed
        self._errors: list[RowError] = []

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._errors)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave out the row for which the block raises RowError."""
        try:
            yield
        except RowError as error:
            self._errors.append(error)
            if self.count <= self._allowed:
                _log.warning("%s is left out: %s%s", error.where, error.what, f" ({error.why})" if error.why else "")

    def require_few(self, *, usable: bool) -> None:
        """Raise the first error where more rows cannot be used than may be left out.

        Args:
            usable: whether there are others, so that leaving these out helps.

        Raises:
            RowError: with the number of bad rows, and the option that leaves them out.
        """
        if self.count <= self._allowed:
            return
        first, number = self._errors[0], f"{self.count} rows cannot be used"
        limit = f", and --skip-bad-rows allows {self._allowed}" if self._allowed else ""
        reasons = [first.why, number + limit if self.count > 1 else None]
        advice = [first.fix, f"leave out what cannot be used with --skip-bad-rows {self.count}" if usable else None]
        raise RowError(
            first.what,
            where=first.where,
            why="; ".join(filter(None, reasons)) or None,
            fix=", or ".join(filter(None, advice)),
        ) from first
