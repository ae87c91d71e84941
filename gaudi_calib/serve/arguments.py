"""What follows `--`, or is given to `LLM`: an engine argument may not undo what was checked.

vLLM takes `--flag VALUE`, `--flag=VALUE`, `--flag_with_underscores`, beginnings that only one flag has, and
`--config FILE`, whose keys are flags; see its `FlexibleArgumentParser`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gaudi_calib.errors import UsageError

_CONFIG = "config"
_ONE_FILE_EACH = "each rank reads the file of its number, and ranks are counted over all of them"


@dataclass(frozen=True)
class _Argument:
    """An engine argument that the calibration, or an option of `serve`, decides.

    Attributes:
        flags: as `vllm serve` spells it.
        why, fix: for who gives another value.
        default: what it is where nothing is decided, or `...` where it is free then.
        is_own: decided by an option of `serve`, with and without a calibration.
    """

    flags: tuple[str, ...]
    why: str
    fix: str
    default: object = ...
    is_own: bool = False


_ARGUMENTS = {
    "model": _Argument(
        ("--model",), "-m names the model, and that one was checked", "give the model with -m alone", is_own=True
    ),
    "port": _Argument(("--port",), "--port is looked at before vLLM starts", "give --port before --", is_own=True),
    "tensor_parallel_size": _Argument(
        ("--tensor-parallel-size", "-tp"), "it decides which files the ranks read", "give -t before --", is_own=True
    ),
    "enable_expert_parallel": _Argument(
        ("--enable-expert-parallel", "-ep"),
        "files hold whole experts, or a slice of each",
        "give -u or --no-expert-parallel before --, expert_parallel to open_llm: the files are checked for it",
        default=False,
        is_own=True,
    ),
    "pipeline_parallel_size": _Argument(
        ("--pipeline-parallel-size", "-pp"),
        f"{_ONE_FILE_EACH}; no file is of a part of the layers",
        "leave it out, and serve with more tensor-parallel ranks (-t)",
        default=1,
    ),
    "prefill_context_parallel_size": _Argument(
        ("--prefill-context-parallel-size", "-pcp"),
        _ONE_FILE_EACH,
        "leave it out, and serve with more tensor-parallel ranks (-t)",
        default=1,
    ),
    "data_parallel_size": _Argument(
        ("--data-parallel-size", "-dp"),
        f"{_ONE_FILE_EACH}; experts would be shared by all of them",
        "leave it out, and start a server for each replica, with a --port of its own",
        default=1,
    ),
    "quantization": _Argument(
        ("--quantization", "-q"),
        "QUANT_CONFIG names the method",
        "leave it out, or leave --quant-config out to quantize with a method of vLLM's",
        default=None,
    ),
    "kv_cache_dtype": _Argument(
        ("--kv-cache-dtype",),
        "caches are FP8 where QUANT_CONFIG does not block them, and BF16 where it does",
        "leave it out; the blocklist of the config decides",
        default="auto",
    ),
    "dtype": _Argument(
        ("--dtype",),
        "scales are computed for what the model is served in (hp_dtype of QUANT_CONFIG)",
        "leave it out, or calibrate with that --dtype",
    ),
    "enforce_eager": _Argument(
        ("--enforce-eager",), "off a Gaudi nothing is quantized inside a compiled graph", "leave it out"
    ),
    "revision": _Argument(
        ("--revision",), "another revision is another checkpoint", "download it, and give its directory", default=None
    ),
}
# Flags without a value, each with its negative.
_SWITCHES = {"--no-enable-expert-parallel": "enable_expert_parallel", "--no-enforce-eager": "enforce_eager"}
_FLAGS = {flag: name for name, argument in _ARGUMENTS.items() for flag in argument.flags}
_FLAGS |= {**_SWITCHES, "--config": _CONFIG}
# Names that `--dtype` takes for the same type.
_SAME = {"half": "float16", "float": "float32"}


class Asked(NamedTuple):
    """An engine argument that the user gives.

    Attributes:
        written: as the user wrote it.
        name: its Python name.
        value: text, or any value in Python.
    """

    written: str
    name: str
    value: object


def read_words(words: Sequence[str]) -> list[Asked]:
    """Return those of the `words` of `vllm serve` that name what is decided here.

    Raises:
        UsageError: a second model, a flag that may mean several, or a `--config` that cannot be read.
    """
    if words and not words[0].startswith("-"):
        raise UsageError(f"{words[0]} after -- is a second model", why=_ARGUMENTS["model"].why, fix="leave it out")
    return list(_read_words(words))


def _read_words(words: Sequence[str]) -> Iterator[Asked]:
    for word, after in zip(words, [*words[1:], "-"], strict=False):
        flag, sign, value = _split(word)
        name = _find_name(flag)
        if name is None:
            continue
        given = value if sign else None if after.startswith("-") else after
        if name == _CONFIG:
            yield from _read_config(Path(given or ""))
        elif given is None or name in _SWITCHES.values():
            yield Asked(flag, name, not flag.startswith("--no-"))
        else:
            yield Asked(f"{flag} {given}", name, given)


def _split(word: str) -> tuple[str, str, str]:
    """Return flag, sign and value of one word; the value of a flag of one letter may follow at once."""
    if word.startswith("-q") and word != "-q":
        return "-q", "=", word[2:].removeprefix("=")
    return word.partition("=")


def _find_name(flag: str) -> str | None:
    """Return the name of the argument that vLLM's parser takes `flag` for, None where it is not decided here."""
    spelled = flag.replace("_", "-") if flag.startswith("--") else flag
    if spelled in _FLAGS or not spelled.strip("-"):
        return _FLAGS.get(spelled)
    near = {name for known, name in _FLAGS.items() if known.startswith(spelled)}
    if len(near) > 1:
        raise UsageError(f"{flag} after -- may mean several flags", why=", ".join(sorted(near)), fix="write it in full")
    return near.pop() if near else None


def _read_config(path: Path) -> Iterator[Asked]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError("--config after -- cannot be read", where=path, why=str(error), fix="correct it") from error
    for key, value in content.items() if isinstance(content, Mapping) else ():
        name = _find_name(f"--{key}")
        if name is not None:
            yield Asked(f"{key}: {value} in {path}", name, value)


def require_agreement(asked: Iterable[Asked], decided: Mapping[str, object], *, is_calibrated: bool) -> None:
    """Check that no engine argument that the user gives undoes what was checked; the same value once more is fine.

    Args:
        decided: engine arguments by name.
        is_calibrated: whether a QUANT_CONFIG is used.

    Raises:
        UsageError: one does.
    """
    for given in asked:
        argument = _ARGUMENTS.get(given.name)
        if argument is None or not (argument.is_own or is_calibrated):
            continue
        wanted = decided.get(given.name, argument.default)
        if wanted is ... or _normalize(given.value) == _normalize(wanted):
            continue
        raise UsageError(
            f"{given.written} contradicts what is served: {given.name} is {_normalize(wanted)}",
            why=argument.why,
            fix=argument.fix,
        )


def _normalize(value: object) -> str:
    text = str(value).removeprefix("torch.").lower()
    return _SAME.get(text, text)
