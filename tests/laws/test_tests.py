"""The tests mirror the package, share through `tests/support`, and say what they need."""

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import gaudi_calib
from tests.support import paths

PACKAGE, TESTS = Path(gaudi_calib.__file__).parent, paths.ROOT / "tests"
MODULES = sorted(path.relative_to(paths.ROOT).as_posix() for path in TESTS.rglob("test_*.py"))
NOT_OF_A_ROOM = {"laws", "support", "oracles", "golden"}
MARKERS = {"vllm*": "vllm", "neural_compressor*": "inc", "ray*": "ray"}
MARKERS |= {"mistral_common*": "vllm", "compressed_tensors*": "vllm", "openai*": "vllm"}  # come with vLLM
MARKERS |= {"tests.support.tiny.*": "torch", "tests.support.reference*": "torch", "tests.support.calibrated*": "torch"}
MARKERS |= {"tests.oracles.vllm_*": "vllm", "tests.oracles.inc_*": "inc"}


def find_imports(tree: ast.AST) -> Iterator[str]:
    """Yield what is imported, as a dotted name, and what is asked for by importorskip."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            yield ast.literal_eval(node.args[0])


def find_borrowed(source: str) -> list[str]:
    """Return what a test module imports from test modules."""
    return [name for name in find_imports(ast.parse(source)) if name.startswith("tests.") and ".test_" in name]


def find_marks(node: ast.AST) -> set[str]:
    """Return the names of `pytest.mark.NAME` in a piece of code."""
    words = {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return {mark for mark in MARKERS.values() if f"pytest.mark.{mark}" in words}


def find_unmarked(source: str) -> list[str]:
    """Return a sentence for every test, or module, that loads what `make check` lacks and has no mark that says so.

    A fixture needs no mark: the tests that use it do, as with `tiny_model`.
    """
    tree = ast.parse(source)
    of_module = {
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in find_marks(node.value)
    }
    found = []
    for node in tree.body:
        is_function = isinstance(node, ast.FunctionDef)
        if is_function and any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        marks = of_module.union(*map(find_marks, node.decorator_list)) if is_function else of_module
        for name in find_imports(node):
            wanted = {mark for pattern, mark in MARKERS.items() if fnmatch(name, pattern)}
            found += [f"{name} needs the mark {mark}" for mark in sorted(wanted - marks)]
        if is_function and any(argument.arg == "tiny_model" for argument in node.args.args) and "torch" not in marks:
            found.append("tiny_model needs the mark torch")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_test_imports_a_test(module: str) -> None:
    """What two test modules need is in tests/support."""
    assert find_borrowed((paths.ROOT / module).read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_what_a_test_needs_is_marked(module: str) -> None:
    """`make check` runs what has no mark, where neither vLLM nor INC nor Ray is installed."""
    assert find_unmarked((paths.ROOT / module).read_text()) == []


def test_directories_of_tests_mirror_the_rooms() -> None:
    """A directory is called as a room, a module beside them as one of the package's own."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    directories = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.rglob("*.*"))} - {"__pycache__"}
    assert directories - NOT_OF_A_ROOM <= rooms
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")} <= modules
    misplaced = [name for name in MODULES if Path(name).parent.name in NOT_OF_A_ROOM - {"laws"}]
    assert misplaced == []


def test_every_mark_is_registered() -> None:
    """The marks that this law knows are those that pytest knows."""
    options = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {text.partition(":")[0] for text in options["markers"]} == set(MARKERS.values())


@pytest.mark.parametrize(
    ("source", "borrowed", "unmarked"),
    [
        ("from tests.runs.test_unify import LAYER", ["tests.runs.test_unify.LAYER"], []),
        ("from tests.support.topologies import LAYER", [], []),
        ("from vllm import LLM", [], ["vllm.LLM needs the mark vllm"]),
        ("pytestmark = pytest.mark.vllm\nfrom vllm import LLM", [], []),
        ("pytestmark = [pytest.mark.torch, pytest.mark.vllm]\nimport vllm.envs", [], []),
        ("pytestmark = pytest.mark.torch\nimport vllm.envs", [], ["vllm.envs needs the mark vllm"]),
        ("def test_a():\n    pytest.importorskip('ray')", [], ["ray needs the mark ray"]),
        ("@pytest.mark.ray\ndef test_a():\n    pytest.importorskip('ray')", [], []),
        ("def test_a(tiny_model): pass", [], ["tiny_model needs the mark torch"]),
        ("from tests.support.tiny_tokenizer import save_tokenizer", [], []),
        ("@pytest.fixture\ndef a():\n    import ray", [], []),
        (
            "from tests.oracles.inc_scales import IncScales",
            [],
            ["tests.oracles.inc_scales.IncScales needs the mark inc"],
        ),
    ],
)
def test_the_laws_see_what_breaks_them(source: str, borrowed: list[str], unmarked: list[str]) -> None:
    """Each way of breaking them is found, and what obeys is let through."""
    assert (find_borrowed(source), find_unmarked(source)) == (borrowed, unmarked)
