"""`gaudi-calib prepare`: dataset to prompts file."""

import json
from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.options import dataset_options, json_option, model_option, output_option
from gaudi_calib.cli.sections import bundle, command


@command(epilog="Example: gaudi-calib prepare -m ./llama -d builtin -l 256 --max-tokens 1024 -o prompts.jsonl")
@bundle(
    model_option("Model directory or Hugging Face name; its tokenizer is used."),
    output_option("Prompts file to write (.jsonl).", is_file=True, required=True),
    section="Model and output",
)
@dataset_options
@json_option
def prepare(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Turn a dataset into a prompts file: one JSON line of token ids per prompt.

    Conversations go through the model's chat template once, straight to token ids. The
    file is itself a dataset for -d of any command, and needs no tokenizer then.
    """
    from gaudi_calib.data.prompts import prepare_prompts, write_prompts

    prompts = prepare_prompts(model, **options)
    write_prompts(out, prompts)
    summary = {"file": str(out), **prompts.summary()}
    click.echo(json.dumps(summary, indent=2) if as_json else _describe(summary))


def _describe(summary: dict[str, Any]) -> str:
    """Return the summary of prepared prompts as lines for people."""
    renderings = ", ".join(f"{count} {how}" for how, count in summary["renderings"].items())
    parts = summary.get("parts", ())
    lines = [
        f"{summary['prompts']} prompts of {summary['dataset']} ({summary['rows']} rows), {summary['tokens']} tokens, "
        f"{summary['shortest']} to {summary['longest']} each",
        *(f"  of which:  {part['prompts']} of {part['dataset']} ({part['rows']} rows)" for part in parts),
        f"  rendered:  {renderings}",
        f"  skipped:   {summary['skipped']}",
        f"  too short: {summary['too_short']}",
        f"  truncated: {summary['truncated']}",
        f"  hash:      {summary['sha256']}",
        f"  file:      {summary['file']}",
    ]
    return "\n".join(lines)
