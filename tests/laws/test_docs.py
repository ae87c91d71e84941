"""The documents say what is true: links lead somewhere, quoted messages are the program's."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from tests.support.paths import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md")])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    """A relative link names a file that is there."""
    links = [link for link in LINK.findall(path.read_text()) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_published_calibrations_are_those_of_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every set that the script reads has its row; without the sets nothing is written."""
    script = runpy.run_path(str(ROOT / "docs" / "generate_published.py"))
    rows = re.findall(r"^\| ([\w.-]+), (g\d) \|", script["TABLE"].read_text(), re.MULTILINE)
    assert rows == [(name, source.device) for name, source in script["SETS"].items()]
    assert (script["main"]([]), script["main"]([str(tmp_path)])) == (2, 1)
    assert "llama-3.1-70b" in capsys.readouterr().err


def test_every_document_is_in_the_index() -> None:
    """docs/README.md links every page of docs/."""
    linked = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"} <= linked


def read_messages() -> str:
    """Return all that the program may print: string literals of the package, and the shell's files."""
    texts = [(ROOT / "Makefile").read_text(), (ROOT / "scripts" / "calibrate_model.sh").read_text()]
    for path in ROOT.glob("gaudi_calib/**/*.py"):
        texts += [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_of_the_program() -> None:
    """A user who searches the page for the message finds it."""
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = read_messages()
    assert len(rows) > 30
    assert [row for row in rows if row not in messages] == []
