"""`gaudi-calib expand`."""

from pathlib import Path

import click

from gaudi_calib.cli.directory_options import directory_options


@click.command(epilog="Example: gaudi-calib expand -m out/llama/g3 -w 4")
@directory_options
@click.option("-w", "--world-size", "world", required=True, type=click.IntRange(min=1), help="Ranks to expand to.")
def expand(measurements: Path, world: int, out: Path | None) -> None:
    """Give the ranges of one rank to every rank of a larger world.

    For ranges that were measured on a Gaudi. They are upper bounds for each rank; where
    `measure` left channel_ranges.safetensors, `quantize -t` gives each rank its own.
    """
    from gaudi_calib.ranges.merge import expand_dir

    for path in expand_dir(measurements, world, out or measurements):
        click.echo(path)
