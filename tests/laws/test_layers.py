"""The house: who may import what, and who may know a model's name (docs/design.md draws the table)."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

import gaudi_calib
from gaudi_calib.models.families import FAMILIES

PACKAGE = Path(gaudi_calib.__file__).parent
MODULES = sorted(str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*.py"))
ANY = frozenset({"*"})


@dataclass(frozen=True)
class Room:
    """One room of the house: modules that belong together.

    Attributes:
        row: a room imports from itself and from rooms of lower rows, never from another room of its own row.
        name: as errors call it.
        patterns: its modules, as file patterns inside the package.
        at_import: third-party packages its modules may load when they are imported.
        in_functions: further ones they may load inside functions.
        is_heavy: loads torch; lighter rooms import it inside functions only.
    """

    row: int
    name: str
    patterns: tuple[str, ...]
    at_import: frozenset[str] = frozenset()
    in_functions: frozenset[str] = frozenset()
    is_heavy: bool = False


DATA_LIBRARIES = frozenset({"pandas", "datasets", "transformers", "pyarrow", "jinja2"})
NUMPY, PYDANTIC, TORCH = frozenset({"numpy"}), frozenset({"pydantic"}), frozenset({"torch", "numpy"})
BASE = ("__init__.py", "errors.py", "fp8.py", "files.py", "layout.py", "redaction.py")
HOUSE = (
    Room(0, "base", BASE),
    Room(1, "models", ("models/*.py",), in_functions=frozenset({"huggingface_hub"})),
    Room(2, "config", ("config/*.py",), PYDANTIC),
    Room(2, "manifest", ("manifest.py",), PYDANTIC),
    Room(3, "ranges", ("ranges/*.py",), NUMPY),
    Room(4, "scales", ("scales/*.py",), NUMPY),
    Room(4, "rankfiles", ("rankfiles/*.py",), NUMPY, frozenset({"safetensors"})),
    Room(4, "data", ("data/*.py",), NUMPY, DATA_LIBRARIES),
    Room(5, "directory", ("directory.py",)),
    Room(5, "checkpoints", ("checkpoints/*.py",), TORCH | {"safetensors"}, is_heavy=True),
    Room(5, "engines", ("engines/__init__.py", "engines/detect.py")),
    Room(6, "observe", ("engines/observe/*.py",), TORCH, frozenset({"transformers"}), is_heavy=True),
    Room(7, "torch", ("engines/torch/*.py",), TORCH, frozenset({"transformers"}), is_heavy=True),
    Room(7, "vllm_runner", ("engines/vllm_runner/*.py",), in_functions=frozenset({"vllm", "ray"})),
    Room(7, "vllm_plugin", ("engines/vllm_plugin/*.py",), TORCH | {"vllm"}, is_heavy=True),
    Room(8, "runs", ("runs/*.py",), NUMPY, frozenset({"tqdm"})),
    Room(9, "serve", ("serve/*.py",)),
    Room(10, "cli", ("cli/*.py", "__main__.py"), frozenset({"click"})),
)


@dataclass(frozen=True)
class Import:
    """One imported module of a file.

    Attributes:
        module: absolute dotted name.
        line: where.
        when: `import` (module level), `call` (inside a function) or `types` (under TYPE_CHECKING).
    """

    module: str
    line: int
    when: str


def find_room(file: str) -> Room | None:
    """Return the room of a file given inside the package (`ranges/node.py`), None if no room, or several, have it."""
    rooms = [room for room in HOUSE if any(fnmatch(file, pattern) for pattern in room.patterns)]
    rooms = [] or rooms
    return rooms[0] if len(rooms) == 1 else None


def find_imports(source: str, file: str) -> list[Import]:
    """Return what the file imports, `from package import module` as the module where there is one."""
    package = ["gaudi_calib", *Path(file).parent.parts]
    return list(_walk(ast.parse(source), package, "import"))


def _walk(node: ast.AST, package: list[str], when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) + 1 - child.level] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            yield from (Import(_full_name(module, alias.name), child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, package, "call")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(ast.Module(child.body, []), package, "types")
            yield from _walk(ast.Module(child.orelse, []), package, when)
        else:
            yield from _walk(child, package, when)


def _full_name(module: str, name: str) -> str:
    if module.partition(".")[0] != "gaudi_calib":
        return module
    path = PACKAGE.joinpath(*module.split(".")[1:], name)
    return f"{module}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else module


def _file_of(module: str) -> str:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return str((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(PACKAGE))


def find_violations(source: str, file: str) -> list[str]:
    """Return one sentence per import of `file` (inside the package) that the house forbids."""
    room = find_room(file)
    assert room is not None, f"{file} is in no room of HOUSE"
    found = []
    for item in find_imports(source, file):
        top = item.module.partition(".")[0]
        if top == "gaudi_calib":
            target = find_room(_file_of(item.module))
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


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_exactly_one_room(module: str) -> None:
    """A new file must be given a room of the house before it can be merged."""
    assert find_room(str(Path(*Path(module).parts[1:]))) is not None, f"add {module} to HOUSE in {__file__}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_room_or_lower_rows(module: str) -> None:
    """No import points upward, and no row loads a library it may not."""
    file = str(Path(*Path(module).parts[1:]))
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


# Families are told apart by model_type, in families.py and nowhere else. "opt" is left out: it is
# also INC's word for the scale methods that search for the best scale.
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


@pytest.mark.parametrize("module", [name for name in MODULES if name != "gaudi_calib/models/families.py"])
def test_only_families_knows_model_names(module: str) -> None:
    """Behaviour follows a family's row of facts, never its name."""
    assert find_family_names((PACKAGE.parent / module).read_text()) == []


def test_the_check_sees_family_names() -> None:
    """Literals and identifiers count, docstrings, option help and words that merely contain a name do not."""
    assert find_family_names('if model_type == "llama": pass') == ["line 1: llama"]
    assert find_family_names("is_deepseek_v3 = True") == ["line 1: is_deepseek_v3"]
    assert find_family_names('name = "x/Llama-3.1-8B"') == ["line 1: x/Llama-3.1-8B"]
    assert find_family_names('"""Like Mixtral."""\nf(help="as Qwen3 does")\nx = "philosophy"') == []


@pytest.mark.parametrize("module", MODULES)
def test_files_are_rooms_not_halls(module: str) -> None:
    """A file over 400 lines is several rooms, and a name like `utils` says nothing."""
    path = PACKAGE.parent / module
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "misc", "manager"}
