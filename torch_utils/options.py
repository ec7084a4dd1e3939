"""Command line options that every command with weights has. Imports click only, so that `--help` is quick."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable)
CACHE_VARIABLE = "EPD_CACHE"


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
