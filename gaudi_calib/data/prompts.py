"""Prompts: the token ids a model is calibrated with, and how they were chosen.

The prompts file is JSON lines, one `{"prompt_token_ids": [...]}` each, and so is
itself a dataset that needs no tokenizer.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.data import DEFAULT_SEED
from gaudi_calib.data.rows import TOKEN_IDS
from gaudi_calib.data.sources import explained, read_rows
from gaudi_calib.data.tokens import load_tokenizer, tokenize_row
from gaudi_calib.errors import DataError, UsageError
from gaudi_calib.files import expand_path, write_text
from gaudi_calib.models.source import find_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """Token ids of every prompt, in order.

    Attributes:
        token_ids: one list of ids per prompt; none is empty.
        dataset: where they come from, as given.
        rows: number of rows of the dataset.
        too_short: rows looked at and left out for having fewer than `min_tokens`.
        truncated: prompts cut to `max_tokens`.
        renderings: how many prompts were rendered in which way.
    """

    token_ids: list[list[int]]
    dataset: str = ""
    rows: int = 0
    too_short: int = 0
    truncated: int = 0
    renderings: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def token_count(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def sha256(self) -> str:
        """`sha256:<hex digest>` of the ids: each prompt as its length and ids, little-endian int64.

        >>> Prompts([[1, 2]]).sha256 == Prompts([[1], [2]]).sha256
        False
        """
        digest = hashlib.sha256()
        for ids in self.token_ids:
            digest.update(np.asarray([len(ids), *ids], "<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def summary(self) -> dict[str, Any]:
        """Return everything but the ids, as JSON values."""
        lengths = [len(ids) for ids in self.token_ids]
        return {
            "dataset": self.dataset,
            "rows": self.rows,
            "prompts": len(self),
            "tokens": self.token_count,
            "shortest": min(lengths, default=0),
            "longest": max(lengths, default=0),
            "too_short": self.too_short,
            "truncated": self.truncated,
            "renderings": dict(self.renderings),
            "sha256": self.sha256,
        }


def prepare_prompts(
    model: str,
    dataset: str,
    *,
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    columns: Mapping[str, str] | None = None,
    chat_template: str | Path | None = None,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
) -> Prompts:
    """Return the prompts of a dataset for a model: read, choose, render, tokenize, check.

    With `limit`, rows are shuffled with `seed` and tokenized until enough qualify, so a
    smaller limit gives the head of a larger one. The order of the result is that order.

    Args:
        model: model directory or hub name; its tokenizer is loaded only where a row needs one.
        dataset: file, directory, hub name or `builtin`; see `sources`.
        limit: number of prompts. None: every row, in the dataset's order.
        seed: of the sample.
        min_tokens: leave out prompts with fewer tokens.
        max_tokens: cut prompts to this many tokens.
        columns: our column name -> the dataset's field; see `rows`.
        chat_template: Jinja file that replaces the model's template.
        max_model_len: longest prompt; None: what the model's config.json says.
        trust_remote_code: let the tokenizer run code from the model's directory.

    Raises:
        DataError: the dataset or the tokenizer cannot be used; a prompt is empty, longer than the
            model's context or has an unknown token id (names the row); or no prompt is left.
        ModelError: the model directory does not exist, or its config.json cannot be read.
        UsageError: an impossible limit, or an unknown column.
    """
    _check_options(limit, min_tokens, max_tokens)
    source = find_model(model, needs_config=False)
    max_model_len = max_model_len or source.context
    rows = read_rows(dataset, columns=columns)
    template = None if chat_template is None else _read_template(expand_path(chat_template))
    needs_tokenizer = any(row.token_ids is None for row in rows)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code) if needs_tokenizer else None
    if limit is not None:
        random.Random(seed).shuffle(rows)
    token_ids: list[list[int]] = []
    counts: Counter[str] = Counter()
    too_short = truncated = 0
    for row in rows:
        if len(token_ids) == limit:
            break
        ids, rendering = tokenize_row(row, tokenizer, chat_template=template)
        where = f"{dataset}, row {row.number}"
        if not ids:
            raise DataError("the prompt has no tokens", where=where, fix="remove the row")
        if len(ids) < (min_tokens or 0):
            too_short += 1
            continue
        if max_tokens is not None and len(ids) > max_tokens:
            truncated += 1
            ids = ids[:max_tokens]
        _check_ids(ids, where, max_model_len, source.vocab_size)
        counts[rendering.value] += 1
        token_ids.append(ids)
    prompts = Prompts(token_ids, dataset, len(rows), too_short, truncated, dict(counts))
    _check_number(prompts, limit, min_tokens)
    return prompts


def _check_options(limit: int | None, min_tokens: int | None, max_tokens: int | None) -> None:
    for option, value in (("-l", limit), ("--min-tokens", min_tokens), ("--max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise UsageError(
                f"{option} is {value}, expected at least 1", fix=f"give {option} a number from 1 up, or leave it out"
            )
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise UsageError(f"--min-tokens {min_tokens} is above --max-tokens {max_tokens}", fix="lower --min-tokens")


def _check_ids(ids: list[int], where: str, context: int | None, vocab_size: int | None) -> None:
    if context is not None and len(ids) > context:
        raise DataError(
            f"the prompt has {len(ids)} tokens, the model's context {context}",
            where=where,
            fix=f"pass --max-tokens {context} to cut long prompts, or remove the row",
        )
    if vocab_size is not None and max(ids) >= vocab_size:
        raise DataError(
            f"token id {max(ids)} is outside the model's vocabulary of {vocab_size}",
            where=where,
            fix="prepare the prompts with the tokenizer of this model",
        )


def _check_number(prompts: Prompts, limit: int | None, min_tokens: int | None) -> None:
    """Raise when no prompt is left; warn when fewer are than were asked for."""
    why = f"{prompts.rows} rows"
    if prompts.too_short:
        why += f", {prompts.too_short} of them below {min_tokens} tokens"
    if not prompts.token_ids:
        fix = "lower --min-tokens or choose longer data"
        raise DataError("no prompt is left", where=prompts.dataset, why=why, fix=fix)
    if limit is not None and len(prompts) < limit:
        _log.warning("%s: %d prompts, %d were asked for (%s)", prompts.dataset, len(prompts), limit, why)


def _read_template(path: Path) -> str:
    fix = "give --chat-template a readable file with a Jinja template in UTF-8"
    with explained("cannot read the chat template", OSError, ValueError, where=path, fix=fix):
        return path.read_text(encoding="utf-8")


def write_prompts(path: Path, prompts: Prompts) -> None:
    """Write the prompts file at `path` atomically.

    Raises:
        FileError: it cannot be written; a file that was there is unchanged.
    """
    write_text(expand_path(path), "".join(json.dumps({TOKEN_IDS: ids}) + "\n" for ids in prompts.token_ids))
