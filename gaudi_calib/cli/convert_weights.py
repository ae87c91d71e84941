"""`gaudi-calib convert-weights`."""

from pathlib import Path

import click

from gaudi_calib.cli.options import json_option, model_option, output_option
from gaudi_calib.cli.pipeline import print_paths
from gaudi_calib.cli.sections import command, option


@command(epilog="Example: gaudi-calib convert-weights -m ./model-fp8 -o ./model-fp8-g2")
@model_option()
@output_option("Directory of the converted checkpoint: new, empty, or of a call that was stopped.", required=True)
@option("--dry-run", is_flag=True, help="Print the files and their sizes, write nothing.")
@json_option
def convert_weights(model: str, out: Path, dry_run: bool, as_json: bool) -> None:
    """Rescale an FP8 checkpoint for Gaudi 2, whose FP8 ends at 240 instead of 448.

    FP8 weights are halved and their scales doubled; every other tensor and file travels
    as it is. Each file is compared with its source before it is put in place. A second
    call goes on where a stopped one was.
    """
    from gaudi_calib.checkpoints import gaudi2
    from gaudi_calib.checkpoints.writer import run_conversion
    from gaudi_calib.models.source import download_model

    plan = gaudi2.plan_gaudi2(download_model(model), out)
    click.echo(gaudi2.describe_conversion(plan, is_full=dry_run), err=as_json)
    if dry_run:
        if as_json:
            print_paths([plan.out / name for name in map(Path, [*plan.shards, *plan.copies])], as_json=True)
        return
    counts = run_conversion(plan, on_file=lambda name: click.echo(f"  done: {name}", err=True))
    click.echo(gaudi2.dump_result(plan, counts) if as_json else gaudi2.describe_result(plan, counts))
