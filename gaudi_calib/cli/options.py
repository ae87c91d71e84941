"""Options that several commands have: each is spelled here and nowhere else.

A bundle of them is a decorator (`measuring_options`); the comment above it says what the command receives.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.sections import option
from gaudi_calib.data import DEFAULT_SEED

Function = Callable[..., Any]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)

json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def count_option(*names: str, least: int = 1, **settings: Any) -> Function:
    """Add an option that takes a whole number of at least `least`."""
    return option(*names, type=click.IntRange(min=least), metavar="N", **settings)


def choice_option(name: str, choices: Sequence[str], text: str, **settings: Any) -> Function:
    """Add an option that takes one of `choices`, the first where it is not given."""
    return option(name, type=click.Choice(choices), default=choices[0], help=text, **settings)


def model_option(text: str = "Model directory, or Hugging Face name (ORG/NAME).", **settings: Any) -> Function:
    """Add -m/--model, required; the command receives `model` (str)."""
    return option("-m", "--model", required=True, help=text, **settings)


def output_option(text: str, *, is_file: bool = False, **settings: Any) -> Function:
    """Add -o/--output; the command receives `out` (Path, None where it is neither required nor given)."""
    kind = click.Path(file_okay=is_file, dir_okay=not is_file, path_type=Path)
    return option("-o", "--output", "out", type=kind, help=text, **settings)


def world_option(text: str = "Ranks that will serve.", *, required: bool = False, **settings: Any) -> Function:
    """Add -t/--tensor-parallel-size; the command receives `world` (int), 1 where it is neither required nor given."""
    settings |= {"required": True} if required else {"default": 1}
    return count_option("-t", "--tensor-parallel-size", "world", help=text, **settings)


def experts_option(*, found: str, **settings: Any) -> Function:
    """Add -u/--expert-parallel and its negative; the command receives `expert_parallel` (None, which means `found`)."""
    text = f"Ranks hold whole experts, or a slice of each.  [{found}]"
    return option(
        "-u", "--expert-parallel/--no-expert-parallel", "expert_parallel", default=None, help=text, **settings
    )


def device_option(text: str, *, takes_all: bool = False, **settings: Any) -> Function:
    """Add --device; the command receives `device`: `g2`, `g3` or None, with `takes_all` `all` in place of None."""
    choices = click.Choice(["g2", "g3"] + ["all"] * takes_all)
    return option("--device", type=choices, default="all" if takes_all else None, help=text, **settings)


def vllm_option(*, found: str, **settings: Any) -> Function:
    """Add --vllm; the command receives `vllm` (str, or None, which means `found`)."""
    text = f"vLLM that will serve; before 0.24 experts have other names.  [{found}]"
    return option("--vllm", metavar="VERSION", help=text, **settings)


def _bundle(*options: Function) -> Function:
    """Return a decorator that adds `options` in this order."""

    def add(function: Function) -> Function:
        for decorate in reversed(options):
            function = decorate(function)
        return function

    return add


def _parse_columns(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return `{name: field}` of repeated `--column NAME=FIELD`."""
    columns = {}
    for value in values:
        name, separator, field = value.partition("=")
        if not (name and separator and field):
            raise click.BadParameter(f"{value!r} is not NAME=FIELD, for example prompt=instruction")
        columns[name] = field
    return columns


_run: dict[str, Any] = {"section": "Model and output"}
_target: dict[str, Any] = {"section": "What will serve"}
# Which run is meant: model, out, world, unified_world, expert_parallel, device, dtype, vllm, as_json.
target_options = _bundle(
    model_option(**_run),
    output_option("Root of the runs; files go to OUT/<model>/.", required=True, **_run),
    world_option(**_target),
    count_option(
        "-r", "--rank", "unified_world", help="Also write the files for this many ranks; must divide -t.", **_target
    ),
    experts_option(found="as measured; as the family is served", **_target),
    device_option("Device that will serve: Gaudi 2, Gaudi 3, or files for both.", takes_all=True, **_target),
    choice_option(
        "--dtype",
        ["bfloat16", "float16", "float32"],
        "What the model is served in; weights are rounded to it first.",
        **_target,
    ),
    vllm_option(found="a current one", **_target),
    json_option,
)

