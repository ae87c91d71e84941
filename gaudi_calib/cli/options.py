"""Options that several commands have: each is spelled here and nowhere else.

A bundle of them is a decorator (`measuring_options`); the comment above it says what the command receives.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.sections import Function, bundle, option
from gaudi_calib.data import DEFAULT_SEED
from gaudi_calib.data.rows import COLUMNS
from gaudi_calib.errors import UsageError
from gaudi_calib.files import expand_path, parse_json
from gaudi_calib.fp8 import DEVICES
from gaudi_calib.runs.options import CHOICES, RunOptions


class PathType(click.Path):
    """A path; `~` is the home also where the shell leaves it (`--output=~/out`)."""

    def __init__(self, **settings: Any):
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the `Path`, or fail where none can be called so, or what is there is of another kind."""
        if not os.fspath(value):
            self.fail("The path is empty; a variable that is not set?", param, ctx)
        try:
            path = expand_path(value)
        except UsageError as error:
            self.fail(error.what, param, ctx)
        return super().convert(path, param, ctx)


class PathOrNameType(click.types.StringParamType):
    """A path or a name of the hub; only `~` tells that it is a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, with the home in the place of `~`."""
        return os.path.expanduser(super().convert(value, param, ctx))


_FILE = PathType(exists=True, dir_okay=False)
DIRECTORY = PathType(exists=True, file_okay=False)

json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def count_option(*names: str, least: int = 1, **settings: Any) -> Function:
    """Add an option that takes a whole number of at least `least`."""
    return option(*names, type=click.IntRange(min=least), metavar="N", **settings)


def choice_option(name: str, text: str) -> Function:
    """Add the option of a field of `RunOptions` that takes one of `CHOICES`."""
    field = name.lstrip("-").replace("-", "_")
    return option(name, type=click.Choice(CHOICES[field]), default=getattr(RunOptions, field), help=text)


