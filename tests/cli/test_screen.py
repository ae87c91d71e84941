"""What people see while a command runs: its own lines, and nothing that libraries have to say."""

import re
from pathlib import Path

import pytest

from tests.support.processes import run_cli
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.torch

OWN_LINES = (
    r"Step \d/4: .+",
    r"\d+ prompts, \d+ tokens",
    r"measure: +\d+%\|.*\| [\d.]+k?/[\d.]+k? \[[^]]+\]",
)


def test_calibrate_shows_its_own_lines_alone(tmp_path: Path):
    """Neither transformers nor what it imports where it is installed (torchao, of which torch warns) is heard."""
    model = make_tiny_model("llama", tmp_path / "model", tokenizer=True, num_hidden_layers=5)
    # Fifths of three batches add up to more than all tokens, of which tqdm would warn.
    command = ["calibrate", "-m", model, "-d", "builtin", "-o", tmp_path / "out", "-b", 1, "--min-tokens", 64]
    child = run_cli(*command, "-l", 3, "--max-tokens", 64)
    assert child.returncode == 0, child.stderr
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", child.stderr) if line.strip()]
    assert [line for line in lines if not any(re.fullmatch(own, line) for own in OWN_LINES)] == []
    assert lines[0] == "Step 1/4: Prepare prompts" and any(line.startswith("measure: 100%") for line in lines)
