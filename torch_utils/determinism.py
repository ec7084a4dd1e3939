"""Sums that are added up in the same order every time, so that the same call gives the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


class NoFixedOrder(RuntimeError):
    """An operation adds up in whatever order its threads end; the message names it."""


def prepare() -> None:
    """To be called before the first matrix product on a GPU: without this variable PyTorch refuses `fixed_order`.

    32 MiB a process, as much as PyTorch gives to cuBLAS on H100 and H200 anyway.
    """
    os.environ.setdefault(WORKSPACE_VARIABLE, ":4096:8")


@contextlib.contextmanager
def fixed_order() -> Iterator[None]:
    """PyTorch chooses kernels that add up in a fixed order; afterwards all is as before.

    By default those of attention's gradients, for one, do not. Raises `NoFixedOrder` where an operation has no other.
    """
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # a help to find reads of what was never written, which costs time
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise NoFixedOrder(str(error).split(", but")[0]) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]
