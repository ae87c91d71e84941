"""The house: the rooms of the package, and what its modules import (docs/design.md draws the table)."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import gaudi_calib

PACKAGE = Path(gaudi_calib.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


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
BASE = ("__init__.py", "errors.py", "fp8.py", "files.py", "staging.py", "layout.py", "redaction.py")
HOUSE = (
    Room(0, "base", BASE),
    Room(1, "models", ("models/*.py",), in_functions=frozenset({"huggingface_hub"})),
    Room(1, "unpickle", ("unpickle.py",), NUMPY),
    Room(2, "config", ("config/*.py",), PYDANTIC),
    Room(2, "manifest", ("manifest.py",), PYDANTIC),
    Room(3, "ranges", ("ranges/*.py",), NUMPY),
    Room(4, "scales", ("scales/*.py",), NUMPY),
    Room(4, "rankfiles", ("rankfiles/*.py",), NUMPY, frozenset({"safetensors"})),
    Room(4, "data", ("data/*.py",), NUMPY, DATA_LIBRARIES),
    Room(5, "directory", ("advice.py", "directory.py", "gaps.py", "moved.py", "provenance.py", "rank_directory.py")),
    Room(5, "checkpoints", ("checkpoints/*.py",), TORCH | {"safetensors"}, is_heavy=True),
    Room(5, "engines", ("engines/__init__.py", "engines/detect.py")),
    Room(6, "observe", ("engines/observe/*.py",), TORCH, frozenset({"transformers"}), is_heavy=True),
    Room(7, "torch", ("engines/torch/*.py",), TORCH, frozenset({"transformers"}), is_heavy=True),
    Room(7, "vllm_runner", ("engines/vllm_runner/*.py",), in_functions=frozenset({"vllm", "ray"})),
    Room(7, "vllm_plugin", ("engines/vllm_plugin/*.py",), TORCH | {"vllm"}, is_heavy=True),
    Room(8, "runs", ("runs/*.py",), NUMPY, frozenset({"tqdm"})),
    Room(9, "check", ("check/*.py",), NUMPY),
    Room(9, "serve", ("serve/*.py",), in_functions=frozenset({"yaml"})),
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


def find_file(module: str) -> str:
    """Return the file of a module of the package, given inside the package."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return str((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(PACKAGE))
