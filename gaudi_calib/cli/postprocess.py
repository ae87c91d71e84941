"""`gaudi-calib postprocess`."""

from pathlib import Path

import click

from gaudi_calib.cli.directory_options import directory_options


@click.command(epilog="Example: gaudi-calib postprocess -m out/llama/g3")
@directory_options
def postprocess(measurements: Path, out: Path | None) -> None:
    """Give the attention matmuls the ranges of the KV caches they read.

    `measure` and `calibrate` do so already; this is for ranges measured by vLLM on a
    Gaudi. Scales computed before it are stale: run `quantize` afterwards.
    """
    from gaudi_calib.runs.postprocess import postprocess_dir

    for path in postprocess_dir(measurements, out or measurements):
        click.echo(path)
