"""Records of a dataset as rows: a conversation, a text, or token ids.

A record is a mapping from column to cell. The columns that make a row, the first one
present wins:

    prompt_token_ids       list of token ids                              used as they are
    messages               list of {"role", "content"}                    a conversation
    question, prompt       text, with `system_prompt` if there is one     one user turn
    text                   running text                                   no chat template
    input                  text already rendered with a chat template     no chat template
    conversations          ShareGPT: list of {"from", "value"}            a conversation
    instruction            Alpaca: text, with `input` (if any) below it,  one user turn
                           and `system_prompt` if there is one

A prompt is what the model will be served: columns with its answer (Alpaca's `output`)
are ignored. Beside `instruction`, `input` is only ever a part of it.

`columns` names another field for any of them (`{"prompt": "title"}`), and a column
named there wins over every other.

A ShareGPT conversation is made one that chat templates take: it begins with the first
turn of the user (or the system prompt before it), because an answer at its head has lost
its question; consecutive turns of one speaker are one turn, with a blank line between.
"""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from gaudi_calib.data.bad_rows import BadRows, RowError
from gaudi_calib.errors import DataError, UsageError
from gaudi_calib.files import parse_json

TOKEN_IDS, MESSAGES, SYSTEM, TEXT, RENDERED = "prompt_token_ids", "messages", "system_prompt", "text", "input"
CONVERSATIONS, INSTRUCTION = "conversations", "instruction"
FORMS = (TOKEN_IDS, MESSAGES, "question", "prompt", TEXT, RENDERED, CONVERSATIONS, INSTRUCTION)
COLUMNS = (*FORMS, SYSTEM)
_MAPPING_FIX = f"map one with --column NAME=FIELD, NAME one of: {', '.join(COLUMNS)}"
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}

