"""The one exception family for mistakes that the user can correct."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """A mistake in the user's input or files: one line that says what is wrong, where, and what to do."""


class UserErrorExit(click.ClickException):
    """A `UserError` on its way out of a command: `Error: <one line>` on stderr, exit code 2."""

    exit_code = 2


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator for the body of a click command (innermost): a `UserError` ends it without a traceback, exit code 2."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            raise UserErrorExit(" ".join(str(error).split())) from error

    return wrapper
