"""`gaudi-calib measure`."""

from typing import Any

import click

from gaudi_calib.cli.dataset_options import dataset_options
from gaudi_calib.cli.run_options import make_run_options, measuring_options, print_result


@click.command(epilog="Example: gaudi-calib measure -m ./llama -d builtin -o ./out -t 8")
@measuring_options
@dataset_options
def measure(as_json: bool, **arguments: Any) -> None:
    """Measure ranges: what every tensor that will be quantized reaches on the prompts."""
    from gaudi_calib.runs import calibrate as pipeline

    options = make_run_options(arguments)
    print_result(pipeline.measure(options), options, as_json=as_json)