Record = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a dataset; exactly one of `messages`, `text` and `token_ids` is set.

    Attributes:
        number: position in the dataset, from 1.
        dataset: its name, for errors.
        messages: turns with at least "role" and "content" (text).
        text: text that bypasses the chat template.
        token_ids: used as they are.
    """

    number: int
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    dataset: str = dataclass_field(default="", compare=False)

    @property
    def where(self) -> str:
        """The place of the row, as errors name it."""
        return f"{self.dataset}, row {self.number}" if self.dataset else f"row {self.number}"


def make_rows(
    records: Iterable[Record | RowError], *, source: str, columns: Mapping[str, str], bad_rows: BadRows
) -> list[Row]:
    """Return the rows of `records`.

    Args:
        records: one mapping from column to cell per row, or why it could not be read.
        source: the dataset's name, for errors.
        columns: our column name -> the field that holds it.
        bad_rows: takes the rows that are left out, among them those with a cell that is empty or of the wrong type.

    Raises:
        UsageError: `columns` has a name that is not a column.
        DataError: no record, or no usable column. RowError: too many bad rows.
    """
    for name in columns:
        if name not in COLUMNS:
            raise UsageError(f"unknown column {name!r} in --column", fix=_MAPPING_FIX)
    records = list(records)
    if not records:
        raise DataError("the dataset is empty", where=source, fix="choose one with at least one row")
    readable = [record for record in records if not isinstance(record, RowError)]
    if readable:
        _require_columns(readable, source=source, columns=columns)
    rows: list[Row] = []
    for number, record in enumerate(records, 1):
        with bad_rows.left_out():
            rows.append(_make_row(record, number, source, columns))
    bad_rows.require_few(usable=bool(rows))
    return rows


def _require_columns(records: list[Record], *, source: str, columns: Mapping[str, str]) -> None:
    present = dict.fromkeys(str(field) for record in records for field in record)
    listed = ", ".join(present) or "none"
    for name, field in columns.items():
        if field not in present:
            raise DataError(
                f"no column {field!r}, which --column {name}={field} asks for",
                where=source,
                why=f"columns: {listed}",
                fix=f"name one of these columns: --column {name}=FIELD; it holds for every -d, so prepare a dataset "
                "that needs another one by itself, and give the file to -d",
            )
    if not any(columns.get(form, form) in present for form in FORMS):
        raise DataError("the dataset has no usable column", where=source, why=f"columns: {listed}", fix=_MAPPING_FIX)


def _make_row(record: Record | RowError, number: int, source: str, columns: Mapping[str, str]) -> Row:
    if isinstance(record, RowError):
        raise record
    where = f"{source}, row {number}"
    form, field = _find_form(record, columns, where)
    cell = record.get(field)
    if form == TOKEN_IDS:
        return Row(number, token_ids=_token_ids(cell, field, where), dataset=source)
    if form == MESSAGES:
        return Row(number, messages=_messages(cell, field, where), dataset=source)
    if form == CONVERSATIONS:
        return Row(number, messages=_conversation(cell, field, where), dataset=source)
    text = _text(cell, field, where)
    if form in (TEXT, RENDERED):
        return Row(number, text=text, dataset=source)
    attached = columns.get(RENDERED, RENDERED)
    if form == INSTRUCTION and not _is_missing(record.get(attached)):
        text = f"{text}\n\n{_text(record[attached], attached, where)}"
    system = record.get(columns.get(SYSTEM, SYSTEM))
    turns = [] if _is_missing(system) else [{"role": "system", "content": _text(system, SYSTEM, where)}]
    return Row(number, messages=(*turns, {"role": "user", "content": text}), dataset=source)


def _find_form(record: Record, columns: Mapping[str, str], where: str) -> tuple[str, str]:
    """Return the form of a record and the field that holds it; columns asked for come first."""
    has_instruction = columns.get(INSTRUCTION, INSTRUCTION) in record
    for form in sorted(FORMS, key=lambda form: form not in columns):  # stable: FORMS order otherwise
        is_part = form == RENDERED and has_instruction and (form not in columns or INSTRUCTION in columns)
        field = columns.get(form, form)
        if field in record and not is_part:
            return form, field
    raise RowError(
        "the row has no usable column", where=where, why=f"it has: {', '.join(map(str, record))}", fix=_MAPPING_FIX
    )


def _is_missing(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())  # NaN differs from itself


def _empty(field: str, where: str) -> RowError:
    return RowError(
        f"column {field!r} is empty", where=where, fix="remove the row, or choose another column with --column"
    )


def _text(cell: Any, field: str, where: str) -> str:
    if _is_missing(cell):
        raise _empty(field, where)
    if not isinstance(cell, str):
        raise RowError(
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
        value = parse_json(cell) if isinstance(cell, str) else cell
    except ValueError:
        value = None
    if not isinstance(value, list | tuple):
        raise RowError(
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
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise RowError(
                f"column {field!r} holds {reprlib.repr(value)} at position {position}, expected a token id",
                where=where,
                fix="store whole numbers from 0 up, or give text in a column `prompt` instead",
            )
    return tuple(values)


def _messages(cell: Any, field: str, where: str) -> tuple[Message, ...]:
    return tuple(
        _message(turn, f"{where}, message {n}", field) for n, turn in enumerate(_parsed(cell, field, where), 1)
    )


def _conversation(cell: Any, field: str, where: str) -> tuple[Message, ...]:
    """Return the turns of a ShareGPT conversation, as the module says."""
    turns: list[Message] = []
    for turn in _messages(cell, field, where):
        if turn["role"] == "assistant" and not any(before["role"] == "user" for before in turns):
            continue
        if turns and _is_continued(turns[-1], turn):
            turns[-1] = {**turn, "content": f"{turns[-1]['content']}\n\n{turn['content']}"}
        else:
            turns.append(turn)
    if not any(turn["role"] == "user" for turn in turns):
        raise RowError("the conversation has no turn of a user", where=where, fix="remove the row")
    return tuple(turns)


def _is_continued(before: Message, turn: Message) -> bool:
    """Whether the same speaker goes on; answers of tools, and turns with more than text, stay apart."""
    is_text = before.keys() == turn.keys() == {"role", "content"}
    return is_text and before["role"] == turn["role"] != "tool"


def _message(turn: Any, where: str, field: str) -> Message:
    """Return a turn with role and content as text; ShareGPT's from/value are understood."""
    if isinstance(turn, Mapping) and "from" in turn and "value" in turn:
        turn = {"role": _sharegpt_role(turn["from"], where), "content": turn["value"]}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
        raise RowError(
            f"column {field!r} needs messages with 'role' and 'content'",
            where=where,
            why=f"got {reprlib.repr(turn):.80}",
            fix='store each message as {"role": "user", "content": "..."}',
        )
    content = turn["content"]
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise RowError("a message holds something other than text", where=where, fix="keep its text parts only")
        content = "\n".join(texts)
    if content is None and turn.get("tool_calls"):
        content = ""
    elif not isinstance(content, str) or (turn["role"] == "user" and not content.strip()):
        raise RowError("a message has no text", where=where, fix="put text in its `content`, or remove the row")
    return {key: value for key, value in turn.items() if value is not None} | {"content": content}


def _sharegpt_role(speaker: Any, where: str) -> str:
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        fix = f"name it as one of {', '.join(_SHAREGPT_ROLES)}"
        raise RowError(f"a message is from {speaker!r:.40}, which is no known speaker", where=where, fix=fix)
    return role
