"""`gaudi-calib expand`."""

from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.directory_options import conversion_options, directory_options, make_conversion


@click.command(epilog="Example: gaudi-calib expand -m out/llama/g3 -w 4")
@directory_options
@click.option("-w", "--world-size", "world", required=True, type=click.IntRange(min=1), help="Ranks to expand to.")
@click.option(
    "--from-world",
    "from_world",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="World size to expand.",
)
@conversion_options
def expand(measurements: Path, world: int, out: Path | None, from_world: int, **conversion: Any) -> None:
    """Give the ranges of one rank to every rank of a larger world.

    For ranges that were measured on a Gaudi. They are upper bounds for each rank; where
    `measure` left channel_ranges.safetensors, `reshard` gives each rank its own. Scales,
    where there are any, are computed anew.
    """
    options = make_conversion(conversion)
    from gaudi_calib.runs.expand import expand_dir

    for path in expand_dir(measurements, world, out or measurements, from_world=from_world, conversion=options):
        click.echo(path)
