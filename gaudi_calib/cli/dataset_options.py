"""Options of every command that reads a dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DEFAULT_SEED = 42


def parse_columns(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return `{name: field}` of repeated `--column NAME=FIELD`."""
    columns = {}
    for value in values:
        name, separator, field = value.partition("=")
        if not (name and separator and field):
            raise click.BadParameter(f"{value!r} is not NAME=FIELD, for example prompt=instruction")
        columns[name] = field
    return columns


_OPTIONS = (
    click.option(
        "-d",
        "--dataset",
        required=True,
        help="Dataset: a .pkl, .jsonl, .json, .parquet, .csv or .txt file (also .gz, .xz, .bz2), a dataset directory, "
        "a Hugging Face dataset (ORG/NAME or ORG/NAME:CONFIG), or 'builtin'.",
    ),
    click.option("-l", "--limit", type=click.IntRange(min=1), help="Number of prompts, sampled with --seed.  [all]"),
    click.option("--seed", type=int, default=DEFAULT_SEED, show_default=True, help="Seed of the sample of -l."),
    click.option("--min-tokens", type=click.IntRange(min=1), help="Leave out prompts with fewer tokens."),
    click.option("--max-tokens", type=click.IntRange(min=1), help="Cut prompts to this many tokens."),
    click.option(
        "--column",
        "columns",
        multiple=True,
        metavar="NAME=FIELD",
        callback=parse_columns,
        help="Take column NAME (prompt_token_ids, messages, question, system_prompt, prompt, text, input) from the "
        "dataset's FIELD; repeatable.",
    ),
    click.option(
        "--chat-template",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Jinja file used in place of the model's chat template.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer run code from the model's directory."),
)


def dataset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add -d, -l, --seed, --min-tokens, --max-tokens, --column, --chat-template, --trust-remote-code.

    The command receives them as the arguments of `data.prompts.prepare_prompts`: dataset, limit,
    seed, min_tokens, max_tokens, columns (dict), chat_template (Path or None), trust_remote_code.
    """
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
