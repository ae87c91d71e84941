"""`gaudi-calib`: the group of commands, how errors are printed and with which exit code.

A command's module is imported when that command is asked for. Command modules load
click alone at import (everything else inside the command), so that `--help` and a
mistyped flag answer at once: no torch, transformers, datasets, pandas or vllm.

Exit codes: 0 done, 1 failed or findings, 2 usage, 130 interrupted, 143 and 129 ended by SIGTERM
and SIGHUP. The scripts/ share them through `report_errors`.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module

import click

from gaudi_calib import __version__
from gaudi_calib.cli.process import Ended, orderly_ends, print_utf8, use_utf8
from gaudi_calib.errors import CalibrationError

PROGRAM = "gaudi-calib"

_COMMAND_OR_FLAG = re.compile(rf"{PROGRAM} [^`;\n]*|(?<![\w/-])--?[a-z][a-z-]*")

_TWICE = re.compile(r"('--?[\w-]+') / \1")

# In the order help lists them; each is a function of its name in a module of its name.
COMMANDS = (
    *("calibrate", "prepare", "measure", "postprocess", "unify", "expand", "merge", "reshard", "quantize", "relocate"),
    *("check", "diff", "serve", "convert-weights", "config", "detect"),
)


class LazyGroup(click.Group):
    """A click group whose commands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command called `cmd_name`, or None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        return getattr(import_module(f"gaudi_calib.cli.{name}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest name (click suggests only for options here)."""
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"`{PROGRAM} --help` lists the commands."
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"`{PROGRAM} COMMAND --help` describes a command and shows an example.",
)
@click.version_option(__version__, "--version", prog_name=PROGRAM)
@click.option("-v", "--verbose", is_flag=True, help="Log details, and show the traceback of an unexpected error.")
def cli(verbose: bool) -> None:
    """Calibrate language models for FP8 inference on Intel Gaudi 2 and Gaudi 3.

    Results go to stdout, logs and progress to stderr.
    """
    set_up_logging(logging.DEBUG if verbose else logging.INFO)


def set_up_logging(level: int) -> None:
    """Send this package's log records of `level` and above to stderr; of libraries only errors, unless debugging."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter())
    others = logging.WARNING if level <= logging.DEBUG else logging.ERROR
    logging.basicConfig(level=others, handlers=[handler], force=True)
    logging.getLogger("gaudi_calib").setLevel(level)


class _LogFormatter(logging.Formatter):
    """Plain text for information, `Warning: text` for what needs attention."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.capitalize()}: {text}"


def main(arguments: Sequence[str] | None = None, *, flags: Mapping[str, str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after the program's name; None takes them from `sys.argv`.
        flags: see `report_errors`.

    >>> main(["no-such-command"])
    2
    """
    if arguments is None:
        use_utf8()
    return report_errors(lambda: cli.main(args=arguments, prog_name=PROGRAM, standalone_mode=False), flags=flags)


def report_errors(call: Callable[[], object], *, flags: Mapping[str, str] | None = None) -> int:
    """Return the exit code of `call`, which returns one or None; print what it raises on stderr.

    Args:
        flags: our flags to those of the script that calls, for what errors advise.
    """
    print_utf8()
    try:
        with orderly_ends():
            result = call()
    except Ended as error:
        return _fail(f"ended by {error}; files written before this run are as they were", exit_code=128 + error.number)
    except click.exceptions.Abort:
        return _fail("interrupted; files written before this run are as they were", exit_code=130)
    except click.ClickException as error:
        if flags:
            return _fail(respell(error.format_message(), flags), exit_code=error.exit_code)
        error.show()
        return error.exit_code
    except CalibrationError as error:
        return _fail(respell(str(error), flags or {}), exit_code=error.exit_code)
    except OSError as error:  # of the machine: a full disk, a file that may not be read
        logging.getLogger("gaudi_calib").debug("the traceback:", exc_info=error)
        why = f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
        fix = "make room, or see to it that you may read and write there"
        return _fail(str(CalibrationError("cannot read or write", why=why, fix=fix)), exit_code=1)
    except Exception as error:
        logging.getLogger("gaudi_calib").debug("the traceback:", exc_info=error)
        return _fail(
            f"unexpected {type(error).__name__}: {error}\n"
            f"  fix:   `{PROGRAM} -v COMMAND ...` shows the traceback; please report it with the command you ran",
            exit_code=1,
        )
    return result if isinstance(result, int) else 0


def respell(text: str, flags: Mapping[str, str]) -> str:
    """Return `text` with flags spelled as `flags` says, but for those of commands of this program.

    Names of one option that become the same are one.

    >>> respell("pass --max-tokens 8 or -l 3, or run `gaudi-calib prepare -l 3`", {"-l": "--samples"})
    'pass --max-tokens 8 or --samples 3, or run `gaudi-calib prepare -l 3`'
    """
    return _TWICE.sub(r"\1", _COMMAND_OR_FLAG.sub(lambda found: flags.get(found[0], found[0]), text))


def _fail(message: str, *, exit_code: int) -> int:
    click.echo(f"Error: {message}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
