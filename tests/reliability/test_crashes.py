"""Processes killed in the middle of their work, on two ranks: the run goes on by itself and ends as if undisturbed.

Over Gloo on the CPU; over NCCL where there is a GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launchers import python_path, torchrun
from run_folders import assert_same_end, only_run
from toy_training import run_toy, write_files

from torch_utils.checkpoint import load_checkpoint
from torch_utils.distributed import LEAVE_S
from training.ppo.run_dir import RunDirectory

pytestmark = pytest.mark.reliability
HERE = Path(__file__).resolve().parent
STEPS, SAVE_EVERY, FAULT_STEP = 6, 2, 4
OPTIONS = [f"ppo.steps={STEPS}", f"logging.save_interval={SAVE_EVERY}"]
STOP_S = 10.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHWISE = ["trainer.algorithm=pathwise", "pathwise.learning_rate=0.1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunDirectory:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_toy(write_files(root), "never", OPTIONS, device=DEVICE) == 0
    return only_run(root)


@pytest.fixture(scope="module")
def undisturbed_pathwise(tmp_path_factory) -> RunDirectory:
    root = tmp_path_factory.mktemp("pathwise")
    assert run_toy(write_files(root), "never", [*OPTIONS, *PATHWISE], device=DEVICE) == 0
    return only_run(root)


def environment() -> dict[str, str]:
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | settings


def start(
    root: Path,
    phase: str,
    rank: int,
    name: str,
    *,
    step: int = FAULT_STEP,
    restarts: int = 2,
    extra: Sequence[str] = (),
) -> subprocess.Popen:
    """The toy on two ranks under torchrun, with the settings of train.sh, in a session of its own."""
    config = write_files(root)
    launcher = [sys.executable, *torchrun(2)]
    launcher += [f"--max-restarts={restarts}", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    fault = [phase, str(step), str(rank), name, str(root), DEVICE]
    program = [str(HERE / "faulty_training.py"), *fault, str(config), "auto"]
    return subprocess.Popen(
        [*launcher, *program, *OPTIONS, *extra],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 150) -> str:
    """What it wrote to stderr; whatever is left of it is killed."""
    try:
        return process.communicate(timeout=timeout)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("phase", "rank"),
    [("rollout", 1), ("reward", 0), ("update", 1), ("backward", 1), ("gather", 1), ("gather", 0), ("save", 0)],
)
def test_a_killed_rank_costs_what_came_after_the_last_checkpoint(tmp_path, undisturbed, phase, rank):
    assert_a_kill_costs_little(tmp_path, undisturbed, phase, rank)


@pytest.mark.parametrize(("phase", "rank"), [("gradients", 0), ("backward", 1)])
def test_so_does_one_that_learns_by_the_rewards_gradient(tmp_path, undisturbed_pathwise, phase, rank):
    assert_a_kill_costs_little(tmp_path, undisturbed_pathwise, phase, rank, PATHWISE)


def assert_a_kill_costs_little(
    tmp_path: Path, undisturbed: RunDirectory, phase: str, rank: int, extra: Sequence[str] = ()
) -> None:
    process = start(tmp_path, phase, rank, "KILL", extra=extra)
    messages = finish(process)
    assert process.returncode == 0, messages
    killed = float((tmp_path / "fault").read_text())
    starts = sorted(float(line) for line in (tmp_path / "starts").read_text().split())
    assert len(starts) == 4 and starts[1] < killed < starts[2]
    # torchrun starts the ranks again when none is left.
    assert starts[2] - killed < STOP_S, messages
    print(f"{DEVICE}: rank {rank} killed in {phase}, all started again after {starts[2] - killed:.1f} s")
    directory = only_run(tmp_path)
    assert_same_end(directory, undisturbed, STEPS)
    assert not [path for path in directory.path.rglob(".*.tmp")]


@pytest.mark.parametrize(("phase", "step"), [("reward", FAULT_STEP), ("end", STEPS)])
def test_a_rank_that_hangs_is_named_and_replaced(tmp_path, undisturbed, phase, step):
    process = start(tmp_path, phase, 1, "STOP", step=step, extra=["run.timeout_minutes=0.1"])
    messages = finish(process)
    assert process.returncode == 0, messages
    assert (
        "rank 0 stops, for another one is lost or hangs: [Rank 0]: Rank 1 failed to pass monitoredBarrier" in messages
    )
    assert_same_end(only_run(tmp_path), undisturbed, STEPS)


LEAVING = """
import atexit, time
import click
from torch_utils import distributed
from torch_utils.errors import UserError, user_errors

