"""`gaudi-calib measure`."""

from typing import Any

from gaudi_calib.cli.options import dataset_options, measuring_options, target_options
from gaudi_calib.cli.pipeline import make_run_options, print_result
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib measure -m ./llama -d builtin -o ./out -t 8")
@target_options
@dataset_options
@measuring_options
def measure(as_json: bool, **arguments: Any) -> None:
    """Measure ranges: what every tensor that will be quantized reaches on the prompts."""
    from gaudi_calib.runs import calibrate as run

    options = make_run_options(arguments)
    print_result(run.measure(options), options, as_json=as_json)
