#!/usr/bin/env python3
"""Step 1: dataset to NAME-calibration-dataset.pkl, a table with one row of token ids per prompt.

The table is what step 2 takes as -d; `gaudi-calib prepare` writes the same as JSON lines.
"""

import argparse
import io
import sys

from gaudi_calib.cli.main import report_errors
from gaudi_calib.files import expand_path, write_bytes


def main() -> None:
    """Prepare the prompts and store them as a pickled DataFrame."""
    import pandas as pd

    from gaudi_calib.data.prompts import prepare_prompts

    options = parse_options()
    prompts = prepare_prompts(
        options.model,
        dataset=options.dataset,
        limit=options.max_dataset_samples or None,
        max_tokens=options.max_model_length,
        chat_template=options.chat_template if options.chat_template else None,
    )
    content = io.BytesIO()
    pd.DataFrame({"prompt_token_ids": [list(ids) for ids in prompts.token_ids]}).to_pickle(content)
    target = expand_path(f"{options.output_name}-calibration-dataset.pkl")
    write_bytes(target, content.getvalue())
    print(f"{len(prompts)} prompts, {prompts.token_count} tokens: {target}")


def parse_options() -> argparse.Namespace:
    """Return the reference's options."""
    parser = argparse.ArgumentParser(description="Create a calibration dataset for a model.")
    parser.add_argument("-d", "--dataset", required=True, help="dataset file, directory or name, or builtin")
    parser.add_argument("-m", "--model", required=True, help="directory or Hugging Face name of the model")
    parser.add_argument("-o", "--output_name", required=True, help="writes NAME-calibration-dataset.pkl")
    parser.add_argument(
        "--max-model-length", type=int, default=1024, help="cut prompts to this many tokens (%(default)s)"
    )
    parser.add_argument("--max-dataset-samples", type=int, default=0, help="number of samples (0: all)")
    parser.add_argument("--chat-template", default="", help="Jinja file in place of the model's chat template")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