_dataset: dict[str, Any] = {"section": "Dataset"}
# Arguments of `data.prompts.prepare_prompts`: dataset, limit, seed, min_tokens, max_tokens, columns (dict),
# chat_template (Path or None), trust_remote_code.
dataset_options = _bundle(
    option(
        "-d",
        "--dataset",
        required=True,
        help="Dataset: a .pkl, .jsonl, .json, .parquet, .csv or .txt file (also .gz, .xz, .bz2), a dataset directory, "
        "a Hugging Face dataset (ORG/NAME or ORG/NAME:CONFIG), or 'builtin'.",
        **_dataset,
    ),
    count_option("-l", "--limit", help="Number of prompts, sampled with --seed.  [all]", **_dataset),
    option("--seed", type=int, metavar="N", default=DEFAULT_SEED, help="Seed of the sample of -l.", **_dataset),
    count_option("--min-tokens", help="Leave out prompts with fewer tokens.", **_dataset),
    count_option("--max-tokens", help="Cut prompts to this many tokens.", **_dataset),
    option(
        "--column",
        "columns",
        multiple=True,
        metavar="NAME=FIELD",
        callback=_parse_columns,
        help="Take column NAME (prompt_token_ids, messages, question, system_prompt, prompt, text, input) from the "
        "dataset's FIELD; repeatable.",
        **_dataset,
    ),
    option("--chat-template", type=_FILE, help="Jinja file used in place of the model's chat template.", **_dataset),
    option(
        "--trust-remote-code", is_flag=True, help="Let the tokenizer run code from the model's directory.", **_dataset
    ),
)

_measuring: dict[str, Any] = {"section": "Measuring"}
_engine: dict[str, Any] = {"section": "vLLM engine"}
# How ranges are measured, and how the `vllm` engine runs; `pipeline.make_run_options` takes them.
measuring_options = _bundle(
    choice_option(
        "--engine",
        ["auto", "torch", "vllm"],
        "What measures: torch (CPU, no vLLM needed), or vLLM with real ranks; auto takes vllm on a Gaudi.",
        **_measuring,
    ),
    count_option("-b", "--batch-size", default=32, help="Prompts that run together, at most.", **_measuring),
    choice_option(
        "--compute-dtype",
        ["float32", "bfloat16"],
        "Arithmetic of the measurement; bfloat16 rounds as a device does, and is slow on most CPUs.",
        **_measuring,
    ),
    choice_option(
        "--cold-experts",
        ["fill", "ignore", "error"],
        "What to do with experts that see too few tokens: send them tokens of their layer, leave them, or fail.",
        **_measuring,
    ),
    count_option(
        "--min-expert-tokens", least=0, default=16, help="Tokens below which an expert is cold.", **_measuring
    ),
    option(
        "--config-measure",
        "measure_config",
        type=_FILE,
        help="MEASURE config in place of the family's preset.",
        **_measuring,
    ),
    option("-e", "--enforce-eager", is_flag=True, help="Eager execution, as everywhere but on a Gaudi.", **_engine),
    count_option(
        "--max-new-tokens",
        default=16,
        help="Tokens generated per prompt, so that decoding is measured, too.",
        **_engine,
    ),
    count_option("--max-model-len", help="Tokens of a sequence, at most.  [what the prompts need]", **_engine),
    option(
        "--gpu-memory-utilization",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="PART",
        help="Part of the device's memory it may take.  [as the family is served; vLLM's]",
        **_engine,
    ),
    option(
        "--executor",
        type=click.Choice(["mp", "ray"]),
        help="Ranks on this node, or in a running Ray cluster.  [ray beyond 8 cards]",
        **_engine,
    ),
    option(
        "--engine-arg",
        "engine_args",
        multiple=True,
        metavar="NAME=VALUE",
        help="Further engine argument, e.g. block_size=128; repeatable.",
        **_engine,
    ),
    option("--env", multiple=True, metavar="NAME=VALUE", help="Further environment variable; repeatable.", **_engine),
)

_scales: dict[str, Any] = {"section": "Scales"}
# How scales are computed: scale_method, quant_config.
quantizing_options = _bundle(
    option("--scale-method", help="Scale method, e.g. maxabs_hw, maxabs_pow2, unit_scale.  [maxabs_hw]", **_scales),
    option(
        "--config-quant",
        "quant_config",
        type=_FILE,
        help="QUANTIZE config in place of the family's preset; its dump_stats_path is replaced.",
        **_scales,
    ),
)

# The fields of `runs.unify.Conversion`: expert_parallel, model, skips_scales, device.
conversion_options = _bundle(
    experts_option(found="found out"),
    option("--model", type=_DIRECTORY, help="Model directory: its config.json tells the number of experts."),
    option("-s", "--skip-scales", "skips_scales", is_flag=True, help="Ranges only."),
    device_option("Device of the scales.  [from the manifest or the directory's name]"),
)


def directory_options(function: Function) -> Function:
    """Add DIR, -m/--measurements in its place, and -o; the command receives `directory` and `out` (DIR without -o)."""

    @click.argument("directory", required=False, type=_DIRECTORY, metavar="DIR")
    @option("-m", "--measurements", type=_DIRECTORY, metavar="DIR", help="DIR, as the reference's step spells it.")
    @output_option("Where the results go.  [in place]")
    @wraps(function)
    def with_directory(directory: Path | None, measurements: Path | None, out: Path | None, **arguments: Any) -> Any:
        if directory and measurements:
            raise click.UsageError(f"-m means DIR, and DIR is given as well ({directory}): leave one of them out.")
        given = directory or measurements
        if given is None:
            raise click.UsageError("DIR is missing: name the directory of the ranges (OUT/<model>/<device>).")
        return function(directory=given, out=out or given, **arguments)

    return with_directory
