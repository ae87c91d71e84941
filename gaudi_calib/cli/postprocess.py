"""`gaudi-calib postprocess`."""

from pathlib import Path

import click


@click.command(epilog="Example: gaudi-calib postprocess -m out/llama/g3")
@click.option(
    "-m",
    "--measurements",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of the ranges (OUT/<model>/<device>).",
)
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Where the results go.  [in place]")
def postprocess(measurements: Path, out: Path | None) -> None:
    """Give the attention matmuls the ranges of the KV caches they read.

    `measure` and `calibrate` do so already; this is for ranges measured by vLLM on a
    Gaudi. Scales computed before it are stale: run `quantize` afterwards.
    """
    from gaudi_calib.ranges.kvcache import postprocess_dir

    for path in postprocess_dir(measurements, out or measurements):
        click.echo(path)
