"""The command line as a user meets it: help, errors, exit codes and what it loads."""

import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from gaudi_calib import errors
from gaudi_calib.cli import main as cli_main
from gaudi_calib.cli.main import COMMANDS, cli, main
from gaudi_calib.cli.options import PathOrNameType, PathType
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


def find_sections(text: str) -> dict[str, list[str]]:
    """Return the long options by title of their section, as `--help` shows them."""
    parts = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^  .*?(--[a-z][a-z-]*)", body, re.MULTILINE) for title, body in zip(parts[::2], parts[1::2])
    }


def test_help_of_many_options_is_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    """The thirty options of `calibrate` are found by what they are about; no option is lost on the way."""
    assert main(["calibrate", "--help"]) == 0
    sections = find_sections(capsys.readouterr().out)
    titles = ["Model and output", "What will serve", "Dataset", "Measuring", "vLLM engine", "Scales", "Options"]
    assert [title for title, options in sections.items() if options] == titles
    assert sections["Scales"] == ["--scale-method", "--config-quant"]
    assert sections["Options"] == ["--json", "--dry-run", "--help"]
    shown = {option for options in sections.values() for option in options}
    assert shown == {next(opt for opt in param.opts if opt[:2] == "--") for param in LEAVES["calibrate",].params} | {
        "--help"
    }


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_path_of_every_command_knows_a_home(words: tuple[str, ...]) -> None:
    """Paths are of our type, which expands `~`; so are models and datasets, which may be names."""
    for parameter in LEAVES[words].params:
        assert isinstance(parameter.type, PathType) or not isinstance(parameter.type, click.Path), parameter.name
        if parameter.name in ("model", "dataset"):
            assert isinstance(parameter.type, PathType | PathOrNameType), parameter.name


def test_output_is_one_word_everywhere() -> None:
    """Every command that writes says -o/--output."""
    spelled = {words: param.opts for words, command in LEAVES.items() for param in command.params if "-o" in param.opts}
    assert {tuple(opts) for opts in spelled.values()} == {("-o", "--output")}
    assert {words[0] for words in spelled} >= {"calibrate", "prepare", "unify", "merge", "reshard", "config"}


@pytest.mark.parametrize(
    "command", [["postprocess"], ["unify", "-r", "1"], ["expand", "-w", "4"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize(
    ("words", "message"),
    [([], "DIR is missing"), (["{0}", "-m", "{0}"], "leave one of them out"), (["{0}/none"], "does not exist")],
    ids=["neither", "both", "not there"],
)
def test_a_directory_is_given_once(
    command: list[str], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DIR, or -m in its place: neither and both are mistakes of usage that say what to do."""
    assert main([*command, *(word.format(tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_minus_m_is_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`-m DIR` does what `DIR` does, and without -o results go there, too."""
    ranks = paths.GOLDEN / "llama-tiny" / "tp2" / "g2"
    (source := tmp_path / "g2").mkdir()
    for file in ranks.glob("*_2*"):
        (source / file.name).write_bytes(file.read_bytes())
    assert main(["unify", str(source), "-r", "1", "-o", str(tmp_path / "out")]) == 0
    assert main(["unify", "-m", str(source), "-r", "1"]) == 0
    name = "inc_output_hooks_maxabs_0_1.npz"
    assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def find_defaults() -> dict[str, dict[str, object]]:
    """Return, by command, the defaults of the Python call behind it."""
    from gaudi_calib.data.prompts import prepare_prompts
    from gaudi_calib.engines.vllm_runner.phases import EngineOptions
    from gaudi_calib.runs.options import RunOptions
    from gaudi_calib.serve.command import ServeOptions

    def defaults(call: Callable[..., object]) -> dict[str, object]:
        parameters = inspect.signature(call).parameters.values()
        return {item.name: item.default for item in parameters if item.default is not item.empty}

    prompts = defaults(prepare_prompts)
    run = {**defaults(EngineOptions), **prompts, **defaults(RunOptions)}
    return {"prepare": prompts, "calibrate": run, "measure": run, "quantize": run, "serve": defaults(ServeOptions)}


@pytest.mark.parametrize("command", ["prepare", "calibrate", "measure", "quantize", "serve"])
def test_defaults_are_those_of_the_python_call(command: str) -> None:
    """What an option is when it is left out is what the Python call takes when it is not told."""
    defaults = find_defaults()[command]
    options = {param.name: param.default for param in LEAVES[command,].params if isinstance(param, click.Option)}
    told = {name: default for name, default in options.items() if name in defaults and isinstance(default, int | str)}
    assert told == {name: defaults[name] for name in told}
    assert told


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Commands are listed in the order of COMMANDS, each with a line of help."""
    main(["--help"])
    assert re.findall(r"^  ([a-z-]+) +\S", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE) == [
        *COMMANDS
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "gaudi_calib" / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_no_command_is_forgotten(path: Path) -> None:
    """A module of cli/ that defines a command is registered."""
    if re.search(r"^@(click\.)?(command|group)\(", path.read_text(), re.MULTILINE) and path.stem != "main":
        assert path.stem.replace("_", "-") in COMMANDS


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
