"""Errors and findings that a user can act on: what happened, where, why, and how to fix it."""

from dataclasses import dataclass
from typing import Self


class CalibrationError(Exception):
    """A run failed or a file is wrong; the command line exits with 1.

    Args:
        what: one sentence, no full stop.
        where: the file, node or option concerned.
        why: the reason, when `what` does not already say it.
        fix: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, why: str | None = None, fix: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return _format(self)

    def with_fix(self, fix: str) -> Self:
        """Return the same error with another fix."""
        return type(self)(self.what, where=self.where, why=self.why, fix=fix)


class UsageError(CalibrationError, ValueError):
    """The caller asked for something impossible; the command line exits with 2."""

    exit_code = 2


class ConfigError(CalibrationError, ValueError):
    """A QUANT_CONFIG or a scale method is invalid."""


class DataError(CalibrationError, ValueError):
    """A calibration dataset cannot be read or holds nothing usable."""


class FileError(CalibrationError, ValueError):
    """A file of a run is missing, malformed or cannot be written."""


class ModelError(CalibrationError, ValueError):
    """A checkpoint is missing, incomplete or of a family nobody described yet."""


class RangeError(CalibrationError, ValueError):
    """A measured range or a scale is not a usable number."""


class IdleExpertError(RangeError):
    """An expert saw no token when it was measured, and would get a scale of 0."""


class TopologyError(CalibrationError, ValueError):
    """A tensor cannot be split or merged over the requested ranks."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a QUANT_CONFIG.

    Attributes:
        where: the attribute concerned (dotted where it is nested).
        what: what is wrong, or what INC does with it.
        why: the reason.
        fix: what to write instead.
    """

    where: str
    what: str
    why: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        return _format(self)


def _format(told: CalibrationError | Finding) -> str:
    rows = [(name, getattr(told, name)) for name in ("where", "why", "fix")]
    return "\n".join([told.what] + [f"  {name + ':':<6} {text}" for name, text in rows if text])
