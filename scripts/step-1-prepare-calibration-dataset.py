#!/usr/bin/env python3
"""Step 1: dataset to NAME-calibration-dataset.pkl, a table with one row per prompt.

    prompt_token_ids  list of int; what step 2 measures
    input             {"prompt_token_ids": the same list}: a prompt as vLLM's `LLM.generate` takes it, for the
                      reference's step 2, which hands this column on (its own step 1 puts text there, which
                      is then tokenized once more)

The table is what step 2 takes as -d; `gaudi-calib prepare` writes the same as JSON lines. Its options
that the reference does not have are taken as well.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from gaudi_calib.cli.main import main as run_command
from gaudi_calib.cli.main import report_errors
from gaudi_calib.files import expand_path, write_bytes

# Our flags -> the reference's.
FLAGS = {"--max-tokens": "--max-model-length", "-l": "--max-dataset-samples", "--limit": "--max-dataset-samples"}


def main() -> int:
    """Prepare the prompts, store them as a pickled DataFrame, and return the exit code."""
    import pandas as pd

    options, more = parse_options()
    words = ["prepare", "-m", options.model, "--max-tokens", str(options.max_model_length), *more]
    words += [word for dataset in options.dataset for word in ("-d", dataset)]
    words += ["-l", str(options.max_dataset_samples)] if options.max_dataset_samples else []
    words += ["--chat-template", options.chat_template] if options.chat_template else []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "prompts.jsonl"
        with contextlib.redirect_stdout(io.StringIO()) as summary:  # it names the scratch directory
            exit_code = run_command([*words, "-o", str(path), "--json"], flags=FLAGS)
        if exit_code:
            return exit_code
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    content = io.BytesIO()
    pd.DataFrame([{**row, "input": row} for row in rows]).to_pickle(content)
    target = expand_path(f"{options.output_name}-calibration-dataset.pkl")
    write_bytes(target, content.getvalue())
    counts = json.loads(summary.getvalue())
    print(f"{counts['prompts']} prompts, {counts['tokens']} tokens: {target}")
    return 0


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Return the reference's options, and the words that are none of them."""
    parser = argparse.ArgumentParser(description="Create a calibration dataset for a model.")
    parser.add_argument(
        "-d",
        "--dataset",
        required=True,
        action="append",
        help="dataset file, directory or name, or builtin; repeatable",
    )
    parser.add_argument("-m", "--model", required=True, help="directory or Hugging Face name of the model")
    parser.add_argument("-o", "--output_name", required=True, help="writes NAME-calibration-dataset.pkl")
    parser.add_argument(
        "--max-model-length", type=int, default=1024, help="cut prompts to this many tokens (%(default)s)"
    )
    parser.add_argument("--max-dataset-samples", type=int, default=0, help="number of samples (0: all)")
    parser.add_argument("--chat-template", default="", help="Jinja file in place of the model's chat template")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
