"""Records of a dataset as rows: a conversation, a text, or token ids.

A record is a mapping from column to cell. The columns that make a row, the first one
present wins:

    prompt_token_ids       list of token ids                              used as they are
    messages               list of {"role", "content"}                    a conversation
    question, prompt       text, with `system_prompt` if there is one     one user turn
    text                   running text                                   no chat template
    input                  text already rendered with a chat template     no chat template

`columns` names another field for any of them (`{"prompt": "instruction"}`), and a
column named there wins over every other.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gaudi_calib.errors import DataError, UsageError

TOKEN_IDS, MESSAGES, SYSTEM, TEXT, RENDERED = "prompt_token_ids", "messages", "system_prompt", "text", "input"
FORMS = (TOKEN_IDS, MESSAGES, "question", "prompt", TEXT, RENDERED)
COLUMNS = (*FORMS, SYSTEM)
_MAPPING_FIX = f"map one with --column NAME=FIELD, NAME one of: {', '.join(COLUMNS)}"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a dataset; exactly one of `messages`, `text` and `token_ids` is set.

    Attributes:
        number: position in the dataset, from 1.
        messages: turns with at least "role" and "content" (text).
        text: text that bypasses the chat template.
        token_ids: used as they are.
    """

    number: int
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None


def make_rows(records: Iterable[Mapping[str, Any]], *, source: str, columns: Mapping[str, str]) -> list[Row]:
    """Return the rows of `records`.

    Args:
        records: one mapping from column to cell per row.
        source: the dataset's name, for errors.
        columns: our column name -> the field that holds it.

    Raises:
        UsageError: `columns` has a name that is not a column.
        DataError: no record, no usable column, or a cell that is empty or of the wrong type (with its row).
    """
    for name in columns:
        if name not in COLUMNS:
            raise UsageError(f"unknown column {name!r} in --column", fix=_MAPPING_FIX)
    records = list(records)
    if not records:
        raise DataError("the dataset is empty", where=source, fix="choose one with at least one row")
    _require_columns(records, source=source, columns=columns)
    return [_make_row(record, number, source, columns) for number, record in enumerate(records, 1)]


def _require_columns(records: list[Mapping[str, Any]], *, source: str, columns: Mapping[str, str]) -> None:
    present = dict.fromkeys(str(field) for record in records for field in record)
    listed = ", ".join(present) or "none"
    for name, field in columns.items():
        if field not in present:
            raise DataError(
                f"no column {field!r}, which --column {name}={field} asks for",
                where=source,
                why=f"columns: {listed}",
                fix=f"name one of these columns: --column {name}=FIELD",
            )
    fields = [columns.get(form, form) for form in FORMS]
    # An instruction dataset's `input` is an optional attachment of the instruction, not a prompt.
    usable = [field for field in fields if field in present and not (field == RENDERED and "instruction" in present)]
    if not usable and RENDERED not in columns:
        raise DataError("the dataset has no usable column", where=source, why=f"columns: {listed}", fix=_MAPPING_FIX)


def _make_row(record: Mapping[str, Any], number: int, source: str, columns: Mapping[str, str]) -> Row:
    where = f"{source}, row {number}"
    form, field = _find_form(record, columns, where)
    cell = record.get(field)
    if form == TOKEN_IDS:
        return Row(number, token_ids=_token_ids(cell, field, where))
    if form == MESSAGES:
        return Row(number, messages=_messages(cell, field, where))
    text = _text(cell, field, where)
    if form in (TEXT, RENDERED):
        return Row(number, text=text)
    system = record.get(columns.get(SYSTEM, SYSTEM))
    turns = [] if _is_missing(system) else [{"role": "system", "content": _text(system, SYSTEM, where)}]
    return Row(number, messages=(*turns, {"role": "user", "content": text}))


def _find_form(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> tuple[str, str]:
    """Return the form of a record and the field that holds it; columns asked for come first."""
    for form in sorted(FORMS, key=lambda form: form not in columns):  # stable: FORMS order otherwise
        field = columns.get(form, form)
        if field in record:
            return form, field
    raise DataError(
        "the row has no usable column", where=where, why=f"it has: {', '.join(map(str, record))}", fix=_MAPPING_FIX
    )


def _is_missing(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())  # NaN differs from itself


def _empty(field: str, where: str) -> DataError:
    return DataError(
        f"column {field!r} is empty", where=where, fix="remove the row, or choose another column with --column"
    )


def _text(cell: Any, field: str, where: str) -> str:
    if _is_missing(cell):
        raise _empty(field, where)
    if not isinstance(cell, str):
        raise DataError(
            f"column {field!r} holds {type(cell).__name__}, expected text",
            where=where,
            fix="store it as one string, or choose another column with --column",
        )
    return cell


def _parsed(cell: Any, field: str, where: str) -> Any:
    """Return the list in `cell`; files of text (CSV) hold it as JSON."""
    if _is_missing(cell):
        raise _empty(field, where)
    try:
        value = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        value = None
    if not isinstance(value, list | tuple):
        raise DataError(
            f"column {field!r} holds {type(cell).__name__}, expected a list",
            where=where,
            fix="store a list (in a CSV: as JSON), or choose another column with --column",
        )
    if not value:
        raise _empty(field, where)
    return value


def _token_ids(cell: Any, field: str, where: str) -> tuple[int, ...]:
    values = _parsed(cell, field, where)
    for position, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(
                f"column {field!r} holds {reprlib.repr(value)} at position {position}, expected a token id",
                where=where,
                fix="store whole numbers from 0 up, or give text in a column `prompt` instead",
            )
    return tuple(values)


def _messages(cell: Any, field: str, where: str) -> tuple[Message, ...]:
    return tuple(
        _message(turn, f"{where}, message {n}", field) for n, turn in enumerate(_parsed(cell, field, where), 1)
    )


def _message(turn: Any, where: str, field: str) -> Message:
    """Return a turn with role and content as text; ShareGPT's from/value are understood."""
    if isinstance(turn, Mapping) and "from" in turn and "value" in turn:
        turn = {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
        raise DataError(
            f"column {field!r} needs messages with 'role' and 'content'",
            where=where,
            why=f"got {reprlib.repr(turn):.80}",
            fix='store each message as {"role": "user", "content": "..."}',
        )
    content = turn["content"]
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise DataError("a message holds something other than text", where=where, fix="keep its text parts only")
        content = "\n".join(texts)
    if content is None and turn.get("tool_calls"):
        content = ""
    elif not isinstance(content, str) or (turn["role"] == "user" and not content.strip()):
        raise DataError("a message has no text", where=where, fix="put text in its `content`, or remove the row")
    return {key: value for key, value in turn.items() if value is not None} | {"content": content}
