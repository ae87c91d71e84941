"""`gaudi-calib reshard`."""

from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.options import DIRECTORY, device_option, experts_option, output_option, vllm_option, world_option
from gaudi_calib.cli.pipeline import print_paths
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib reshard out/llama -t 8")
@click.argument("run", type=DIRECTORY)
@world_option(required=True)
@experts_option(found="as the run was made")
@device_option("Device that will serve: one, or all the run has.", takes_all=True)
@vllm_option(found="as the run")
@output_option("Run directory of the results.  [in place]")
def reshard(run: Path, world: int, device: str, **options: Any) -> None:
    """Derive the ranges of every rank of another topology from one measurement, exactly.

    RUN is a run directory (OUT/<model>), which holds channel_ranges.safetensors. Needs
    neither the model nor the data. `quantize -t` computes the scales.
    """
    from gaudi_calib.runs.reshard import reshard_dir

    print_paths(reshard_dir(run, world, devices=None if device == "all" else [device], **options))
