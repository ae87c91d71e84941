"""`gaudi-calib quantize`."""

from typing import Any

from gaudi_calib.cli.options import quantizing_options, target_options
from gaudi_calib.cli.pipeline import make_run_options, print_result
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib quantize -m ./llama -o ./out -t 4 --scale-method maxabs_pow2")
@target_options
@quantizing_options
def quantize(as_json: bool, **arguments: Any) -> None:
    """Compute scales from the ranges of an earlier `measure`.

    A tensor-parallel size that was not measured is derived from the per-channel ranges.
    """
    from gaudi_calib.runs import calibrate as run

    options = make_run_options(arguments)
    print_result(run.quantize(options), options, as_json=as_json)
