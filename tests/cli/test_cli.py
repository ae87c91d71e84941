"""The command line as a user meets it: help, errors, exit codes and what it loads."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest

from gaudi_calib import errors
from gaudi_calib.cli import main as cli_main
from gaudi_calib.cli.main import COMMANDS, cli, main
from tests.support import paths
from tests.support.processes import run_cli

ROOT = paths.ROOT
HEAVY = ("torch", "transformers", "datasets", "pandas", "vllm", "neural_compressor")


def find_commands(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Return every command that is not a group, by its words on the command line."""
    context = click.Context(group)
    commands: dict[tuple[str, ...], click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, f"{name} is listed and cannot be loaded"
        if isinstance(command, click.Group):
            commands.update(find_commands(command, (*path, name)))
        else:
            commands[(*path, name)] = command
    return commands


LEAVES = find_commands(cli)


def raising(error: BaseException) -> click.Command:
    """Return a command that raises `error`."""

    @click.command()
    def fail() -> None:
        raise error

    return fail


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Put a command `measure` in place that raises the given error."""

    def install(error: BaseException) -> None:
        monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: raising(error))

    return install


@pytest.mark.parametrize("arguments", [["--help"], *([*words, "--help"] for words in LEAVES)], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    """Asking for help costs no import of torch, transformers, datasets, pandas, vllm or INC."""
    code = (
        "import sys\nfrom gaudi_calib.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stderr.strip() == "[]"
    assert result.stdout.startswith("Usage: gaudi-calib")


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_help_and_an_example(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` says what a command does, what each option means, and shows a line to copy."""
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert LEAVES[words].get_short_help_str()
    assert re.search(rf"^\s*(Example: |\$ )?(\S+=\S+ )*gaudi-calib {' '.join(words)}\b", text, re.MULTILINE), (
        "no example"
    )
    silent = [
        option.name
        for option in LEAVES[words].params
        if isinstance(option, click.Option) and not option.help and not option.hidden
    ]
    assert silent == [], "options without help"


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_short_help_flag_is_the_long_one(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """`-h` never wants an argument."""
    assert main([*words, "--help"]) == 0
    long = capsys.readouterr().out
    assert main([*words, "-h"]) == 0
    assert capsys.readouterr().out == long


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands are listed in the order of COMMANDS, each with a line of help."""
    main(["--help"])
    assert re.findall(r"^  ([a-z-]+) +\S", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE) == [
        *COMMANDS
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "gaudi_calib" / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_no_command_is_forgotten(path: Path) -> None:
    """A module of cli/ that defines a command is registered."""
    if re.search(r"^@click\.(command|group)\(", path.read_text(), re.MULTILINE) and path.stem != "main":
        assert f"gaudi_calib.cli.{path.stem}:{path.stem}" in COMMANDS.values()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the package's version on stdout."""
    from gaudi_calib import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[-1] == __version__


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["calibrat"], "Did you mean 'calibrate'?"),
        (["qantize"], "Did you mean 'quantize'?"),
        (["xyzzy"], "`gaudi-calib --help` lists the commands."),
        (["--verbos", "detect"], "--verbose"),
        (["detect", "--jsn"], "--json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_misspelt_word_gets_the_nearest_one(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong command or option exits with 2, nothing on stdout, and names what was probably meant."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert hint in captured.err


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command the usage is shown and the exit code says that nothing was done."""
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(errors.RangeError, 1), (errors.UsageError, 2)],
    ids=["failed", "usage"],
)
def test_an_error_says_what_where_why_and_how_to_fix(
    error: type[errors.CalibrationError], exit_code: int, failing, capsys: pytest.CaptureFixture[str]
) -> None:
    """A calibration error is printed as four lines on stderr and sets its exit code."""
    failing(error("a", where="b", why="c", fix="d"))
    assert main(["measure"]) == exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Error: a\n  where: b\n  why:   c\n  fix:   d\n")


@pytest.mark.parametrize("flags", [[], ["-v"]], ids=["quiet", "verbose"])
def test_an_unexpected_error_shows_its_traceback_only_when_asked(
    flags: list[str], failing, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bug of ours is one line and a hint; `-v` adds the traceback."""
    failing(ZeroDivisionError("by zero"))
    assert main([*flags, "measure"]) == 1
    text = capsys.readouterr().err
    assert "Error: unexpected ZeroDivisionError: by zero" in text
    assert "gaudi-calib -v COMMAND" in text
    assert ("Traceback" in text) == bool(flags)


def test_interrupting_exits_with_130(failing, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is no error of the program: no traceback, the shell's code."""
    failing(KeyboardInterrupt())
    assert main(["measure"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_module_is_the_command() -> None:
    """`python -m gaudi_calib` does what `gaudi-calib` does, exit code included."""
    result = run_cli("nonsense", cwd=ROOT)
    assert result.returncode == 2
    assert "No such command 'nonsense'" in result.stderr


def test_the_cli_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/cli.md is generated from the commands' own help; `make docs` renews it."""
    generate_cli = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))
    assert generate_cli["main"](["--check"]) == 0, capsys.readouterr().err
