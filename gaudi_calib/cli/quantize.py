"""`gaudi-calib quantize`."""

from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.options import DIRECTORY, dump_option, make_target_options, quantizing_options
from gaudi_calib.cli.pipeline import make_run_options, print_quantized, print_result
from gaudi_calib.cli.sections import bundle, command, option

# What only a run has, by parameter, and what only a directory has.
_OF_RUN = {"name": "--name", "unified_world": "-r/--rank", "dtype": "--dtype", "vllm": "--vllm", "preset": "--preset"}
_OF_DIRECTORY = {"dump": "--dump", "allows_idle": "--allow-idle-experts"}


@command(
    epilog="Example: gaudi-calib quantize -m ./llama -o ./out -t 4 --scale-method maxabs_pow2; of a directory: "
    "gaudi-calib quantize measured/g3"
)
@click.argument("directory", required=False, type=DIRECTORY, metavar="[DIR]")
@make_target_options(takes_dir=True)
@quantizing_options
@bundle(
    dump_option,
    option(
        "--allow-idle-experts",
        "allows_idle",
        is_flag=True,
        help="Give experts that saw no token a scale of 0, as INC does with methods that have no smallest scale.",
    ),
    section="DIR",
)
@click.pass_context
def quantize(
    context: click.Context, directory: Path | None, as_json: bool, dump: str | None, allows_idle: bool, **arguments: Any
) -> None:
    """Compute scales from the ranges of an earlier measurement.

    With -m and -o: of a run. A tensor-parallel size that was not measured is derived from
    the per-channel ranges.

    With DIR: of any directory of ranges, in place or at -o, of every world or of -t ranks.
    No model is needed but for methods that take scales from the weights (-m).
    """
    given = {name for name in context.params if _is_given(context, name)}
    if directory is None:
        _require_run(given)
        from gaudi_calib.runs import calibrate as run

        options = make_run_options(arguments)
        print_result(run.quantize(options), options, as_json=as_json)
        return
    _require_directory(given, arguments)
    from gaudi_calib.runs.quantize import Scaling, quantize_dir

    scaling = Scaling(
        method=arguments["scale_method"],
        quant_config=arguments["quant_config"],
        device=arguments["device"] if "device" in given else None,
        world=arguments["world"] if "world" in given else None,
        model=arguments["model"],
        expert_parallel=arguments["expert_parallel"],
        dump=dump,
        allows_idle=allows_idle,
    )
    print_quantized(quantize_dir(directory, arguments["out"], scaling), as_json=as_json)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _require_run(given: set[str]) -> None:
    """Raise UsageError where no run is named, or with it what belongs to DIR."""
    missing = [flag for name, flag in (("model", "-m"), ("out", "-o")) if name not in given]
    if missing:
        raise click.UsageError(
            f"Missing {' and '.join(missing)}: name a run (-m MODEL -o OUT), or a directory of ranges (DIR)."
        )
    wrong = [flag for name, flag in _OF_DIRECTORY.items() if name in given]
    if wrong:
        raise click.UsageError(f"{', '.join(wrong)} goes with DIR, and -m with -o names a run: leave one of them out.")


def _require_directory(given: set[str], arguments: dict[str, Any]) -> None:
    """Raise UsageError where what belongs to a run is given with DIR."""
    wrong = [flag for name, flag in _OF_RUN.items() if name in given]
    if "device" in given and arguments["device"] == "all":
        wrong.append("--device all")
    if wrong:
        raise click.UsageError(
            f"{', '.join(wrong)} goes with a run, and DIR is given: name the run instead (-m MODEL -o OUT), "
            "or leave it out."
        )
