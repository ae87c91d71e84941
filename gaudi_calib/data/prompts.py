"""Prompts: the token ids a model is calibrated with, and how they were chosen.

The prompts file is JSON lines, one `{"prompt_token_ids": [...]}` each, and so is
itself a dataset that needs no tokenizer.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from gaudi_calib.data import DEFAULT_SEED
from gaudi_calib.data.bad_rows import BadRows, RowError
from gaudi_calib.data.mixture import WeightedDataset, count_in_proportion, parse_datasets, take_turns
from gaudi_calib.data.rows import TOKEN_IDS, Row
from gaudi_calib.data.sources import BUILTIN, explained, read_rows
from gaudi_calib.data.tokens import Rendering, load_tokenizer, tokenize_row
from gaudi_calib.errors import DataError, UsageError
from gaudi_calib.files import expand_path, write_text
from gaudi_calib.models.source import find_model

_log = logging.getLogger(__name__)

# Token ids of a prompt, and the row it was made of.
_Made = tuple[list[int], str]


@dataclass
class Part:
    """What one dataset gives to the prompts; counts grow while it is read.

    Attributes:
        dataset: its name and weight.
        rows: number of its rows, those that cannot be used included.
        prompts, tokens: how many come from it.
        too_short: rows looked at and left out for having fewer than `min_tokens`.
        truncated: prompts that were cut.
        renderings: how many prompts were rendered in which way.
    """

    dataset: WeightedDataset
    rows: int
    prompts: int = 0
    tokens: int = 0
    too_short: int = 0
    truncated: int = 0
    renderings: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Prompts:
    """Token ids of every prompt, in order; its counts are those of all datasets together.

    Attributes:
        token_ids: one list of ids per prompt; none is empty.
        parts: the datasets they come from.
        skipped: rows left out because they cannot be used.
        origins: the row each prompt comes from, as errors name it.
    """

    token_ids: list[list[int]]
    parts: Sequence[Part] = ()
    skipped: int = 0
    origins: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def token_count(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def dataset(self) -> str:
        """Where they come from, as given."""
        return ", ".join(str(part.dataset) for part in self.parts)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def too_short(self) -> int:
        return sum(part.too_short for part in self.parts)

    @property
    def truncated(self) -> int:
        return sum(part.truncated for part in self.parts)

    @property
    def renderings(self) -> dict[str, int]:
        return dict(sum((part.renderings for part in self.parts), Counter[str]()))

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
        """Return everything but the ids, as JSON values; several datasets one by one, too."""
        lengths = [len(ids) for ids in self.token_ids]
        summary = {
            "dataset": self.dataset,
            "rows": self.rows,
            "skipped": self.skipped,
            "prompts": len(self),
            "tokens": self.token_count,
            "shortest": min(lengths, default=0),
            "longest": max(lengths, default=0),
            "too_short": self.too_short,
            "truncated": self.truncated,
            "renderings": self.renderings,
            "sha256": self.sha256,
        }
        if len(self.parts) > 1:
            summary["parts"] = [{**vars(part), "dataset": str(part.dataset)} for part in self.parts]
        return summary


@dataclass(frozen=True)
class _Recipe:
    """What makes a prompt of a row, whichever dataset it is of.

    Attributes:
        render: a row to token ids, and how.
        min_tokens, max_tokens: of a prompt.
        context: most tokens of a sequence, which is what `limited_by` names.
        new_tokens: how many of them come after the prompt.
        vocab_size: token ids are below it.
    """

    render: Callable[[Row], tuple[list[int], Rendering]]
    min_tokens: int | None
    max_tokens: int | None
    context: int | None
    limited_by: str
    new_tokens: int
    vocab_size: int | None

    def make_prompt(self, row: Row, part: Part) -> list[int] | None:
        """Return the token ids of a row, or None where they are too few; `part` counts it.

        Raises:
            RowError: there are none or too many, or the model does not know one.
        """
        ids, rendering = self.render(row)
        if not ids:
            raise RowError("the prompt has no tokens", where=row.where, fix="remove the row")
        kept = ids[: self._find_cut(part.dataset.name)]
        if len(kept) < (self.min_tokens or 0):
            part.too_short += 1
            return None
        self._check_ids(kept, row.where)
        part.prompts += 1
        part.tokens += len(kept)
        part.truncated += len(kept) < len(ids)
        part.renderings[rendering.value] += 1
        return kept

    def _find_cut(self, dataset: str) -> int | None:
        """Return how many tokens of a prompt are kept; what we ship fits every model and engine."""
        fitting = self.context - max(1, self.new_tokens) if dataset == BUILTIN and self.context else None
        return min((limit for limit in (self.max_tokens, fitting) if limit), default=None)

    def _check_ids(self, ids: list[int], where: str) -> None:
        room = None if self.context is None else self.context - self.new_tokens
        if room is not None and len(ids) > room:
            raise RowError(
                f"the prompt has {len(ids)} tokens, {self.limited_by} {self.context}",
                where=where,
                why="at least one token is generated after it" if self.new_tokens else None,
                fix=f"pass --max-tokens {room} to cut long prompts, or remove the row",
            )
        if self.vocab_size is not None and max(ids) >= self.vocab_size:
            raise RowError(
                f"token id {max(ids)} is outside the model's vocabulary of {self.vocab_size}",
                where=where,
                fix="prepare the prompts with the tokenizer of this model",
            )


def prepare_prompts(
    model: str,
    dataset: str | Sequence[str],
    *,
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    columns: Mapping[str, str] | None = None,
    chat_template: str | Path | None = None,
    max_model_len: int | None = None,
    new_tokens: int = 0,
    skip_bad_rows: int = 0,
    trust_remote_code: bool = False,
) -> Prompts:
    """Return the prompts of datasets for a model: read, choose, render, tokenize, check.

    With `limit`, rows are shuffled with `seed` and tokenized until enough qualify, so a
    smaller limit gives the head of a larger one. The order of the result is that order.
    Several datasets take turns then, so that each has its share: that of its weight or, without
    weights, of its rows. With weights and no `limit`, one dataset gives all it has.

    Args:
        model: model directory or hub name; its tokenizer is loaded only where a row needs one.
        dataset: file, directory, hub name or `builtin` (see `sources`), or several of them, all
            or none of them weighted: `NAME=WEIGHT` (see `mixture`).
        limit: number of prompts. None: every row, in the datasets' order.
        seed: of the sample.
        min_tokens: leave out prompts with fewer tokens.
        max_tokens: cut prompts to this many tokens.
        columns: our column name -> the datasets' field; see `rows`.
        chat_template: Jinja file that replaces the model's template.
        max_model_len: most tokens of a sequence; None: what the model's config.json says. A longer
            prompt is an error, except that those of `builtin` are cut, with room for one more token.
        new_tokens: how many tokens must fit into a sequence after the prompt.
        skip_bad_rows: how many rows may be left out because they cannot be used.
        trust_remote_code: let the tokenizer run code from the model's directory.

    Raises:
        DataError: a dataset or the tokenizer cannot be used, or no prompt is left.
        RowError: more than `skip_bad_rows` rows cannot be used: they have no text, or their prompt is
            empty, too long or has an unknown token id; names the first of them.
        ModelError: the model directory does not exist, or its config.json cannot be read.
        UsageError: an impossible limit or weight, or an unknown column.
    """
    _check_options(limit, min_tokens, max_tokens, skip_bad_rows)
    source = find_model(model, needs_config=False)
    context = max_model_len or source.context
    if context is not None and context <= new_tokens:
        raise UsageError(f"a sequence of {context} tokens leaves no room for a prompt", fix="raise --max-model-len")
    parts: list[Part] = []
    rows: list[list[Row]] = []
    bad_rows = BadRows(skip_bad_rows)
    for each in parse_datasets(dataset):
        bad_before = bad_rows.count
        rows.append(read_rows(each.name, columns=columns, bad_rows=bad_rows))
        parts.append(Part(each, len(rows[-1]) + bad_rows.count - bad_before))
    template = None if chat_template is None else _read_template(expand_path(chat_template))
    needs_tokenizer = any(row.token_ids is None for row in chain(*rows))
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code) if needs_tokenizer else None
    render = partial(tokenize_row, tokenizer=tokenizer, chat_template=template)
    limited_by = "--max-model-len" if max_model_len else "the model's context"
    recipe = _Recipe(render, min_tokens, max_tokens, context, limited_by, new_tokens, source.vocab_size)
    if limit is not None or parts[0].dataset.weight is not None:
        for each_rows in rows:
            random.Random(seed).shuffle(each_rows)
    streams = [_make_prompts(recipe, *pair, bad_rows) for pair in zip(rows, parts, strict=True)]
    made = list(_mix(streams, parts, limit))
    bad_rows.require_few(usable=bool(made))
    prompts = Prompts([ids for ids, _ in made], parts, bad_rows.count, [origin for _, origin in made])
    _check_number(prompts, limit, min_tokens)
    return prompts


def _make_prompts(recipe: _Recipe, rows: Iterable[Row], part: Part, bad_rows: BadRows) -> Iterator[_Made]:
    for row in rows:
        ids = None
        with bad_rows.left_out():
            ids = recipe.make_prompt(row, part)
        if ids is not None:
            yield ids, row.where


def _mix(streams: Sequence[Iterator[_Made]], parts: Sequence[Part], limit: int | None) -> Iterator[_Made]:
    """Yield the prompts of several datasets: one after another, or a sample in which each has its share."""
    sizes = [part.rows for part in parts]
    weights = [part.dataset.weight for part in parts if part.dataset.weight is not None]
    if weights:
        number = count_in_proportion(sizes, weights)
        return islice(take_turns(streams, weights, keeps_proportion=True), min(limit or number, number))
    if limit is None:
        return chain(*streams)
    return islice(take_turns(streams, sizes, keeps_proportion=False), min(limit, sum(sizes)))


def _check_options(limit: int | None, min_tokens: int | None, max_tokens: int | None, skip_bad_rows: int) -> None:
    limits = (("-l", limit, 1), ("--min-tokens", min_tokens, 1), ("--max-tokens", max_tokens, 1))
    for option, value, least in (*limits, ("--skip-bad-rows", skip_bad_rows, 0)):
        if value is not None and value < least:
            fix = f"give {option} a number from {least} up, or leave it out"
            raise UsageError(f"{option} is {value}, expected at least {least}", fix=fix)
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise UsageError(f"--min-tokens {min_tokens} is above --max-tokens {max_tokens}", fix="lower --min-tokens")


def _check_number(prompts: Prompts, limit: int | None, min_tokens: int | None) -> None:
    """Raise when no prompt is left; warn when fewer are than were asked for, or a dataset gives none."""
    why = f"{prompts.rows} rows"
    if prompts.too_short:
        why += f", {prompts.too_short} of them below {min_tokens} tokens"
    if prompts.skipped:
        why += f", {prompts.skipped} of them cannot be used"
    if not prompts.token_ids:
        fix = "lower --min-tokens or choose longer data" if min_tokens else "correct its rows, or choose another one"
        raise DataError("no prompt is left", where=prompts.dataset, why=why, fix=fix)
    if limit is not None and len(prompts) < limit:
        _log.warning("%s: %d prompts, %d were asked for (%s)", prompts.dataset, len(prompts), limit, why)
    for part in prompts.parts:
        if not part.prompts:
            _log.warning("%s: none of the %d prompts is of this dataset", part.dataset.name, len(prompts))


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
