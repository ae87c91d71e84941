"""Who may import what, and who may know a model's name."""

import ast
import fnmatch
import re
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from gaudi_calib.cli.main import COMMANDS
from gaudi_calib.models.families import FAMILIES
from tests.support.house import FILES, HOUSE, PACKAGE, find_file, find_imports, find_room


def find_violations(source: str, file: str) -> list[str]:
    """Return one sentence per import of `file` (inside the package) that the house forbids."""
    room = find_room(file)
    assert room is not None, f"{file} is in no room of HOUSE"
    found = []
    for item in find_imports(source, file):
        top = item.module.partition(".")[0]
        if top == "gaudi_calib":
            target = find_room(find_file(item.module))
            if target is None or (target is not room and target.row >= room.row):
                where = f"{target.name} (row {target.row})" if target else "nowhere"
                found.append(f"line {item.line}: {room.name} (row {room.row}) imports {item.module} of {where}")
            elif target.is_heavy and not room.is_heavy and item.when == "import":
                found.append(f"line {item.line}: {item.module} must be imported inside a function")
        elif top not in sys.stdlib_module_names and item.when != "types":
            allowed = room.at_import | (room.in_functions if item.when == "call" else frozenset())
            if top not in allowed:
                found.append(f"line {item.line}: {room.name} may not load {top} at {item.when} time")
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_module_has_exactly_one_room(file: str) -> None:
    """A new file must be given a room of the house before it can be merged."""
    assert find_room(file) is not None, f"add {file} to HOUSE in tests/support/house.py"


def find_unlisted(text: str, modules: set[str]) -> set[str]:
    """Return the modules that a room's docstring lacks, and what it lists that is none; commands need no line."""
    listed: set[str] = set()
    for line in re.findall(r"^ *([a-z]\S*(?:, \S+)*)  +\S", text, re.MULTILINE):
        for name in line.split(", "):
            stem = re.sub(r"\.py$|/$", "", name)
            listed |= set(fnmatch.filter(modules, stem)) or {name}
    return (listed ^ modules) - {command.replace("-", "_") for command in COMMANDS}


@pytest.mark.parametrize("room", sorted({str(Path(file).parent) for file in FILES} - {"."}))
def test_a_room_lists_its_modules(room: str) -> None:
    """Whoever opens a room is told what is where, and nothing that is not there."""
    inside = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    inside |= {path.parent.name for path in (PACKAGE / room).glob("*/__init__.py")}
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert find_unlisted(text or "", inside) == set()


def test_what_a_room_does_not_list_is_found() -> None:
    """Modules without a line, and lines without a module; a line may be of several, or of a pattern."""
    assert find_unlisted("A room.\n\none, two   x\nfp8_*      y\ngone.py    z", {"one", "two", "fp8_a", "new"}) == {
        "gone.py",
        "new",
    }


