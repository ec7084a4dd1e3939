"""What the tests that start process groups share."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
TESTS = Path(__file__).resolve().parent


def python_path() -> str:
    """PYTHONPATH by which a program anywhere finds the project and what the tests share, and what is found already."""
    return os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")]))


def torchrun(ranks: int) -> list[str]:
    """What comes between `python` and the program for so many processes: nothing for one."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
