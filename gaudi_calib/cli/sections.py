"""Commands whose `--help` shows options in sections, each under the title its bundle names."""

from collections.abc import Callable
from typing import Any

import click

Function = Callable[..., Any]

_LAST = "Options"


class Option(click.Option):
    """An option that belongs to a section of `--help`, which shows its default."""

    def __init__(self, *names: Any, section: str = _LAST, **settings: Any):
        super().__init__(*names, **{"show_default": settings.get("default") is not None, **settings})
        self.section = section


class Command(click.Command):
    """A command that lists its options by section, in the order of the first option of each."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section per title; `--help` and what names no section come last, under "Options"."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", _LAST), []).append(record)
        for title in sorted(sections, key=lambda title: title == _LAST):
            with formatter.section(title):
                formatter.write_dl(sections[title])


def command(**settings: Any) -> Callable[[Function], Command]:
    """Return the decorator that makes a function a command, as `click.command` does."""
    return click.command(cls=Command, **settings)


def option(*names: str, **settings: Any) -> Function:
    """Return the decorator that adds an option, as `click.option` does; `bundle` says in which section."""

    def add(function: Function, **place: str) -> Function:
        return click.option(*names, cls=Option, **settings, **place)(function)

    return add


def bundle(*options: Function, **place: str) -> Function:
    """Return the decorator that adds `options` in this order; `section` is their title in `--help`."""

    def add(function: Function) -> Function:
        for decorate in reversed(options):
            function = decorate(function, **place)
        return function

    return add
