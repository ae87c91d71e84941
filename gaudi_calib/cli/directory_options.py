"""Options of the commands that turn one directory of ranges into another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_MEASUREMENTS = click.option(
    "-m",
    "--measurements",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of the ranges (OUT/<model>/<device>).",
)
_OUT = click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Where the results go.  [in place]"
)


def directory_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add -m/--measurements and -o/--out; the command receives `measurements` and `out` (Path or None)."""
    return _MEASUREMENTS(_OUT(function))
