"""Write docs/cli.md from the commands' own `--help`; with --check only compare.

Usage: python docs/generate_cli.py [--check]
"""

import sys
from pathlib import Path

import click

from gaudi_calib.cli.main import PROGRAM, cli

REFERENCE = Path(__file__).with_name("cli.md")
HEADER = f"""# Command line reference

Generated from `{PROGRAM} COMMAND --help` by `make docs`; do not edit.
"""


def render_reference() -> str:
    """Return the whole reference as Markdown: the program, then each command in the order of help."""
    return "\n".join([HEADER, *_render_command(cli, None, PROGRAM, level=2)])


def _render_command(command: click.Command, parent: click.Context | None, name: str, *, level: int) -> list[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    # A fixed width, so that the result does not depend on the terminal.
    context.terminal_width = 100
    formatter = click.HelpFormatter(width=100)
    command.format_help(context, formatter)
    parts = [f"{'#' * level} {context.command_path}\n\n```text\n{formatter.getvalue().rstrip()}\n```\n"]
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            if child is not None:
                parts += _render_command(child, context, child_name, level=level + 1 if parent else 2)
    return parts


def main(arguments: list[str]) -> int:
    """Write the reference, or with `--check` fail when the file is not what would be written."""
    text = render_reference()
    if arguments != ["--check"]:
        REFERENCE.write_text(text)
        return 0
    if REFERENCE.is_file() and REFERENCE.read_text() == text:
        return 0
    print(f"{REFERENCE.name} is out of date: run `make docs` and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
