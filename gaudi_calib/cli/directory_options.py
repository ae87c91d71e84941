"""Options of the commands that turn one directory of ranges into another."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gaudi_calib.runs.conversion import Conversion

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
_CONVERSION = (
    click.option(
        "-u/ ",
        "--expert-parallel/--no-expert-parallel",
        "expert_parallel",
        default=None,
        help="Each rank holds experts of its own / a slice of every expert.  [found out]",
    ),
    click.option(
        "--model",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Model directory: its config.json tells the number of experts.",
    ),
    click.option("-s", "--skip-scales", "skips_scales", is_flag=True, help="Ranges only."),
    click.option(
        "--device",
        type=click.Choice(["g2", "g3"]),
        help="Device of the scales.  [from the manifest or the directory's name]",
    ),
)


def directory_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add -m/--measurements and -o/--out; the command receives `measurements` and `out` (Path or None)."""
    return _MEASUREMENTS(_OUT(function))


def conversion_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what unify and expand share; `make_conversion` takes it."""
    for option in reversed(_CONVERSION):
        function = option(function)
    return function


def make_conversion(options: dict[str, Any]) -> "Conversion":
    """Return the options of `conversion_options` as a value."""
    # NumPy's BLAS is not used, and its waiting threads take a tenth of a short command's time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from gaudi_calib.runs.conversion import Conversion

    return Conversion(**options)
