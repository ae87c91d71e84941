"""`gaudi-calib serve`."""

import logging
from typing import Any

import click

from gaudi_calib.cli.options import PathType, device_option, experts_option, model_option, world_option
from gaudi_calib.cli.sections import command, option

_log = logging.getLogger(__name__)


@command(
    epilog="Example: gaudi-calib serve -m ./llama --quant-config out/llama/maxabs_quant_g3.json -t 8 "
    "-- --max-model-len 4096"
)
@model_option()
@option(
    "--quant-config", type=PathType(),
    help="What QUANT_CONFIG will be: OUT/<model>/maxabs_quant_<device>.json. Not for AWQ, GPTQ, "
    "compressed-tensors and FP8 checkpoints that are served with their own method.",
)  # fmt: skip
@world_option("Ranks.", default=1)
@device_option("Gaudi that will serve; with --print, show the command for it.  [the one of this machine]")
@experts_option(found="as the files were made")
@option("--skip-warmup", is_flag=True, help="Start sooner on a Gaudi; the first requests are slower.")
@option(
    "--timeout", "timeout_s", type=click.IntRange(min=1), metavar="S",
    help="Seconds that vLLM waits for its start and for one step, where compiling FP8 takes long.  [vLLM's]",
)  # fmt: skip
@option("--port", type=click.IntRange(1, 65535), metavar="N", default=8000, help="Where it listens.")
@option("--print", "only_print", is_flag=True, help="Show the environment and the command, and start nothing.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_ARGS]...")
def serve(only_print: bool, **arguments: Any) -> None:
    """Serve a calibrated model with vLLM, in FP8.

    Checks the files behind the config first. On a Gaudi INC quantizes; elsewhere this
    package's vLLM plugin computes what the Gaudi would.
    """
    from gaudi_calib.engines.detect import detect_apart
    from gaudi_calib.serve.command import ServeOptions, plan_on_gaudi, plan_serve, run_serve

    options = ServeOptions(**arguments)
    command = plan_on_gaudi(options) if only_print and options.device else plan_serve(options, detect_apart())
    _log.info("%s", command.note)
    for warning in command.warnings:
        _log.warning("%s", warning)
    if only_print:
        click.echo(str(command))
        return
    run_serve(command, options.port)
