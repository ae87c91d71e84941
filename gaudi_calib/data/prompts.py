"""Prompts: the token ids a model is calibrated with, and how they were chosen.

The prompts file is JSON lines, one `{"prompt_token_ids": [...]}` each, and so is
itself a dataset that needs no tokenizer.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gaudi_calib.data import DEFAULT_SEED
from gaudi_calib.data.rows import TOKEN_IDS, Row
from gaudi_calib.data.sources import read_rows
from gaudi_calib.data.tokens import Rendering, load_tokenizer, tokenize_row
from gaudi_calib.errors import DataError, UsageError
from gaudi_calib.files import write_text
from gaudi_calib.models.source import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    Args:
        model: model directory or hub name; its tokenizer is loaded only where a row needs one.
        dataset: file, directory, hub name or `builtin`; see `sources`.
        limit: number of prompts; sampled with `seed`. None: every row, in the dataset's order.
        seed: of the sample.
        min_tokens: leave out prompts with fewer tokens.
        max_tokens: cut prompts to this many tokens.
        columns: our column name -> the dataset's field; see `rows`.
        chat_template: Jinja file that replaces the model's template.
        max_model_len: longest prompt; None: what the model's config.json says.
        trust_remote_code: let the tokenizer run code from the model's directory.

    Raises:
        DataError: the dataset or the tokenizer cannot be used, or no prompt is left; says why and the fix.
        ModelError: the model directory does not exist, or its config.json cannot be read.
        UsageError: an impossible limit, or an unknown column.
    """
    _check_options(limit, min_tokens, max_tokens)
    limits = find_model(model, needs_config=False).token_limits
    rows = read_rows(dataset, columns=columns)
    template = None if chat_template is None else _read_template(Path(chat_template))
    needs_tokenizer = any(row.token_ids is None for row in rows)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code) if needs_tokenizer else None
    return build_prompts(
        rows,
        tokenizer,
        chat_template=template,
        limit=limit,
        seed=seed,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        max_model_len=max_model_len or limits.context,
        vocab_size=limits.vocab_size,
        dataset=dataset,
    )


def build_prompts(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    chat_template: str | None = None,
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    max_model_len: int | None = None,
    vocab_size: int | None = None,
    dataset: str = "",
) -> Prompts:
    """Return the prompts of `rows`; arguments as `prepare_prompts`.

    With `limit`, rows are shuffled with `seed` and tokenized until enough qualify, so a
    smaller limit gives the head of a larger one. The order of the result is that order.

    Args:
        tokenizer: may be None where every row has token ids.
        chat_template: Jinja source, or None for the tokenizer's own.
        vocab_size: token ids must be below it; None: not checked.

    Raises:
        DataError: a prompt is empty, longer than `max_model_len` or has an unknown token id
            (names the row), or no prompt is left.
        UsageError: an impossible limit.
    """
    _check_options(limit, min_tokens, max_tokens)
    token_ids: list[list[int]] = []
    counts: Counter[str] = Counter()
    too_short = truncated = 0
    for row in _in_order(rows, limit, seed):
        if limit is not None and len(token_ids) == limit:
            break
        ids, rendering = tokenize_row(row, tokenizer, chat_template=chat_template)
        where = f"{dataset}, row {row.number}" if dataset else f"row {row.number}"
        if not ids:
            raise DataError("the prompt has no tokens", where=where, fix="remove the row")
        if len(ids) < (min_tokens or 0):
            too_short += 1
            continue
        if max_tokens is not None and len(ids) > max_tokens:
            truncated += 1
            ids = ids[:max_tokens]
        _check_ids(ids, where, max_model_len, vocab_size)
        counts[rendering.value] += 1
        token_ids.append(ids)
    _check_number(len(token_ids), len(rows), too_short, limit, min_tokens, dataset)
    return Prompts(token_ids, dataset, len(rows), too_short, truncated, dict(counts))


def _in_order(rows: Sequence[Row], limit: int | None, seed: int) -> Iterator[Row]:
    order = list(range(len(rows)))
    if limit is not None:
        random.Random(seed).shuffle(order)
    return (rows[position] for position in order)


def _check_options(limit: int | None, min_tokens: int | None, max_tokens: int | None) -> None:
    for option, value in (("-l", limit), ("--min-tokens", min_tokens), ("--max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise UsageError(
                f"{option} is {value}, expected at least 1", fix=f"give {option} a number from 1 up, or leave it out"
            )
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise UsageError(f"--min-tokens {min_tokens} is above --max-tokens {max_tokens}", fix="lower --min-tokens")


def _check_ids(ids: list[int], where: str, max_model_len: int | None, vocab_size: int | None) -> None:
    if max_model_len is not None and len(ids) > max_model_len:
        raise DataError(
            f"the prompt has {len(ids)} tokens, the model's context {max_model_len}",
            where=where,
            fix=f"pass --max-tokens {max_model_len} to cut long prompts, or remove the row",
        )
    if vocab_size is not None and max(ids) >= vocab_size:
        raise DataError(
            f"token id {max(ids)} is outside the model's vocabulary of {vocab_size}",
            where=where,
            fix="prepare the prompts with the tokenizer of this model",
        )


def _check_number(
    number: int, rows: int, too_short: int, limit: int | None, min_tokens: int | None, dataset: str
) -> None:
    """Raise when no prompt is left; warn when fewer are than were asked for."""
    why = f"{rows} rows, {too_short} of them below {min_tokens} tokens" if too_short else f"{rows} rows"
    if not number:
        raise DataError(
            "no prompt is left", where=dataset or None, why=why, fix="lower --min-tokens or choose longer data"
        )
    if limit is not None and number < limit:
        _log.warning("%s: %d prompts, %d were asked for (%s)", dataset or "dataset", number, limit, why)


def _read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text()
    except (OSError, ValueError) as error:
        raise DataError(
            "cannot read the chat template",
            where=path,
            why=str(error),
            fix="give --chat-template a readable file with a Jinja template in UTF-8",
        ) from error


def write_prompts(path: Path, prompts: Prompts) -> None:
    """Write the prompts file at `path` atomically.

    Raises:
        FileError: it cannot be written; a file that was there is unchanged.
    """
    write_text(path, "".join(json.dumps({TOKEN_IDS: ids}) + "\n" for ids in prompts.token_ids))


def read_prompts(path: Path) -> Prompts:
    """Return the prompts of a prompts file (or of any dataset of `prompt_token_ids`).

    Raises:
        DataError: it is missing or malformed, or a row has no token ids.
    """
    rows = read_rows(str(path), columns={TOKEN_IDS: TOKEN_IDS})
    return Prompts(
        [list(row.token_ids or ()) for row in rows],
        str(path),
        len(rows),
        renderings={Rendering.TOKEN_IDS.value: len(rows)},
    )