@pytest.mark.parametrize("file", FILES)
def test_a_module_imports_only_from_its_own_room_or_lower_rows(file: str) -> None:
    """No import points upward, and no row loads a library it may not."""
    assert find_violations((PACKAGE / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("errors.py", "import numpy", "base may not load numpy"),
        (
            "errors.py",
            "from gaudi_calib.config import model",
            "base (row 0) imports gaudi_calib.config.model of",
        ),
        ("errors.py", "from . import manifest", "base (row 0) imports gaudi_calib.manifest of manifest (row 2)"),
        ("scales/compute.py", "from ..rankfiles import store", "imports gaudi_calib.rankfiles.store of rankfiles"),
        ("ranges/node.py", "from ..cli import main", "ranges (row 3) imports gaudi_calib.cli.main of cli (row 10)"),
        ("data/prompts.py", "import pandas as pd", "data may not load pandas at import"),
        ("ranges/merge.py", "def f():\n    import torch", "ranges may not load torch at call"),
        ("runs/run.py", "from gaudi_calib.checkpoints import plan", "must be imported inside a function"),
        ("cli/measure.py", "try:\n    import torch\nexcept ImportError:\n    pass", "may not load torch"),
        ("cli/measure.py", "class A:\n    import numpy", "may not load numpy"),
        ("files.py", "from gaudi_calib.nowhere import x", "of nowhere"),
    ],
)
def test_the_check_sees_a_forbidden_import(file: str, source: str, complaint: str) -> None:
    """Each way of breaking the rule is found."""
    assert any(complaint in line for line in find_violations(source, file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/prompts.py", "def f():\n    import pandas"),
        ("engines/torch/stream.py", "import torch\nfrom gaudi_calib.ranges import node"),
        ("cli/measure.py", "def f():\n    from gaudi_calib.checkpoints import plan"),
        ("rankfiles/store.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("layout.py", "import json, re\nfrom gaudi_calib.errors import FileError"),
    ],
)
def test_the_check_accepts_what_the_house_allows(file: str, source: str) -> None:
    """Lazy imports and imports for types alone are fine."""
    assert find_violations(source, file) == []


def test_design_draws_every_room() -> None:
    """docs/design.md has the rows of HOUSE, with the same numbers."""
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    drawn = {(int(row), name) for row, names in rows for name in re.findall(r"`([^`]+)`", names)}
    assert drawn == {(room.row, re.sub(r"(/?\*)?\.py$", "", pattern)) for room in HOUSE for pattern in room.patterns}


def find_circle(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Return modules that import each other in a circle, by what each imports; none if there is no circle.

    >>> find_circle({"rules": ["model"], "model": ["check"], "check": ["rules"]})
    ['rules', 'check', 'model', 'rules']
    """
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Neither inside functions nor for types: of two modules, one knows the other."""
    imports = {file: find_imports((PACKAGE / file).read_text(), file) for file in FILES}
    ours = {
        file: {find_file(item.module) for item in items if item.module.partition(".")[0] == "gaudi_calib"} - {file}
        for file, items in imports.items()
    }
    assert find_circle(ours) == []


# Families are told apart by model_type, in families.py, and models in field.py, and nowhere else. "opt" is left out:
# it is also INC's word for the scale methods that search for the best scale.
NAMING = ("models/families.py", "models/field.py")
FAMILY_WORDS = sorted(
    {re.sub(r"\d+$", "", name).lower() for family in FAMILIES for name in (family.name, *family.model_types)} - {"opt"}
)
FAMILY_NAME = re.compile(rf"(?<![a-z])(?:{'|'.join(FAMILY_WORDS)})(?![a-z])", re.IGNORECASE)
PROSE = {"help", "epilog", "short_help", "metavar"}


def find_family_names(source: str) -> list[str]:
    """Return identifiers and string literals that contain a family's name; docstrings and option help are prose."""
    tree = ast.parse(source)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(id(node.value))
        if isinstance(node, ast.keyword) and node.arg in PROSE:
            prose.update(id(part) for part in ast.walk(node.value))
    words = [(node, word) for node in ast.walk(tree) if id(node) not in prose for word in _words_of(node)]
    return [f"line {getattr(node, 'lineno', '?')}: {word}" for node, word in words if FAMILY_NAME.search(word)]


def _words_of(node: ast.AST) -> list[str]:
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
            return [name]
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
            return [name]
    return []


@pytest.mark.parametrize("file", [file for file in FILES if file not in NAMING])
def test_only_families_knows_model_names(file: str) -> None:
    """Behaviour follows a row of facts, of a family or of the field's presets, never a name."""
    assert find_family_names((PACKAGE / file).read_text()) == []


def test_the_check_sees_family_names() -> None:
    """Literals and identifiers count, docstrings, option help and words that merely contain a name do not."""
    assert find_family_names('if model_type == "llama": pass') == ["line 1: llama"]
    assert find_family_names("is_deepseek_v3 = True") == ["line 1: is_deepseek_v3"]
    assert find_family_names('name = "x/Llama-3.1-8B"') == ["line 1: x/Llama-3.1-8B"]
    assert find_family_names('"""Like Mixtral."""\nf(help="as Qwen3 does")\nx = "philosophy"') == []


@pytest.mark.parametrize("file", FILES)
def test_files_are_rooms_not_halls(file: str) -> None:
    """A file over 400 lines is several rooms, and a name like `utils` says nothing."""
    path = PACKAGE / file
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "misc", "manager"}
