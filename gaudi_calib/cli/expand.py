"""`gaudi-calib expand`."""

from pathlib import Path
from typing import Any

from gaudi_calib.cli.options import conversion_options, count_option, directory_options
from gaudi_calib.cli.pipeline import make_conversion, print_paths
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib expand out/llama/g3 -w 4")
@directory_options
@count_option("-w", "--world-size", "world", required=True, help="Ranks to expand to.")
@count_option("--from-world", default=1, help="World to expand.")
@conversion_options
def expand(directory: Path, out: Path, world: int, from_world: int, **conversion: Any) -> None:
    """Give the ranges of one rank to every rank of a larger world.

    For ranges that were measured on a Gaudi. They are upper bounds for each rank; where
    `measure` left channel_ranges.safetensors, `reshard` gives each rank its own. Scales,
    where there are any, are computed anew.
    """
    options = make_conversion(conversion)
    from gaudi_calib.runs.expand import expand_dir

    print_paths(expand_dir(directory, world, out, from_world=from_world, conversion=options))
