"""One row to token ids, as a server would make them.

A conversation goes through the model's chat template straight to token ids: what the
template writes is all there is, so no second BOS can appear. Text goes through the
tokenizer, which adds what it adds to a plain prompt, unless the text already starts
with BOS.
"""

from enum import Enum
from typing import TYPE_CHECKING, Any

from gaudi_calib.data.bad_rows import RowError
from gaudi_calib.data.rows import Message, Row
from gaudi_calib.errors import DataError
from gaudi_calib.models.source import locate_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendering(Enum):
    """How a row became token ids."""

    TOKEN_IDS = "token ids"
    CHAT_TEMPLATE = "chat template"
    SYSTEM_FOLDED = "chat template, system prompt in the user turn"
    TEXT = "plain text"


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model directory or hub name.

    Raises:
        DataError: there is none, or it needs code that `trust_remote_code` does not allow.
        ModelError: a path that leads to no directory.
    """
    from transformers import AutoTokenizer

    fix = "copy the tokenizer files of the model into its directory, or give rows of prompt_token_ids"
    directory = locate_model(model)
    if directory is None:
        fix = "check -m: there is no such directory here, and the Hugging Face hub did not provide the model"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory or model), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and its hub client raise many types
        why = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):
            fix = "pass --trust-remote-code if you trust the code in the model's directory"
        raise DataError("the model has no usable tokenizer", where=model, why=why, fix=fix) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes one up where there are no files
        raise DataError("the model has no usable tokenizer", where=model, why="its vocabulary is empty", fix=fix)
    return tokenizer


def tokenize_row(
    row: Row, tokenizer: "PreTrainedTokenizerBase | None", *, chat_template: str | None = None
) -> tuple[list[int], Rendering]:
    """Return the token ids of a row and how they came about.

    A conversation that ends with the user's turn gets the template's generation prompt, as a
    server adds it; one that ends with the assistant's does not. Where the template refuses the
    system role, its text is put before the first user turn. Without a template the turns are
    joined by blank lines.

    Args:
        tokenizer: None for a row of token ids only.
        chat_template: Jinja source that replaces the tokenizer's own.

    Raises:
        DataError: the chat template is not valid. RowError: it refuses the conversation.
    """
    if row.token_ids is not None:
        return list(row.token_ids), Rendering.TOKEN_IDS
    assert tokenizer is not None, row.number
    if row.text is not None:
        return _tokenize_text(row.text, tokenizer), Rendering.TEXT
    messages = list(row.messages or ())
    if not (chat_template or _formats_chats(tokenizer)):
        return _tokenize_text("\n\n".join(turn["content"] for turn in messages), tokenizer), Rendering.TEXT
    return _apply_template(messages, tokenizer, chat_template, row.where)


def _tokenize_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    has_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    return list(tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"])


def _formats_chats(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer has a chat template, or a format of its own as those of mistral-common."""
    try:
        return bool(tokenizer.chat_template or tokenizer.get_chat_template())
    except NotImplementedError:
        return True
    except ValueError:
        return False


def _apply_template(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, where: str
) -> tuple[list[int], Rendering]:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        try:
            return _render(messages, tokenizer, chat_template), Rendering.CHAT_TEMPLATE
        except TemplateError as error:
            if isinstance(error, TemplateSyntaxError) or messages[0]["role"] != "system":
                raise
            return _render(_fold_system(messages), tokenizer, chat_template), Rendering.SYSTEM_FOLDED
    except TemplateSyntaxError as error:
        raise DataError(
            "the chat template is not valid Jinja",
            where=f"line {error.lineno}",
            why=error.message,
            fix="correct the file given with --chat-template",
        ) from error
    except Exception as error:  # a template is a program: it can raise anything
        raise RowError(
            "the chat template refuses the conversation",
            where=where,
            why=str(error) or type(error).__name__,
            fix="correct the row's roles and turns, or pass another template with --chat-template FILE",
        ) from error


def _render(turns: list[Message], tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> list[int]:
    is_answered = turns[-1]["role"] == "assistant"
    options: dict[str, Any] = {"chat_template": chat_template} if chat_template else {}
    if is_answered and not (chat_template or tokenizer.chat_template):
        options["continue_final_message"] = True  # mistral-common refuses an answer at the end otherwise
    return list(
        tokenizer.apply_chat_template(
            turns, add_generation_prompt=not is_answered, tokenize=True, return_dict=False, **options
        )
    )


def _fold_system(messages: list[Message]) -> list[Message]:
    """Return the conversation with the system prompt at the head of its first user turn.

    >>> _fold_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    [{'role': 'user', 'content': 'Be brief.\\n\\nHi'}]
    """
    system, *turns = messages
    if not turns or turns[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *turns]
    return [{**turns[0], "content": f"{system['content']}\n\n{turns[0]['content']}"}, *turns[1:]]
