"""What the commands have in common on the command line. Imports click only, so that `--help` is quick."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import click

from torch_utils.version import VERSION

F = TypeVar("F", bound=Callable)
CACHE_VARIABLE = "EPD_CACHE"
GENERAL = "General"  # the heading of options that have no other
EXIT_CODES = "Exit codes: 0 done; 1 a fault in the program; 2 a mistake in what was given, in one line; 130 Ctrl-C."


class Command(click.Command):
    """A click command that shows its options under headings."""

    groups: Mapping[str, Sequence[str]]  # heading -> names of its parameters

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading_of = {name: heading for heading, names in self.groups.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*self.groups, GENERAL)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and record[1]:  # an argument without help is in the usage line already
                rows[heading_of.get(parameter.name or "", GENERAL)].append(record)
        for heading, records in rows.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def command(
    groups: Mapping[str, Sequence[str]], help: str | None = None, exit_codes: str = EXIT_CODES
) -> Callable[[Callable], Command]:
    """Decorator that makes a command of a function with options, outermost: its options under headings, `--version`,
    defaults shown, exit codes at the end.

    groups: heading -> names of its parameters, in their order; the others come under GENERAL. help: the function's
    docstring where None.
    """
    settings = {"show_default": True, "max_content_width": 120}

    def make(function: Callable) -> Command:
        made = click.command(cls=Command, help=help, epilog=exit_codes, context_settings=settings)(function)
        made.groups = groups
        if not any("--version" in parameter.opts for parameter in made.params):  # score_hps chooses its model by it
            click.version_option(VERSION, message="epd-rdpo %(version)s")(made)
        return made

    return make


def cache_dir_option(command: F) -> F:
    """Give a click command `--cache-dir`, which sets the environment variable for this process and its children."""
    return click.option(
        "--cache-dir",
        help=f"Folder of everything that is downloaded; also by the environment variable {CACHE_VARIABLE}",
        metavar="DIR",
        show_default="~/.cache/epd",
        expose_value=False,
        callback=_use,
    )(command)


def _use(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        os.environ[CACHE_VARIABLE] = value
