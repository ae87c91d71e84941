"""`gaudi-calib reshard`."""

from pathlib import Path

import click


@click.command(epilog="Example: gaudi-calib reshard -m out/llama -w 8")
@click.option(
    "-m",
    "--measurements",
    "run",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Run directory (OUT/<model>), which holds channel_ranges.safetensors.",
)
@click.option("-w", "--world-size", "world", required=True, type=click.IntRange(min=1), help="Ranks that will serve.")
@click.option(
    "-u",
    "--expert-parallel/--no-expert-parallel",
    "expert_parallel",
    default=None,
    help="Ranks hold whole experts, or a slice of each.  [as the run was made]",
)
@click.option(
    "--device",
    type=click.Choice(["g2", "g3", "all"]),
    default="all",
    show_default=True,
    help="Device that will serve: one, or all the run has.",
)
@click.option(
    "--vllm", metavar="VERSION", help="vLLM that will serve; before 0.24 experts have other names.  [as the run]"
)
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Run directory of the results.  [in place]"
)  # fmt: skip
def reshard(
    run: Path, world: int, expert_parallel: bool | None, device: str, vllm: str | None, out: Path | None
) -> None:
    """Derive the ranges of every rank of another topology from one measurement, exactly.

    Needs neither the model nor the data. `quantize -t` computes the scales.
    """
    from gaudi_calib.runs.reshard import reshard_dir

    devices = None if device == "all" else [device]
    for path in reshard_dir(run, world, expert_parallel=expert_parallel, devices=devices, out=out, vllm=vllm):
        click.echo(path)
