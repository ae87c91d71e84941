"""Leaving secrets out of what a run records about itself."""

import re
from collections.abc import Iterable, Mapping

REDACTED = "[redacted]"

# Variables that steer engines, devices and libraries. Others say nothing about a run.
_RECORDED = re.compile(
    r"(VLLM|PT_HPU|HABANA|HL|INC|GAUDI|HF|TRANSFORMERS|TOKENIZERS|TORCH|PYTORCH|CUDA|NVIDIA|OMP|MKL|RAY|NCCL|HCCL)_.*"
    r"|QUANT_CONFIG|RUNTIME_SCALE_PATCHING|SCALE_METHOD_CONFIG_DUMP_PATH|WORLD_SIZE|LOCAL_RANK|RANK|LOG_LEVEL.*",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"TOKEN(?!IZ)|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH|COOKIE|CERT", re.IGNORECASE)
_COUNT_NAME = re.compile(r"TOKENS", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE)
_KNOWN_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})\b")
_URL_QUERY = re.compile(r"(?P<name>[?&][^=&\s]*(?:token|key|secret|signature|password)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact_value(name: str, value: str) -> str:
    """Return `value` of the variable or option `name`, without secrets.

    >>> redact_value("HF_ENDPOINT", "https://me:pass@mirror.example/hub")
    'https://[redacted]@mirror.example/hub'
    >>> redact_value("HF_TOKEN", "hf_abc"), redact_value("--max-tokens", "128")
    ('[redacted]', '128')
    """
    is_count = bool(_COUNT_NAME.search(name)) and value.isdecimal()
    if value and _SECRET_NAME.search(name) and not is_count:
        return REDACTED
    value = _URL_LOGIN.sub(rf"\g<scheme>{REDACTED}@", value)
    value = _URL_QUERY.sub(rf"\g<name>{REDACTED}", value)
    return _KNOWN_TOKEN.sub(REDACTED, value)


def redact_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that steer a run, sorted, without secrets."""
    return {name: redact_value(name, environment[name]) for name in sorted(environment) if _RECORDED.fullmatch(name)}


def redact_command(words: Iterable[str]) -> list[str]:
    """Return a command line without secrets.

    >>> redact_command(["serve", "--api-key", "abc", "--hf-token=xyz", "--max-tokens", "9"])
    ['serve', '--api-key', '[redacted]', '--hf-token=[redacted]', '--max-tokens', '9']
    """
    redacted = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.startswith("-"):
            redacted.append(f"{name}={redact_value(name, value)}")
        else:
            redacted.append(redact_value(option, word))
        option = word if word.startswith("-") and not equals else ""
    return redacted
