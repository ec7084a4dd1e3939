"""The one exception family for mistakes that the user can correct."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")


# What a system says that refuses to write or read: full disks, quotas, limits and permissions; a folder where a file
# should be, or the other way round; a disk or its server that fails.
REFUSALS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.EIO, errno.ESTALE),
)


class UserError(ValueError):
    """A mistake in the user's input or files: one line that says what is wrong, where, and what to do."""


class UserErrorExit(click.ClickException):
    """A `UserError` on its way out of a command: `Error: <one line>` on stderr, exit code 2."""

    exit_code = 2


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator for the body of a click command (innermost): a `UserError` ends it without a traceback, exit code 2.

    So do a file system that refuses, and text that the locale's encoding does not have, wherever they come up. Ctrl-C
    ends it with exit code 130.
    """

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            line = " ".join(str(error).split())  # which may quote a file, with codes that a terminal would obey
            raise UserErrorExit("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)) from error
        except KeyboardInterrupt as error:
            click.echo("Interrupted", err=True)
            raise click.exceptions.Exit(130) from error
        except UnicodeEncodeError as error:
            text = ascii(error.object)[:200]
            raise UserErrorExit(
                f"{text} cannot be written in {error.encoding}, the encoding of this locale: set PYTHONUTF8=1"
            ) from error
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise UserErrorExit(
                f"{place}{error.strerror}; what was finished is kept, mend that and start again"
            ) from error

    return wrapper