def pairs_option(
    *names: str, form: str, example: str, takes_empty: bool = True, parse: Callable[[str], Any] = str, **settings: Any
) -> Function:
    """Add a repeatable option that takes `form`, NAME=something; the command receives a dict of what is parsed."""

    def split(_context: click.Context, _option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
        found = {}
        for pair in pairs:
            name, sign, value = pair.partition("=")
            if not (name and sign and (value or takes_empty)):
                raise click.BadParameter(f"{pair!r} is not {form}, for example {example}")
            found[name] = parse(value)
        return found

    return option(*names, multiple=True, metavar=form, callback=split, **settings)


def _parse_value(text: str) -> Any:
    """Return the JSON value that `text` is, else the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def model_option(text: str = "Model directory, or Hugging Face name (ORG/NAME).", *, required: bool = True) -> Function:
    """Add -m/--model; the command receives `model` (str, None where it is neither required nor given)."""
    return option("-m", "--model", required=required, type=PathOrNameType(), help=text)


def output_option(text: str, *, is_file: bool = False, **settings: Any) -> Function:
    """Add -o/--output; the command receives `out` (Path, None where it is neither required nor given)."""
    kind = PathType(file_okay=is_file, dir_okay=not is_file)
    return option("-o", "--output", "out", type=kind, help=text, **settings)


def world_option(text: str = "Ranks that will serve.", **settings: Any) -> Function:
    """Add -t/--tensor-parallel-size, `required` or with a `default`; the command receives `world` (int)."""
    return count_option("-t", "--tensor-parallel-size", "world", help=text, **settings)


def experts_option(*, found: str) -> Function:
    """Add -u/--expert-parallel and its negative; the command receives `expert_parallel` (None, which means `found`)."""
    text = f"Ranks hold whole experts, or a slice of each.  [{found}]"
    return option("-u", "--expert-parallel/--no-expert-parallel", "expert_parallel", default=None, help=text)


def device_option(text: str, *, takes_all: bool = False) -> Function:
    """Add --device; the command receives `device`: `g2`, `g3` or None, with `takes_all` `all` in place of None."""
    choices = click.Choice([*DEVICES] + ["all"] * takes_all)
    return option("--device", type=choices, default="all" if takes_all else None, help=text)


def vllm_option(*, found: str) -> Function:
    """Add --vllm; the command receives `vllm` (str, or None, which means `found`)."""
    text = f"vLLM that will serve; before 0.24 experts have other names.  [{found}]"
    return option("--vllm", metavar="VERSION", help=text)


def preset_option(*, found: str) -> Function:
    """Add --preset; the command receives `preset` (str, or None, which means `found`)."""
    text = "Settings: those of vllm-gaudi's script, or those that engineers in the field found for the model."
    return choice_option("--preset", f"{text}  [{found}]")


def make_target_options(*, takes_dir: bool = False) -> Function:
    """Add the options that say which run is meant; with `takes_dir` a directory may be given in its place.

    The command receives model, out, name, world, unified_world, expert_parallel, device, dtype, vllm, preset, as_json.
    """
    return bundle(
        bundle(
            model_option(required=not takes_dir),
            output_option(
                "Root of the runs; files go to OUT/<model>/."
                + " With DIR: where the results go.  [in place]" * takes_dir,
                required=not takes_dir,
            ),
            option(
                "--name",
                metavar="NAME",
                help="The run's directory in OUT.  [last part of the model's name, lower-case]",
            ),
            section="Model and output",
        ),
        bundle(
            world_option("Ranks that will serve." + " With DIR: all it has." * takes_dir, default=RunOptions.world),
            count_option(
                "-r", "--rank", "unified_world", help="Also write the files for this many ranks; must divide -t."
            ),
            experts_option(found="as measured; as the family is served"),
            device_option("Device that will serve: Gaudi 2, Gaudi 3, or files for both.", takes_all=True),
            choice_option(
                "--dtype", "What the model is served in; weights are rounded to it first.  [as measured; bfloat16]"
            ),
            vllm_option(found="a current one"),
            preset_option(found="as measured; reference"),
            section="What will serve",
        ),
        json_option,
    )


target_options = make_target_options()

# Arguments of `data.prompts.prepare_prompts`: dataset (tuple), limit, seed, min_tokens, max_tokens, columns (dict),
# skip_bad_rows, chat_template (Path or None), trust_remote_code.
dataset_options = bundle(
    option(
        "-d",
        "--dataset",
        required=True,
        multiple=True,
        type=PathOrNameType(),
        help="Dataset: a .pkl, .jsonl, .json, .parquet, .csv or .txt file (also .gz, .xz, .bz2), a dataset directory, "
        "a Hugging Face dataset (ORG/NAME or ORG/NAME:CONFIG), or 'builtin'; repeatable, then each has the share of "
        "its rows, or with -d NAME=WEIGHT that of its weight.",
    ),
    count_option("-l", "--limit", help="Number of prompts, sampled with --seed.  [all]"),
    option("--seed", type=int, metavar="N", default=DEFAULT_SEED, help="Seed of the sample of -l."),
    count_option("--min-tokens", help="Leave out prompts with fewer tokens."),
    count_option("--max-tokens", help="Cut prompts to this many tokens."),
    pairs_option(
        "--column",
        "columns",
        form="NAME=FIELD",
        example="prompt=instruction",
        takes_empty=False,
        help=f"Take column NAME ({', '.join(COLUMNS)}) from the dataset's FIELD; repeatable.",
    ),
    count_option(
        "--skip-bad-rows",
        least=0,
        default=0,
        help="Leave out rows that cannot be used, at most this many of all datasets together.",
    ),
    option("--chat-template", type=_FILE, help="Jinja file used in place of the model's chat template."),
    option("--trust-remote-code", is_flag=True, help="Let the tokenizer run code from the model's directory."),
    section="Dataset",
)

# How ranges are measured, and how the `vllm` engine runs; `pipeline.make_run_options` takes them.
measuring_options = bundle(
    bundle(
        choice_option(
            "--engine",
            "What measures: torch (CPU, no vLLM needed), or vLLM with real ranks; auto takes vllm on a Gaudi.",
        ),
        count_option("-b", "--batch-size", default=RunOptions.batch_size, help="Prompts that run together, at most."),
        choice_option(
            "--compute-dtype",
            "Arithmetic of the measurement; bfloat16 rounds as a device does, and is slow on most CPUs.",
        ),
        choice_option(
            "--cold-experts",
            "What to do with experts that see too few tokens: send them tokens of their layer, leave them, or fail.",
        ),
        count_option(
            "--min-expert-tokens",
            least=0,
            default=RunOptions.min_expert_tokens,
            help="Tokens below which an expert is cold.",
        ),
        option("--config-measure", "measure_config", type=_FILE, help="MEASURE config in place of the preset's."),
        section="Measuring",
    ),
    bundle(
        option("-e", "--enforce-eager", is_flag=True, help="Eager execution, as everywhere but on a Gaudi."),
        count_option(
            "--max-new-tokens", default=16, help="Tokens generated per prompt, so that decoding is measured, too."
        ),
        count_option("--max-model-len", help="Tokens of a sequence, at most.  [what the prompts need]"),
        option(
            "--gpu-memory-utilization",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="PART",
            help="Part of the device's memory it may take.  [as the family is served; vLLM's]",
        ),
        option(
            "--executor",
            type=click.Choice(["mp", "ray"]),
            help="Ranks on this node, or in a running Ray cluster.  [ray beyond 8 cards]",
        ),
        pairs_option(
            "--engine-arg",
            "engine_args",
            form="NAME=VALUE",
            example="block_size=128",
            parse=_parse_value,
            help="Further engine argument, e.g. block_size=128; repeatable.",
        ),
        pairs_option(
            "--env", form="NAME=VALUE", example="LOG_LEVEL_ALL=3", help="Further environment variable; repeatable."
        ),
        section="vLLM engine",
    ),
)

# How scales are computed: scale_method, quant_config.
quantizing_options = bundle(
    option("--scale-method", help="Scale method, e.g. maxabs_hw, maxabs_pow2, unit_scale.  [that of the preset]"),
    option(
        "--config-quant",
        "quant_config",
        type=_FILE,
        help="QUANTIZE config in place of the preset's; its dump_stats_path is replaced.",
    ),
    section="Scales",
)

# Which measurement of a directory is meant: dump (None where it holds one).
dump_option = option("--dump", metavar="NAME", help="Which measurement, where DIR holds several: files NAME_hooks_...")

expert_count_option = option(
    "--model", type=DIRECTORY, help="Model directory: its config.json tells the number of experts."
)

# The fields of `runs.conversion.Conversion`, dump aside: expert_parallel, model, skips_scales, device.
conversion_options = bundle(
    experts_option(found="found out"),
    expert_count_option,
    option("-s", "--skip-scales", "skips_scales", is_flag=True, help="Ranges only."),
    device_option("Device of the scales.  [from the manifest or the directory's name]"),
)


def directory_options(function: Function) -> Function:
    """Add DIR, -m/--measurements in its place, -o and --dump.

    The command receives `directory`, `out` (DIR without -o) and `dump`.
    """

    @click.argument("directory", required=False, type=DIRECTORY, metavar="DIR")
    @option("-m", "--measurements", type=DIRECTORY, metavar="DIR", help="DIR, as the reference's step spells it.")
    @output_option("Where the results go.  [in place]")
    @dump_option
    @wraps(function)
    def with_directory(directory: Path | None, measurements: Path | None, out: Path | None, **arguments: Any) -> Any:
        if directory and measurements:
            raise click.UsageError(f"-m means DIR, and DIR is given as well ({directory}): leave one of them out.")
        given = directory or measurements
        if given is None:
            raise click.UsageError("DIR is missing: name the directory of the ranges (OUT/<model>/<device>).")
        return function(directory=given, out=out or given, **arguments)

    return with_directory
