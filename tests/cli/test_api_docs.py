"""docs/api.md: a section per command, and its blocks run."""

import ast
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from gaudi_calib.cli.main import cli
from tests.support.paths import GOLDEN, ROOT

TEXT = (ROOT / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
RUNNABLE = [block for block in BLOCKS if not block.startswith("# needs vLLM")]


def list_commands(group: click.Group, prefix: str = "") -> Iterator[str]:
    """Yield the words of every command that is no group."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from list_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_has_a_section_with_code() -> None:
    """A new command must say which Python call it is."""
    sections = re.split(r"^## `(.+)`$", TEXT, flags=re.MULTILINE)[1:]
    with_code = {name for name, body in zip(sections[::2], sections[1::2], strict=True) if "```python" in body}
    assert with_code == set(list_commands(cli))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_every_name_can_be_imported(block: str) -> None:
    """What a block imports is there."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            assert all(import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.torch
def test_the_blocks_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who copies the page gets what it says."""
    from tests.support.tiny import make_tiny_model

    make_tiny_model("llama", tmp_path / "llama")
    shutil.copytree(GOLDEN / "deepseek-v3-fp8-tiny" / "model", tmp_path / "model-fp8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in RUNNABLE:
        exec(compile(block, "docs/api.md", "exec"), names)
    for directory in ("out/llama/g2", "unified/g3", "expanded/g3", "both/llama/g3", "postprocessed/g2", "model-fp8-g2"):
        assert any((tmp_path / directory).iterdir()), directory
    assert names["planned"]
    assert {str(path) for path in names["planned"]} >= {str(path) for path in names["result"].files}  # type: ignore[attr-defined]
