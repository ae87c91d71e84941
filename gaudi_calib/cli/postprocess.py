"""`gaudi-calib postprocess`."""

from pathlib import Path

from gaudi_calib.cli.options import directory_options
from gaudi_calib.cli.pipeline import print_paths
from gaudi_calib.cli.sections import command


@command(epilog="Example: gaudi-calib postprocess out/llama/g3")
@directory_options
def postprocess(directory: Path, out: Path, dump: str | None) -> None:
    """Give the attention matmuls the ranges of the KV caches they read.

    `measure` and `calibrate` do so already; this is for ranges measured by vLLM on a
    Gaudi. Scales computed before it are stale: run `quantize` afterwards.
    """
    from gaudi_calib.runs.postprocess import postprocess_dir

    print_paths(postprocess_dir(directory, out, dump=dump))