@user_errors
def main():
    with distributed.joined("cpu"):
        distributed.barrier()
        if distributed.rank() == 1:
            time.sleep(1000)
        atexit.register(time.sleep, 1000)
        raise UserError("the disk is gone")

click.command()(main)()
"""


def test_an_error_is_said_and_ends_the_process_whatever_its_libraries_wait_for(tmp_path):
    program = tmp_path / "leaving.py"
    program.write_text(LEAVING)
    command = [sys.executable, *torchrun(2), str(program)]
    process = subprocess.Popen(command, env=environment(), text=True, stderr=subprocess.PIPE, start_new_session=True)
    for line in process.stderr:
        if "Error: the disk is gone" in line:
            break
    said = time.monotonic()
    rest = finish(process, LEAVE_S + 20)
    assert process.returncode == 1 and "SIGALRM" in rest
    assert LEAVE_S - 2 < time.monotonic() - said < LEAVE_S + 5


def children(root: Path) -> list[int]:
    """The processes that train below `root`, launchers left aside."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "torch.distributed.run" not in command and str(root) in command:
                found.append(int(folder.name))
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("USR1", 143), ("INT", 130)])
def test_a_signal_to_the_launcher_ends_all_ranks_at_the_same_step(tmp_path, undisturbed, name, code):
    """The step takes long enough for a signal to come in its middle: rank 1 is stopped in it for a while."""
    process = start(tmp_path, "reward", 1, "STOP", restarts=0)
    assert wait_until(lambda: (tmp_path / "fault").exists(), 60)
    process.send_signal(signal.Signals[f"SIG{name}"])
    time.sleep(1)
    for pid in children(tmp_path):
        os.kill(pid, signal.SIGCONT)
    messages = finish(process)
    assert f"SIG{name}: finishing this step and saving" in messages, messages
    assert "exitcode" not in messages or f"exitcode  : {code}" in messages
    assert not children(tmp_path)
    directory = only_run(tmp_path)
    assert load_checkpoint(directory.latest_checkpoint())["step"] == FAULT_STEP
    assert run_toy(tmp_path / "toy.yaml", "auto", OPTIONS, device=DEVICE) == 0
    assert_same_end(directory, undisturbed, STEPS)


def test_no_rank_outlives_its_launcher(tmp_path, undisturbed):
    process = start(tmp_path, "reward", 1, "STOP", restarts=0)
    assert wait_until(lambda: (tmp_path / "fault").exists(), 60)
    process.kill()
    process.wait()
    assert len(children(tmp_path)) == 2
    for pid in children(tmp_path):
        os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: not children(tmp_path), STOP_S), "the ranks go on without a launcher"
    assert run_toy(tmp_path / "toy.yaml", "auto", OPTIONS, device=DEVICE) == 0
    assert_same_end(only_run(tmp_path), undisturbed, STEPS)


def test_a_run_goes_on_with_more_and_with_fewer_processes(tmp_path, undisturbed):
    """1, 2 and 1 again; the number of steps is the whole run's, so that the learning rate is."""
    config = write_files(tmp_path)
    for ranks, until in ((1, 2), (2, 4), (1, 6)):
        fault = ["reward", str(until), "0", "USR1", str(tmp_path), DEVICE]
        command = [
            sys.executable,
            *torchrun(ranks),
            str(HERE / "faulty_training.py"),
            *fault,
            str(config),
            "auto",
            *OPTIONS,
        ]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        (tmp_path / "fault").unlink()
        assert load_checkpoint(only_run(tmp_path).latest_checkpoint())["step"] == until, done.stderr
    assert_same_end(only_run(tmp_path), undisturbed, STEPS)
