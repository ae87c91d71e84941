"""`gaudi-calib calibrate`."""

from typing import Any

import click

from gaudi_calib.cli.dataset_options import dataset_options
from gaudi_calib.cli.run_options import make_run_options, measuring_options, print_result, quantizing_options


@click.command(epilog="Example: gaudi-calib calibrate -m ./llama -d builtin -o ./out -t 8 -r 1")
@measuring_options
@dataset_options
@quantizing_options
@click.option("--dry-run", is_flag=True, help="Print the files that would be written, and touch nothing.")
def calibrate(as_json: bool, dry_run: bool, **arguments: Any) -> None:
    """Calibrate a model: ranges, scales and the QUANT_CONFIG that serves it.

    One measurement gives the files of both devices and of every tensor-parallel size
    asked for (-t, -r); `quantize -t` adds others later.
    """
    from gaudi_calib.runs import calibrate as pipeline

    options = make_run_options(arguments)
    if dry_run:
        for path in pipeline.list_files(options):
            click.echo(path)
        return
    print_result(pipeline.calibrate(options), options, as_json=as_json)
