"""`gaudi-calib merge`."""

from pathlib import Path

import click


@click.command(epilog="Example: gaudi-calib merge monday/llama/g3 tuesday/llama/g3 -o both/llama/g3")
@click.argument(
    "directories",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR...",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the results go; may be one of DIR.",
)
def merge(directories: tuple[Path, ...], out: Path) -> None:
    """Merge the ranges of several runs of one model.

    Each DIR is the directory of a device (OUT/<model>/g3), or a whole run (OUT/<model>).
    Runs on different data give the maximum of each range; the ranks of one world size may
    come from different machines. Scales are not merged, `quantize` computes them anew.
    """
    from gaudi_calib.runs.merge import merge_dirs

    for path in merge_dirs(directories, out):
        click.echo(path)
