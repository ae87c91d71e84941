"""Train a tiny Llama on real text in about a minute of CPU, to have a model worth calibrating.

The text is on every machine that runs Python: the documentation strings and sources of its
standard library, and the prompts this package ships. Nothing is downloaded. The result is an
ordinary checkpoint (bf16 safetensors, tokenizer, Llama-3-like chat template).

Usage: python examples/train_tiny_llama.py OUT [--steps N] [--layers N] [--hidden N]
"""

import argparse
import ast
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import gaudi_calib

SPECIAL_TOKENS = {
    "bos": "<|begin_of_text|>",
    "eos": "<|end_of_text|>",
    "header": "<|start_header_id|>",
    "header_end": "<|end_header_id|>",
    "turn_end": "<|eot_id|>",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PACKAGES = ("", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging")
SEQUENCE_TOKENS = 128
BATCH_SEQUENCES = 8


def read_standard_library() -> list[str]:
    """Return the documents of the standard library: each docstring, and each source once.

    Raises:
        SystemExit: this Python has no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(path for package in PACKAGES for path in (root / package).glob("*.py")):
        try:
            source = path.read_text(encoding="utf-8")
            nodes = ast.walk(ast.parse(source))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        documents.append(source[:20_000])
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        documents += [text for text in texts if text and len(text) > 80]
    if len(documents) < 100:
        sys.exit(f"Error: no Python sources under {root}; run this with a Python that has its standard library on disk")
    return documents


def read_builtin_prompts() -> list[list[dict[str, str]]]:
    """Return the conversations of the package's prompt set."""
    path = Path(gaudi_calib.__file__).with_name("data") / "builtin.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [list(_read_messages(row)) for row in rows]


def _read_messages(row: dict) -> Iterator[dict[str, str]]:
    if "messages" in row:
        yield from row["messages"]
        return
    if row.get("system_prompt"):
        yield {"role": "system", "content": row["system_prompt"]}
    yield {"role": "user", "content": row.get("question") or row.get("prompt") or row.get("text") or ""}


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that begins each text with `<|begin_of_text|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = SPECIAL_TOKENS["bos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=SPECIAL_TOKENS["eos"],
        pad_token=SPECIAL_TOKENS["eos"],
        additional_special_tokens=[SPECIAL_TOKENS[name] for name in ("header", "header_end", "turn_end")],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, layers: int, hidden: int) -> LlamaForCausalLM:
    """Return an untrained float32 Llama with 8 attention heads over 4 KV heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def pack_tokens(tokenizer: PreTrainedTokenizerFast, documents: list[str], chats: list) -> torch.Tensor:
    """Return shuffled sequences, int64, shape (sequences, SEQUENCE_TOKENS).

    Short documents share a sequence; each begins with `<|begin_of_text|>`.
    """
    pieces = tokenizer(documents)["input_ids"]
    pieces += [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    random.shuffle(pieces)
    stream = torch.tensor([token for piece in pieces for token in [*piece, tokenizer.eos_token_id]])
    count = len(stream) // SEQUENCE_TOKENS
    sequences = stream[: count * SEQUENCE_TOKENS].view(count, SEQUENCE_TOKENS)
    return sequences[torch.randperm(count)]


def train(model: LlamaForCausalLM, sequences: torch.Tensor, steps: int) -> None:
    """Train `model` in place for `steps` batches with AdamW and a one-cycle learning rate, printing progress."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        first = step * BATCH_SEQUENCES % (len(sequences) - BATCH_SEQUENCES)
        batch = sequences[first : first + BATCH_SEQUENCES]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def measure_loss(model: LlamaForCausalLM, sequences: torch.Tensor) -> float:
    """Return the mean cross-entropy per token, in nats."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in sequences.split(BATCH_SEQUENCES)]
    return sum(losses) / len(losses)


def main() -> None:
    """Train and save; fail when the loss on held-out text did not fall clearly."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory of the checkpoint to write")
    parser.add_argument("--steps", type=int, default=280, help="batches of 8 x 128 tokens (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=2048, help="tokenizer entries (default: %(default)s)")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # long documents are cut into sequences here
    torch.manual_seed(0)
    random.seed(0)

    documents, chats = read_standard_library(), read_builtin_prompts()
    texts = documents + [message["content"] for chat in chats for message in chat]
    tokenizer = train_tokenizer(texts, options.vocab)
    sequences = pack_tokens(tokenizer, documents, chats)
    held_out, sequences = sequences[:64], sequences[64:]
    model = build_model(tokenizer, layers=options.layers, hidden=options.hidden)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {sequences.numel() / 1e6:.1f} M tokens of real text")

    before = measure_loss(model, held_out)
    train(model, sequences, options.steps)
    after = measure_loss(model, held_out)
    print(f"held-out loss {before:.2f} -> {after:.2f}, perplexity {math.exp(before):.0f} -> {math.exp(after):.0f}")
    if after > before - 1:
        sys.exit("Error: the loss did not fall; train longer with --steps")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved to {options.out}")


if __name__ == "__main__":
    main()
