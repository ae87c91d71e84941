"""`gaudi-calib check`."""

import json
from pathlib import Path

import click

from gaudi_calib.cli.options import PathType, device_option, json_option, model_option, world_option
from gaudi_calib.cli.sections import command, option


@command(epilog="Example: gaudi-calib check out/llama")
@click.argument("path", type=PathType(exists=True), metavar="PATH")
@world_option("Ranks that will serve; their files must be there.  [all that are there]", default=None)
@device_option("Look at this device only; of directories that do not tell, the device that will serve.")
@model_option("Model directory: what its files must hold.  [the one that was measured, if it is there]", required=False)
@option("--fix", "fixes", is_flag=True, help="Mend what is safe to mend first; say what was done.")
@json_option
def check(path: Path, world: int | None, device: str | None, model: str | None, fixes: bool, as_json: bool) -> int:
    """Find every problem of a calibration, and what mends it.

    PATH is a run, a device directory, any directory of ranges that INC wrote, or a QUANT_CONFIG file.
    --fix names the place of a run that was moved, restores lost .npz files, gives the attention matmuls
    the ranges of their caches, and computes stale and missing scales anew; a second time it does nothing.

    Exits with 1 if there is an error; warnings alone exit with 0.
    """
    from gaudi_calib.check.path import Asked, check_path

    report = check_path(path, Asked(world, device, model), fixes=fixes)
    click.echo(json.dumps(report.to_rows(), indent=2) if as_json else f"{path}: {report}")
    return int(bool(report.errors))
