"""Options of the commands that run the pipeline, and how they print its result."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions
    from gaudi_calib.runs.options import RunOptions
    from gaudi_calib.runs.run import RunResult

_DATASET_ARGUMENTS = (
    "dataset",
    "limit",
    "seed",
    "min_tokens",
    "max_tokens",
    "columns",
    "chat_template",
    "trust_remote_code",
)

_MODEL = click.option("-m", "--model", required=True, help="Model directory, or Hugging Face name (ORG/NAME).")
_OUT = click.option(
    "-o", "--output", "out", required=True, type=click.Path(path_type=Path),
    help="Root of the runs; files go to OUT/<model>/.",
)  # fmt: skip
_WORLD = click.option(
    "-t", "--tensor-parallel-size", "world", type=click.IntRange(min=1), default=1, show_default=True,
    help="Ranks that will serve.",
)  # fmt: skip
_UNIFIED = click.option(
    "-r", "--rank", "unified_world", type=click.IntRange(min=1),
    help="Also write the files for this many ranks; must divide -t.",
)  # fmt: skip
_DEVICE = click.option(
    "--device", type=click.Choice(["g2", "g3", "all"]), default="all", show_default=True,
    help="Device that will serve: Gaudi 2, Gaudi 3, or files for both.",
)  # fmt: skip
_DTYPE = click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True,
    help="What the model is served in; weights are rounded to it first.",
)  # fmt: skip
_EXPERTS = click.option(
    "-u", "--expert-parallel/--no-expert-parallel", "expert_parallel", default=None,
    help="Ranks hold whole experts, or a slice of each.  [as measured; as the family is served]",
)  # fmt: skip
_VLLM = click.option(
    "--vllm", metavar="VERSION", help="vLLM that will serve; before 0.24 experts have other names.  [a current one]"
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_MEASURING = (
    click.option(
        "-b", "--batch-size", type=click.IntRange(min=1), default=32, show_default=True,
        help="Prompts that run together, at most.",
    ),
    click.option(
        "--cold-experts", type=click.Choice(["fill", "ignore", "error"]), default="fill", show_default=True,
        help="What to do with experts that see too few tokens: send them tokens of their layer, leave them, or fail.",
    ),
    click.option(
        "--min-expert-tokens", type=click.IntRange(min=0), default=16, show_default=True,
        help="Tokens below which an expert is cold.",
    ),
    click.option(
        "--engine", type=click.Choice(["auto", "torch", "vllm"]), default="auto", show_default=True,
        help="What measures: torch (CPU, no vLLM needed), or vLLM with real ranks; auto takes vllm on a Gaudi.",
    ),
    click.option(
        "--compute-dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
        help="Arithmetic of the measurement; bfloat16 rounds as a device does, and is slow on most CPUs.",
    ),
    click.option(
        "--config-measure", "measure_config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="MEASURE config in place of the family's preset.",
    ),
)  # fmt: skip
_VLLM_ENGINE = (
    click.option("-e", "--enforce-eager", is_flag=True, help="vllm: eager execution, as everywhere but on a Gaudi."),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True,
        help="vllm: tokens generated per prompt, so that decoding is measured, too.",
    ),
    click.option(
        "--max-model-len", type=click.IntRange(min=1),
        help="vllm: tokens of a sequence, at most.  [what the prompts need]",
    ),
    click.option(
        "--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True),
        help="vllm: part of the device's memory it may take.  [as the family is served; vLLM's]",
    ),
    click.option(
        "--executor", type=click.Choice(["mp", "ray"]),
        help="vllm: ranks on this node, or in a running Ray cluster.  [ray beyond 8 cards]",
    ),
    click.option(
        "--engine-arg", "engine_args", multiple=True, metavar="NAME=VALUE",
        help="vllm: further engine argument, e.g. block_size=128; may be given several times.",
    ),
    click.option(
        "--env", multiple=True, metavar="NAME=VALUE",
        help="vllm: further environment variable of the engine; may be given several times.",
    ),
)  # fmt: skip
_ENGINE_ARGUMENTS = ("enforce_eager", "max_new_tokens", "max_model_len", "gpu_memory_utilization", "executor")
_QUANTIZING = (
    click.option("--scale-method", help="Scale method, e.g. maxabs_hw, maxabs_pow2, unit_scale.  [maxabs_hw]"),
    click.option(
        "--config-quant", "quant_config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="QUANTIZE config in place of the family's preset; its dump_stats_path is replaced.",
    ),
)  # fmt: skip


def measuring_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a command that measures."""
    return _add(
        function, (_MODEL, _OUT, _WORLD, _UNIFIED, _DEVICE, _DTYPE, _EXPERTS, _VLLM, *_MEASURING, *_VLLM_ENGINE, _JSON)
    )


def quantizing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a command that computes scales."""
    return _add(function, _QUANTIZING)


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which run is meant, for a command that does not measure."""
    return _add(function, (_MODEL, _OUT, _WORLD, _UNIFIED, _DEVICE, _DTYPE, _EXPERTS, _VLLM, _JSON))


def _add(function: Callable[..., Any], options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def make_run_options(arguments: dict[str, Any]) -> "RunOptions":
    """Turn the arguments of a command into `RunOptions`."""
    from gaudi_calib.runs.options import RunOptions

    given = dict(arguments)
    dataset = {name: given.pop(name) for name in _DATASET_ARGUMENTS if name in given}
    device = given.pop("device")
    given.pop("as_json", None)
    if "engine_args" in given:
        given["engine_options"] = _make_engine_options(given)
    return RunOptions(dataset=dataset, devices=("g2", "g3") if device == "all" else (device,), **given)


def _make_engine_options(given: dict[str, Any]) -> "EngineOptions":
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions

    args = {name.replace("-", "_"): _parse_value(text) for name, text in _split_pairs(given.pop("engine_args"))}
    env = dict(_split_pairs(given.pop("env")))
    return EngineOptions(**{name: given.pop(name) for name in _ENGINE_ARGUMENTS}, args=args, env=env)


def _split_pairs(pairs: Iterable[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (sign and name):
            raise click.UsageError(f"{pair!r} is not NAME=VALUE.")
        yield name, value


def _parse_value(text: str) -> Any:
    """Return the JSON value that `text` is, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def print_result(result: "RunResult", options: "RunOptions", *, as_json: bool) -> None:
    """Print what a run wrote, and how to serve it."""
    if as_json:
        value = {
            "root": str(result.root),
            "files": [str(path) for path in result.files],
            "quant_configs": {name: str(path) for name, path in result.quant_configs.items()},
            "worlds": list(result.worlds),
            "warnings": list(result.warnings),
        }
        click.echo(json.dumps(value, indent=2))
        return
    from gaudi_calib.serve.command import plan_on_gaudi

    click.echo(f"{len(result.files)} files in {result.root}")
    for device, path in result.quant_configs.items():
        for world in result.worlds or (options.world,):
            click.echo(f"\nOn Gaudi {device[1]}, {world} card{'s' * (world > 1)}:")
            for line in plan_on_gaudi(options.model, path, world=world, device=device).lines:
                click.echo(f"  {line}")
