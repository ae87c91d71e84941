"""`gaudi-calib prepare`: dataset to prompts file."""

import json
from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.dataset_options import dataset_options


@click.command(epilog="Example: gaudi-calib prepare -m ./llama -d builtin -l 256 --max-tokens 1024 -o prompts.jsonl")
@click.option("-m", "--model", required=True, help="Model directory or Hugging Face name; its tokenizer is used.")
@dataset_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Prompts file to write (.jsonl).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def prepare(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Turn a dataset into a prompts file: one JSON line of token ids per prompt.

    Conversations go through the model's chat template once, straight to token ids. The
    file is itself a dataset for -d of any command, and needs no tokenizer then.
    """
    from gaudi_calib.data.prompts import prepare_prompts, write_prompts

    prompts = prepare_prompts(model, **options)
    write_prompts(output, prompts)
    summary = {"file": str(output), **prompts.summary()}
    click.echo(json.dumps(summary, indent=2) if as_json else _describe(summary))


def _describe(summary: dict[str, Any]) -> str:
    """Return the summary of prepared prompts as lines for people."""
    renderings = ", ".join(f"{count} {how}" for how, count in summary["renderings"].items())
    lines = [
        f"{summary['prompts']} prompts of {summary['dataset']} ({summary['rows']} rows), {summary['tokens']} tokens, "
        f"{summary['shortest']} to {summary['longest']} each",
        f"  rendered:  {renderings}",
        f"  too short: {summary['too_short']}",
        f"  truncated: {summary['truncated']}",
        f"  hash:      {summary['sha256']}",
        f"  file:      {summary['file']}",
    ]
    return "\n".join(lines)
