"""`gaudi-calib merge`."""

from pathlib import Path

import click

from gaudi_calib.cli.options import DIRECTORY, dump_option, output_option
from gaudi_calib.cli.pipeline import print_paths
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib merge monday/llama/g3 tuesday/llama/g3 -o both/llama/g3")
@click.argument(
    "directories",
    nargs=-1,
    required=True,
    type=DIRECTORY,
    metavar="DIR...",
)
@output_option("Where the results go; may be one of DIR.", required=True)
@dump_option
def merge(directories: tuple[Path, ...], out: Path, dump: str | None) -> None:
    """Merge the ranges of several runs of one model.

    Each DIR is the directory of a device (OUT/<model>/g3), or a whole run (OUT/<model>).
    Runs on different data give the maximum of each range; the ranks of one world size may
    come from different machines. Scales are not merged, `quantize` computes them anew.
    """
    from gaudi_calib.runs.merge import merge_dirs

    print_paths(merge_dirs(directories, out, dump=dump))
