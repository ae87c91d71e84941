"""Where the files of a run go."""

from pathlib import Path

import pytest

from gaudi_calib.errors import UsageError
from gaudi_calib.layout import RunLayout


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (".", "llama-8b"),
        ("./", "llama-8b"),
        ("./.", "llama-8b"),
        ("..", "models"),
        ("../", "models"),
        ("sub/..", "llama-8b"),
        ("../Llama-8B", "llama-8b"),
        ("../Llama-8B//", "llama-8b"),
        ("../Llama-8B/.", "llama-8b"),
        ("../Alias", "alias"),
        ("Org/Llama-8B", "llama-8b"),
        ("Org/..Llama", "..llama"),
        ("~", "home"),
    ],
)
def test_a_run_is_called_after_the_model_and_lies_inside_out(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the directory is spelled; a link keeps the name that it was given."""
    directory = tmp_path / "Models" / "Llama-8B"
    (directory / "sub").mkdir(parents=True)
    (directory.parent / "Alias").symlink_to(directory)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(tmp_path / "Home"))
    out = tmp_path / "out"
    assert RunLayout(out, model).root == out / name


@pytest.mark.parametrize("model", ["/", "//", "/..", "/.", ""])
def test_a_model_without_a_name_is_refused(model: str, tmp_path: Path) -> None:
    """Its files would lie in OUT itself, or beside it."""
    with pytest.raises(UsageError, match="a run cannot be called after the model"):
        _ = RunLayout(tmp_path, model).root
