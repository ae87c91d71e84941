"""Every error of the package tells the user what, where, why and what to do next."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import gaudi_calib
from gaudi_calib import errors
from gaudi_calib.config.file import read_quant_config
from gaudi_calib.data.sources import read_rows
from gaudi_calib.errors import CalibrationError
from gaudi_calib.files import read_json

PACKAGE = Path(gaudi_calib.__file__).parent
TOLD = (errors.CalibrationError, errors.Finding)
ERROR_NAMES = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, TOLD)}


def find_error_calls(source: str) -> Iterator[ast.Call]:
    """Yield the calls in `source` of the errors, and of the findings, of `gaudi_calib.errors`."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == errors.__name__
        for alias in node.names
        if alias.name in ERROR_NAMES
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            by_name = isinstance(called, ast.Name) and called.id in imported
            by_module = isinstance(called, ast.Attribute) and ast.unparse(called.value).endswith("errors")
            if by_name or (by_module and called.attr in ERROR_NAMES):
                yield node


def has_fix(call: ast.Call) -> bool:
    """Whether a call passes a `fix` that is not literally empty; it is the fourth argument of a finding."""
    given = [*call.args[3:4], *(keyword.value for keyword in call.keywords if keyword.arg == "fix")]
    return any(not isinstance(value, ast.Constant) or bool(value.value) for value in given)


def test_every_error_of_the_package_says_how_to_fix_it() -> None:
    """No raise leaves the user without a next step."""
    calls = [(path, call) for path in PACKAGE.rglob("*.py") for call in find_error_calls(path.read_text())]
    lacking = [f"{path.relative_to(PACKAGE)}:{call.lineno}" for path, call in calls if not has_fix(call)]
    assert len(calls) > 80
    assert lacking == []


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ('DataError("a", fix="b")', [True]),
        ('DataError("a", fix=error.fix)', [True]),
        ('DataError("a", where="b")', [False]),
        ('DataError("a", fix=None)', [False]),
        ('Renamed("a")', [False]),
        ('errors.FileError("a")', [False]),
        ('click.UsageError("a")', []),
        ('Finding("a", "b", "c", "d")', [True]),
        ('Finding("a", "b", "c", "")', [False]),
        ('Finding("a", "b", why="c")', [False]),
    ],
    ids=["fix", "passed-on", "no-fix", "none", "alias", "by-module", "click", "finding", "empty", "finding-no-fix"],
)
def test_the_search_finds_errors_without_a_fix(call: str, expected: list[bool]) -> None:
    """The search knows our classes under any name, and no others."""
    source = f"from gaudi_calib.errors import DataError, FileError as Renamed, Finding\n{call}\n"
    assert [has_fix(found) for found in find_error_calls(source)] == expected


@pytest.mark.parametrize(
    ("details", "printed"),
    [
        ({"where": Path("a.csv"), "why": "b", "fix": "c"}, "what\n  where: a.csv\n  why:   b\n  fix:   c"),
        ({"fix": "c"}, "what\n  fix:   c"),
        ({"where": "a", "fix": "c"}, "what\n  where: a\n  fix:   c"),
        ({}, "what"),
    ],
    ids=["all", "fix-only", "no-why", "what-only"],
)
def test_an_error_prints_one_line_per_detail(details: dict[str, object], printed: str) -> None:
    """The details stand below what happened, aligned and in one order; those that do not apply are left out."""
    assert str(CalibrationError("what", **details)) == printed


@pytest.mark.parametrize(
    ("name", "content", "read", "fix"),
    [
        ("a.json", b"[{]", lambda path: read_rows(str(path)), "one list of objects"),
        ("a.csv", b'prompt\n"a"b\n', lambda path: read_rows(str(path)), '"a ""b"" c"'),
        ("a.parquet", b"no parquet", lambda path: read_rows(str(path)), ".jsonl"),
        ("a.jsonl.gz", b"no gzip", lambda path: read_rows(str(path)), "download it again"),
        ("a.pkl", b"no pickle", lambda path: read_rows(str(path)), "make it again"),
        (
            "a.json",
            json.dumps({"prompt": ["a", "b"], "text": ["c"]}).encode(),
            lambda path: read_rows(str(path)),
            "cell",
        ),
        ("a.jsonl", b'{"x": 1}\n', lambda path: read_rows(str(path), columns={"prompt": "y"}), "--column prompt="),
        ("a.jsonl", b'{"messages": [{"role": 1}]}\n', lambda path: read_rows(str(path)), '"content"'),
        ("quant.json", b"\xff\xfe{}", read_quant_config, "UTF-8"),
        ("absent/a.json", None, read_json, "exists"),
    ],
    ids=["json", "csv", "parquet", "gzip", "pickle", "columns", "column-option", "messages", "not-utf8", "missing"],
)
def test_a_bad_file_is_reported_with_all_four_parts(name: str, content: bytes | None, read, fix: str, tmp_path) -> None:
    """A file that cannot be used is named, with the reason and a next step that fits it."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert [line[:9] for line in lines[1:]] == ["  where: ", "  why:   ", "  fix:   "]
    assert str(path) in lines[1]
    assert fix in lines[3]
