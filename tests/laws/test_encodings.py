"""Text is UTF-8 whatever the locale: nothing that opens a file or reads a process as text leaves that to it."""

import ast

import pytest

from tests.support.paths import ROOT

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("gaudi_calib", "scripts", "examples", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
)
METHODS = {"read_text", "write_text"}
PROCESSES = {"text", "universal_newlines"}
# Whose `open` gives bytes: a file descriptor, a member of a zip file.
NO_TEXT = {"os", "archive"}


def find_unsaid(source: str) -> list[str]:
    """Return every call that opens text and does not say in which encoding."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if _opens_text(call) and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]


def _opens_text(call: ast.Call) -> bool:
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if name == "open" and owner not in NO_TEXT:
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        words = [node.value for node in values if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return not any("b" in word and set(word) <= set("rwaxb+") for word in words)
    reads_process = any(word.arg in PROCESSES and ast.unparse(word.value) == "True" for word in call.keywords)
    return (bool(owner) and name in METHODS) or name == "TextIOWrapper" or reads_process


@pytest.mark.parametrize("file", FILES)
def test_text_names_its_encoding(file: str) -> None:
    """Files that are written on one machine are read on another."""
    assert find_unsaid((ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.read_text()", 1),
        ("Path('a').write_text(text)", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("open(path)", 1),
        ("open(path, mode='w')", 1),
        ("path.open('w')", 1),
        ("path.open('rb')", 0),
        ("path.open('w', encoding='utf-8')", 0),
        ("open(descriptor, 'r+b')", 0),
        ("archive.open(member, 'w')", 0),
        ("Row(1, text=text)", 0),
        ("os.open(path, flags)", 0),
        ("subprocess.run(words, text=True)", 1),
        ("subprocess.run(words, encoding='utf-8')", 0),
        ("write_text(path, 'x')", 0),
    ],
)
def test_the_law_sees_what_breaks_it(source: str, count: int) -> None:
    """Each way of breaking it is found, and what obeys is let through."""
    assert len(find_unsaid(source)) == count
