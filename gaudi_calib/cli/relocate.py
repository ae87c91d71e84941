"""`gaudi-calib relocate`."""

import logging
from pathlib import Path

import click

from gaudi_calib.cli.options import DIRECTORY
from gaudi_calib.cli.pipeline import print_paths
from gaudi_calib.cli.sections import command

_log = logging.getLogger(__name__)


@command(epilog="Example: gaudi-calib relocate /mnt/models/llama")
@click.argument("directory", type=DIRECTORY, metavar="DIR")
def relocate(directory: Path) -> None:
    """Have the configs of a run that was moved or copied name the place where it is now.

    DIR is the run (OUT/<model>). INC needs an absolute dump_stats_path in a QUANT_CONFIG, so
    that a moved run goes on naming its old place. Prints the files that were changed.
    """
    from gaudi_calib.runs.relocate import relocate_run

    changed = relocate_run(directory)
    if not changed:
        _log.info("Nothing to change: the configs name the place where the run is")
    print_paths(changed)
