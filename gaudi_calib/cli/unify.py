"""`gaudi-calib unify`."""

from pathlib import Path

import click

from gaudi_calib.cli.directory_options import directory_options


@click.command(epilog="Example: gaudi-calib unify -m out/llama/g3 -r 1")
@directory_options
@click.option("-r", "--rank", "world", required=True, type=click.IntRange(min=1), help="Ranks that remain.")
@click.option(
    "--from-world", "source_world", type=click.IntRange(min=2), help="World size to unify, if several are there."
)
def unify(measurements: Path, world: int, out: Path | None, source_world: int | None) -> None:
    """Merge the ranges of tensor-parallel ranks into fewer ranks.

    Ranges are merged; scales are not, `quantize` computes them anew.
    """
    from gaudi_calib.ranges.merge import unify_dir

    for path in unify_dir(measurements, world, out or measurements, source_world=source_world):
        click.echo(path)
