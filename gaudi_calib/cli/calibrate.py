"""`gaudi-calib calibrate`."""

from typing import Any

from gaudi_calib.cli.options import dataset_options, measuring_options, quantizing_options, target_options
from gaudi_calib.cli.pipeline import make_run_options, print_paths, print_result
from gaudi_calib.cli.sections import command, option


@command(epilog="Example: gaudi-calib calibrate -m ./llama -d builtin -o ./out -t 8 -r 1")
@target_options
@dataset_options
@measuring_options
@quantizing_options
@option("--dry-run", is_flag=True, help="Print the files that would be written, and touch nothing.")
def calibrate(as_json: bool, dry_run: bool, **arguments: Any) -> None:
    """Calibrate a model: ranges, scales and the QUANT_CONFIG that serves it.

    One measurement gives the files of both devices and of every tensor-parallel size
    asked for (-t, -r); `quantize -t` adds others later.
    """
    from gaudi_calib.runs import calibrate as run

    options = make_run_options(arguments)
    if dry_run:
        print_paths(run.list_files(options), as_json=as_json)
        return
    print_result(run.calibrate(options), options, as_json=as_json)
