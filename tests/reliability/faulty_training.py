"""The toy run with one fault, as a program:

    faulty_training.py PHASE STEP RANK SIGNAL FOLDER DEVICE CONFIG auto|never|RUN_DIR [override ...]

In step STEP rank RANK sends itself SIGNAL (KILL, STOP, ...) in the middle of PHASE, once: FOLDER/fault then says when.
FOLDER/starts has a line with the time for every start of a process.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from toy_training import ToyDenoiser, ToyReward, run_toy

from torch_utils import checkpoint, distributed
from training.ppo.policy import EPDParamPolicy
from training.ppo.ppo_trainer import PPOTrainer
from training.ppo.rdpo import RDPO

# Where a phase can be interrupted: what holds a function, and its name.
PHASES = {
    "rollout": (ToyDenoiser, "slope"),
    "reward": (ToyReward, "score"),
    "update": (RDPO, "_optimize"),
    "gather": (distributed, "all_gather"),
    "save": (checkpoint.os, "replace"),
    "end": (distributed, "shutdown"),
}
# The same for backward passes: the fault comes when the gradient of what the function gave is known, and no other yet.
BACKWARD = {
    "backward": (EPDParamPolicy, "all_rows"),  # to the weights: rdpo's loss, or pathwise's table
    "gradients": (ToyDenoiser, "slope"),  # pathwise: of the images to their tables, in the last interval
}


def started() -> float:
    """When this process began, in seconds since 1970: long before its imports are done."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


class Fault:
    """Strikes at the phase's first call, or first gradient, in the step."""

    def __init__(self, phase: str, step: int, rank: int, signum: int, folder: Path):
        self.step, self.rank, self.signum, self.marker = step, rank, signum, folder / "fault"
        self.now = 0
        holder, name = (PHASES | BACKWARD)[phase]
        around = self.during_backward if phase in BACKWARD else self.before
        setattr(holder, name, around(vars(holder)[name]))
        PPOTrainer._train_step = self.counting(PPOTrainer._train_step)

    def counting(self, train_step):
        @functools.wraps(train_step)
        def wrapper(trainer, *arguments):
            self.now = trainer.step + 1
            return train_step(trainer, *arguments)

        return wrapper

    def before(self, function):
        @functools.wraps(function)
        def wrapper(*arguments, **options):
            self.strike()
            return function(*arguments, **options)

        return wrapper

    def during_backward(self, function):
        @functools.wraps(function)
        def wrapper(*arguments):
            result = function(*arguments)
            tensor = result if isinstance(result, torch.Tensor) else result.alpha_pos
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.strike())
            return result

        return wrapper

    def strike(self) -> None:
        if self.now == self.step and distributed.rank() == self.rank and not self.marker.exists():
            self.marker.write_text(str(time.time()))
            os.kill(os.getpid(), self.signum)


def share_one_gpu() -> None:
    """Let two ranks use the only GPU: NCCL refuses that within one host, so each says that it is a host of its own."""
    if torch.cuda.device_count() == 1 and "RANK" in os.environ:
        os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "LOCAL_RANK": "0"}


def end_as_nccl_does() -> None:
    """Make the group's orderly end a meeting of all ranks without a limit, as NCCL's is; Gloo's waits for nobody."""
    join, leave = distributed._join_group, dist.destroy_process_group
    meeting = []

    def joining(*arguments):
        join(*arguments)
        meeting.append(dist.new_group(timeout=datetime.timedelta(hours=1), backend="gloo"))

    def leaving():
        dist.barrier(meeting.pop())
        leave()

    distributed._join_group, dist.destroy_process_group = joining, leaving


def main() -> None:
    phase, step, rank, name, folder, device, config, resume, *overrides = sys.argv[1:]
    with open(Path(folder) / "starts", "a") as file:
        file.write(f"{started()}\n")
    Fault(phase, int(step), int(rank), signal.Signals[f"SIG{name}"], Path(folder))
    if device == "cuda":
        share_one_gpu()
    else:
        end_as_nccl_does()
    signum = run_toy(Path(config), resume, overrides, device=device)
    if signum:
        sys.exit(128 + signum)


if __name__ == "__main__":
    main()
