"""`gaudi-calib unify`."""

from pathlib import Path
from typing import Any

from gaudi_calib.cli.options import conversion_options, count_option, directory_options
from gaudi_calib.cli.pipeline import make_conversion, print_paths
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib unify out/llama/g3 -r 1")
@directory_options
@count_option("-r", "--rank", "world", required=True, help="Ranks that remain.")
@count_option("--from-world", least=2, help="World to unify, where the directory holds several.")
@conversion_options
def unify(directory: Path, out: Path, world: int, from_world: int | None, **conversion: Any) -> None:
    """Merge the ranges of many ranks into those of fewer ranks.

    DIR holds the files of every rank. Ranges are merged; scales, where there are any, are
    computed anew from the merged ranges.
    """
    options = make_conversion(conversion)
    from gaudi_calib.runs.unify import unify_dir

    print_paths(unify_dir(directory, world, out, from_world=from_world, conversion=options))
