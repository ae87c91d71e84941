"""Every `gaudi-calib ...` line that the package prints, or its documents show, is one that the program takes."""

import ast
import re
from pathlib import Path

import click
import pytest

from gaudi_calib.cli.main import COMMANDS, cli
from tests.support.paths import ROOT

SOURCES = sorted([*ROOT.glob("gaudi_calib/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("examples/*.py")])
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("scripts/*.sh")]
)
# A command with its words, to where the line of prose or shell goes on with something else.
LINE = re.compile(r"gaudi-calib (?!\[)(?:-v )?((?:[a-z]+-)?[a-z]+)\b([^`;,()\n]*)")
FLAG = re.compile(r"(?<![\w-])(--?[a-z][a-z-]*)")
# Words after the program's name where a sentence is about it.
PROSE = {"computes", "is", "that", "writes"}
ENDS = re.compile(r" (?:&&|\|\||\||--|#|and|then|or|which) ")


def find_commands(text: str) -> list[tuple[str, list[str]]]:
    """Return the commands that `text` shows, each with its flags.

    >>> find_commands("run `gaudi-calib reshard RUN -t 4 --no-expert-parallel`, then `gaudi-calib quantize -t 4`")
    [('reshard', ['-t', '--no-expert-parallel']), ('quantize', ['-t'])]
    """
    text = text.replace("\\\n", " ")
    return [(name, FLAG.findall(ENDS.split(rest)[0])) for name, rest in LINE.findall(text) if name not in PROSE]


def find_faults(text: str) -> list[str]:
    """Return one sentence per command or flag in `text` that does not exist."""
    faults = []
    for name, flags in find_commands(text):
        if name not in COMMANDS:
            faults.append(f"there is no command {name}")
            continue
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        known = {
            word for leaf in walk(command) for option in leaf.params for word in (*option.opts, *option.secondary_opts)
        }
        faults += [f"{name} takes no {flag}" for flag in flags if flag not in known | {"-h", "--help"}]
    return faults


def walk(command: click.Command) -> list[click.Command]:
    """Return a command, or the commands of a group."""
    return list(command.commands.values()) if isinstance(command, click.Group) else [command]


def read_strings(path: Path) -> str:
    """Return the string literals of a source file, what is computed inside them as X."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_code_prints_can_be_run(path: Path) -> None:
    """A fix that names a command names one that exists, with flags it has."""
    assert find_faults(read_strings(path)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_shows_can_be_run(path: Path) -> None:
    """So do the examples and tables of the documents."""
    assert find_faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("`gaudi-calib reshard -m RUN -w 4`", ["reshard takes no -m", "reshard takes no -w"]),
        ("run `gaudi-calib frobnicate DIR`", ["there is no command frobnicate"]),
        ("gaudi-calib unify DIR -r 1 && rm -rf DIR", []),
        ("gaudi-calib serve -m M -- --max-model-len 9", []),
        ("gaudi-calib is not installed", []),
        ("gaudi-calib config validate --device g3 F", []),
        ("gaudi-calib calibrate -m M \\\n  --sail g3", ["calibrate takes no --sail"]),
    ],
)
def test_the_check_sees_what_does_not_exist(text: str, faults: list[str]) -> None:
    """A removed flag and a command that is not there yet are found, other programs' words are left alone."""
    assert find_faults(text) == faults
