"""Errors and findings that a user can act on: what happened, where, why, and how to fix it."""

from collections.abc import Iterable
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
    """One thing to know about a QUANT_CONFIG, or about a calibration.

    Attributes:
        where: the attribute concerned (dotted where it is nested), the file or the nodes.
        what: what is wrong, or what INC does with it.
        why: the reason.
        fix: what to write instead, or to run.
        kind: short name of what was found, which stays the same: `npz-missing`.
    """

    where: str
    what: str
    why: str | None = None
    fix: str | None = None
    kind: str = "config"

    @classmethod
    def of(cls, error: CalibrationError, kind: str) -> "Finding":
        """Return what an error tells, as a finding."""
        return cls(error.where or "", error.what, error.why, error.fix, kind)

    def __str__(self) -> str:
        return _format(self)


@dataclass(frozen=True)
class Findings:
    """Everything to say about something that was looked at.

    Attributes:
        errors: why it cannot be used.
        warnings: what is silently changed, ignored or lost.
    """

    errors: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    def to_rows(self) -> list[dict[str, str | None]]:
        """Return the findings as JSON objects, errors first."""
        levels = [("error", self.errors), ("warning", self.warnings)]
        return [{"severity": level, **vars(finding)} for level, findings in levels for finding in findings]

    def __str__(self) -> str:
        counts = [count(len(self.errors), "error") if self.errors else "ok"]
        counts += [count(len(self.warnings), "warning")] if self.warnings else []
        lines = [f"Error: {finding}" for finding in self.errors] + [f"Warning: {finding}" for finding in self.warnings]
        return "\n".join([", ".join(counts), *lines])


def count(number: int, word: str) -> str:
    """Return a number and what it counts: `1 rank`, `2 ranks`."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def _format(told: CalibrationError | Finding) -> str:
    rows = [(name, getattr(told, name)) for name in ("where", "why", "fix")]
    return "\n".join([told.what] + [f"  {name + ':':<6} {text}" for name, text in rows if text])


def name_first(names: Iterable[object], shown: int = 5, separator: str = ", ") -> str:
    """Return the first few of `names`, and how many more there are.

    >>> name_first("abc", shown=2)
    'a, b, and 1 more'
    """
    every = list(map(str, names))
    return separator.join(every[:shown]) + (f"{separator}and {len(every) - shown} more" if len(every) > shown else "")
