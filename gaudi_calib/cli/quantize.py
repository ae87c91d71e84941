"""`gaudi-calib quantize`."""

from typing import Any

import click

from gaudi_calib.cli.run_options import make_run_options, print_result, quantizing_options, target_options


@click.command(epilog="Example: gaudi-calib quantize -m ./llama -o ./out -t 4 --scale-method maxabs_pow2")
@target_options
@quantizing_options
def quantize(as_json: bool, **arguments: Any) -> None:
    """Compute scales from the ranges of an earlier `measure`.

    A tensor-parallel size that was not measured is derived from the per-channel ranges.
    """
    from gaudi_calib.runs import calibrate as pipeline

    options = make_run_options(arguments)
    print_result(pipeline.quantize(options), options, as_json=as_json)
