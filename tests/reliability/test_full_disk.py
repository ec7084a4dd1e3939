"""A real disk that is full at the start, while logging, while saving: one line, and nothing written is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from launchers import python_path
from run_folders import assert_same_end, only_run
from toy_training import run_toy, write_files

import sample_baseline
from torch_utils.checkpoint import load_checkpoint
from training.manifest import MANIFEST
from training.ppo.run_dir import RunDirectory

pytestmark = pytest.mark.reliability
HERE = Path(__file__).resolve().parent
STEPS = 8
OPTIONS = [f"ppo.steps={STEPS}", "logging.tensorboard=true"]

# full_disk.py PLACE CALL DISK CONFIG [override ...]: the disk is full from the CALL-th call of PLACE on.
PROGRAM = """
import functools, sys
from pathlib import Path

from toy_training import run_toy
from torch_utils.errors import UserError
from training.ppo import ppo_trainer, reporting, run_dir

PLACES = {
    "start": (run_dir, "_create"),
    "resume": (reporting, "drop_lines_after"),
    "logging": (reporting, "append_line"),
    "grid": (reporting, "save_png"),
    "saving": (ppo_trainer, "save_checkpoint"),
    "tensorboard": (reporting.Reporter, "_to_boards"),
}
place, call, disk, config, *overrides = sys.argv[1:]
holder, name = PLACES[place]
function, calls = getattr(holder, name), 0


@functools.wraps(function)
def wrapper(*arguments):
    global calls
    calls += 1
    if calls == int(call):
        with open(Path(disk) / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1 << 10))
            except OSError:
                pass
    return function(*arguments)


setattr(holder, name, wrapper)
try:
    run_toy(Path(config), "auto", overrides)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunDirectory:
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_toy(write_files(root), "never", OPTIONS) == 0
    return only_run(root)


@pytest.mark.parametrize(
    ("place", "call", "saved"),
    [
        ("start", 1, None),
        ("logging", 1, []),  # the first evaluation
        ("logging", 8, [2, 4]),  # a line of metrics
        ("grid", 2, []),
        ("tensorboard", 3, []),
        ("saving", 2, []),  # policy-best.pt
        ("saving", 7, [2, 4]),
        ("resume", 1, [2]),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    tmp_path, disk, undisturbed, place, call, saved
):
    config = write_files(tmp_path)
    options = [f"run.output_root={disk}/exps", *OPTIONS]
    if place == "resume":
        assert run_toy(config, "auto", options) == 0
        for path in disk.rglob("policy-step00000[468].pt*"):
            path.unlink()
    (tmp_path / "full_disk.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "full_disk.py", place, str(call), disk, config, *options]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("\n") == 1 and "No space left on device" in done.stdout and str(disk) in done.stdout
    for folder in (disk / "exps").iterdir():
        run = RunDirectory(folder)
        assert not list(folder.rglob(".*.tmp"))
        assert run.checkpoint_steps() == (saved or [])
        for step in run.checkpoint_steps():
            assert load_checkpoint(run.checkpoint(step))["step"] == step
        if saved:
            assert run.metrics.read_text().count("\n") >= saved[-1]

    (disk / "filler").unlink()
    assert run_toy(config, "auto", options) == 0
    run = RunDirectory(max((disk / "exps").iterdir()))
    assert saved is None or len(list((disk / "exps").iterdir())) == (1 if saved else 2)
    assert_same_end(run, undisturbed, STEPS)


def test_sampling_on_a_full_disk_keeps_what_is_finished(tmp_path, disk):
    with open(disk / "filler", "wb") as filler:
        filler.write(bytes((1 << 20) - (40 << 10)))
    words = ["--sampler", "ddim", "--dataset-name", "emoji", "--num-steps", "2", "--schedule-type", "logsnr"]
    words += ["--prompt", "a", "--seeds", "0-7", "--batch", "1", "--device", "cpu", "--outdir", str(disk / "out")]
    result = CliRunner().invoke(sample_baseline.main, words)
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and last.endswith(
        "No space left on device; what was finished is kept, mend that and start again"
    )
    finished = len(list(disk.rglob("0000??.png")))
    assert 0 < finished < 8 and not list(disk.rglob(".*.tmp"))
    (disk / "filler").unlink()
    result = CliRunner().invoke(sample_baseline.main, words)
    assert result.exit_code == 0, result.output
    assert f"{8 - finished} images to make, {finished} finished before" in result.stderr
    assert len(list(disk.rglob("0000??.png"))) == len((disk / "out" / MANIFEST).read_text().splitlines()) == 8
