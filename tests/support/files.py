"""Files that tests give to commands, and what is in a directory before and after one."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

EIGHT_PROMPTS = tuple(tuple((7 * row + i * i) % 300 for i in range(5 + row)) for row in range(8))


def write_prompts(path: Path, prompts: Iterable[Sequence[int]] = EIGHT_PROMPTS) -> Path:
    """Write token ids as a dataset: no tokenizer is needed. A directory gets `prompts.jsonl`.

    Returns:
        The file.
    """
    path = path / "prompts.jsonl" if path.is_dir() else path
    path.write_text("".join(json.dumps({"prompt_token_ids": list(ids)}) + "\n" for ids in prompts))
    return path


def snapshot(directory: Path, *, skipped: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the content of every file below `directory` by its path there, but for file names in `skipped`."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in skipped]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
