"""`gaudi-calib unify`."""

from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.directory_options import conversion_options, directory_options, make_conversion


@click.command(epilog="Example: gaudi-calib unify -m out/llama/g3 -r 1")
@directory_options
@click.option("-r", "--rank", "world", required=True, type=click.IntRange(min=1), help="Ranks that remain.")
@click.option(
    "--from-world", "from_world", type=click.IntRange(min=2), help="World size to unify, if several are there."
)
@conversion_options
def unify(measurements: Path, world: int, out: Path | None, from_world: int | None, **conversion: Any) -> None:
    """Merge the ranges of many ranks into fewer ranks.

    Ranges are merged; scales, where there are any, are computed anew from the merged ranges.
    """
    options = make_conversion(conversion)
    from gaudi_calib.runs.unify import unify_dir

    for path in unify_dir(measurements, world, out or measurements, from_world=from_world, conversion=options):
        click.echo(path)
