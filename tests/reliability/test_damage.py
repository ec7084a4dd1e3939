"""Damaged checkpoints, full disks, folders in use, gradients that are no numbers: nothing is lost, and it is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from launchers import python_path
from run_folders import lines, only_run
from toy_training import run_toy, write_files

from torch_utils.checkpoint import CheckpointError, load_checkpoint, record_path, save_checkpoint
from torch_utils.errors import UserError
from training.ppo import launch
from training.ppo.cold_start import cold_start_table
from training.ppo.config import CheckpointsConfig, PPOConfig, flatten, load_config
from training.ppo.policy import EPDParamPolicy
from training.ppo.rdpo import RDPO
from training.ppo.rl_runner import Draw, Rollout
from training.ppo.run_dir import RunDirectory, RunError, config_sha256

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture
def toy(tmp_path) -> Path:
    return write_files(tmp_path)


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in lines(path)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    torch.save({"step": 6}, path)


def no_record(path: Path) -> None:
    record_path(path).unlink()


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign, no_record])
def test_a_run_goes_on_from_the_newest_intact_checkpoint(toy, tmp_path, damage, capsys):
    run_toy(toy, "never", ["ppo.steps=6", f"run.output_root={tmp_path}/undisturbed"])
    run_toy(toy, "never", ["ppo.steps=6"])
    directory = only_run(tmp_path)
    for step in (4, 6):
        damage(directory.checkpoint(step))
    with pytest.raises(
        CheckpointError, match=r"step000006\.pt .*; to go on from policy-step000002\.pt, move the damaged"
    ):
        run_toy(toy, str(directory.path), ["ppo.steps=6"])
    capsys.readouterr()
    run_toy(toy, "auto", ["ppo.steps=6"])
    said = capsys.readouterr().err
    assert "policy-step000006.pt" in said and "policy-step000004.pt" in said and "2 of 6 steps done" in said
    assert only_run(tmp_path) == directory and steps_of(directory.metrics) == list(range(1, 7))
    ours, theirs = (
        load_checkpoint(run.checkpoint(6))["policy"] for run in (directory, only_run(tmp_path, "undisturbed"))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_an_intact_checkpoint_a_run_begins_anew(toy, tmp_path):
    run_toy(toy, "never", [])
    directory = only_run(tmp_path)
    for step in directory.checkpoint_steps():
        empty(directory.checkpoint(step))
    with pytest.raises(CheckpointError, match="no other is intact"):
        run_toy(toy, str(directory.path), [])
    run_toy(toy, "auto", [])
    assert len(list((tmp_path / "exps").iterdir())) == 2


def test_what_a_killed_writer_left_is_swept_at_the_next_start(toy, tmp_path):
    run_toy(toy, "never", [])
    directory = only_run(tmp_path)
    leftovers = [directory.path / part / f".{'0a' * 8}.tmp" for part in ("checkpoints", "logs", "samples")]
    for path in leftovers:
        path.write_bytes(b"half a file")
    kept = directory.path / "checkpoints" / ".mine.tmp"
    kept.write_bytes(b"a user's own")
    run_toy(toy, str(directory.path), ["ppo.steps=5"])
    assert not any(path.exists() for path in leftovers) and kept.exists()


KILLED_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path

import torch
from torch_utils.checkpoint import load_checkpoint, save_checkpoint, sweep_leftovers

folder, path, random = Path(sys.argv[1]), Path(sys.argv[1]) / "policy.pt", random.Random(0)
save_checkpoint(path, {"step": -1, "weights": torch.full((300_000,), -1.0)})
steps, leftovers = [], 0
for life in range(20):
    writer = os.fork()
    if writer == 0:
        for step in range(1000 * life, 1000 * life + 1000):
            save_checkpoint(path, {"step": step, "weights": torch.full((300_000,), float(step))})
        os._exit(1)
    time.sleep(random.uniform(0.01, 0.1))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WIFSIGNALED(status)
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        sys.exit(f"life {life}: {error}")
    assert (state["weights"] == state["step"]).all()
    steps.append(state["step"])
    leftovers += sweep_leftovers(folder)
    assert {file.name for file in folder.iterdir()} <= {"policy.pt", "policy.pt.sha256"}
assert steps == sorted(steps)
print(len(set(steps)), leftovers)
"""


@pytest.mark.reliability
def test_a_writer_killed_at_twenty_random_instants_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """Always under the same name, where record and content have to change together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen, leftovers = map(int, done.stdout.split())
    assert seen > 5 and leftovers > 2  # the kills came in the middle of the work


def test_checkpoints_are_pruned_as_asked(toy, tmp_path):
    run_toy(
        toy, "never", ["ppo.steps=9", "logging.save_interval=1", "checkpoints.keep_last=2", "checkpoints.keep_every=3"]
    )
    directory = only_run(tmp_path)
    assert directory.checkpoint_steps() == [3, 6, 8, 9]
    assert len(list((directory.path / "checkpoints").glob("policy-step*.sha256"))) == 4
    assert directory.best_checkpoint.exists() and load_checkpoint(directory.checkpoint(3))["step"] == 3
    directory.prune_checkpoints(CheckpointsConfig(keep_last=1))
    assert directory.checkpoint_steps() == [9]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from toy_training import ToyReward, run_toy
from torch_utils.errors import UserError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root, limit = Path(sys.argv[1]), int(sys.argv[2])
score = ToyReward.score
calls = 0

def full_after_a_while(self, images, prompts):
    global calls
    calls += 1
    if calls == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return score(self, images, prompts)

ToyReward.score = full_after_a_while
try:
    run_toy(root / "toy.yaml", "auto", ["ppo.steps=8", "evaluation.interval=0"])
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [0, 2000])
def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(toy, tmp_path, limit):
    """The system refuses to make any file longer than `limit` bytes from the fifth step on, as a full disk would."""
    (tmp_path / "program.py").write_text(FULL_DISK)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(limit)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stdout and "File too large; make room there and start again" in done.stdout
    directory = only_run(tmp_path)
    assert directory.checkpoint_steps() == [2, 4]
    load_checkpoint(directory.checkpoint(4))
    assert run_toy(toy, "auto", ["ppo.steps=8", "evaluation.interval=0"]) == 0
    assert steps_of(directory.metrics) == list(range(1, 9))
    assert not list(directory.path.rglob(".*.tmp"))


def test_two_runs_in_one_folder(toy, tmp_path):
    """The second one is told who is there; when that process is dead the lock is free."""
    run_toy(toy, "never", [])
    directory = only_run(tmp_path)
    code = (
        "import contextlib, sys, time; from torch_utils.checkpoint import lock_folder\n"
        "with contextlib.ExitStack() as locks: print(lock_folder(sys.argv[1], locks), flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, directory.path], env=environment, text=True, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == "True\n"
        with pytest.raises(RunError, match=rf"is in use by process {holder.pid} on {os.uname().nodename}; wait for it"):
            run_toy(toy, str(directory.path), ["ppo.steps=5"])
    finally:
        holder.kill()
        holder.communicate()
    assert f"process {holder.pid}" in (directory.path / ".lock").read_text()  # stale, and no obstacle
    assert run_toy(toy, str(directory.path), ["ppo.steps=5"]) == 0
    assert f"process {os.getpid()}" in (directory.path / ".lock").read_text()


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.05)


@pytest.mark.reliability
def test_two_real_runs_in_one_folder(toy, tmp_path):
    """The first stands still in its fourth step; the second is refused; the first is killed; a third goes on."""
    options = ["ppo.steps=6", "evaluation.interval=0"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    program = [
        sys.executable,
        str(HERE / "faulty_training.py"),
        "reward",
        "4",
        "0",
        "STOP",
        str(tmp_path),
        "cpu",
        str(toy),
    ]
    first = subprocess.Popen([*program, "never", *options], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "fault")
        directory = only_run(tmp_path)
        again = [sys.executable, str(HERE.parent / "toy_training.py"), str(toy), str(directory.path), *options]
        second = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=120)
        assert second.returncode != 0
        holder = f"is in use by process {first.pid} on {os.uname().nodename}; wait for it"
        assert holder in second.stderr.splitlines()[-1]
        assert directory.checkpoint_steps() == [2]
    finally:
        first.kill()
        first.wait()
    third = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=120)
    assert third.returncode == 0, third.stderr
    assert "2 of 6 steps done" in third.stderr
    assert steps_of(directory.metrics) == list(range(1, 7)) and only_run(tmp_path) == directory


def replaced(text: str, new: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        before = path.read_text()
        assert text in before
        path.write_text(before.replace(text, new))

    return damage


@pytest.mark.reliability
@pytest.mark.parametrize("named_by", ["run", "configuration"])
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("resolved_config.yaml", Path.unlink, "resolved_config.yaml"),
        ("resolved_config.yaml", empty, "model.num_"),
        ("resolved_config.yaml", lambda path: path.write_bytes(b"\x80\xff{"), "resolved_config.yaml"),
        ("resolved_config.yaml", lambda path: path.write_text("ppo: {steps: ["), "is not valid YAML"),
        ("resolved_config.yaml", lambda path: path.write_text("- 1\n"), "must hold sections"),
        ("resolved_config.yaml", replaced("\n  steps: 4", "\n  steps: many"), "ppo.steps must be of type int"),
        ("resolved_config.yaml", replaced("\n  steps: 4", "\n  stops: 4"), "unknown key `ppo.stops`"),
        ("resolved_config.yaml", lambda path: (path.unlink(), path.mkdir()), "resolved_config.yaml"),
        ("start_table.safetensors", Path.unlink, "start_table.safetensors"),
        ("start_table.safetensors", cut, "start_table.safetensors"),
        ("start_table.safetensors", empty, "start_table.safetensors"),
    ],
)
def test_a_run_folder_with_a_broken_configuration_is_one_line(toy_run, tmp_path, named_by, file, damage, words):
    _, run = toy_run
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    stored = folder / "configs" / "resolved_config.yaml"
    for toys, real in {
        "name: toy": "name: emoji",
        "type: hps": "type: emoji_reward",
        "\n  - toy_spread": " []",
    }.items():
        replaced(toys, real)(stored)
    config = ["--config", str(shutil.copy(stored, tmp_path / "same.yaml"))] if named_by == "configuration" else []
    damage(folder / "configs" / file)
    result = CliRunner().invoke(launch.main, [*config, "--resume", str(folder), "--device", "cpu"])
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert result.stderr.count("Error: ") == 1 and last.startswith("Error: ") and words in last


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> tuple[Path, Path]:
    """The configuration of a finished toy run, and its folder."""
    root = tmp_path_factory.mktemp("toy")
    toy = write_files(root)
    assert run_toy(toy, "never", []) == 0
    return toy, only_run(root).path


def test_a_checkpoint_knows_its_configuration(toy_run, tmp_path):
    toy, run = toy_run
    shutil.copytree(run, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    path = directory.checkpoint(4)
    state = load_checkpoint(path)
    flat = flatten(load_config(toy))
    assert state["config"] == flat and state["config_sha256"] == config_sha256(dict(reversed(flat.items())))
    for values in ({"ppo.learning_rate": 7.0}, {"ppo.steps": 9}, {"ppo.foreign": 1}, {"ppo.steps": torch.ones(2)}):
        save_checkpoint(path, state | {"config": flat | values})
        with pytest.raises(CheckpointError, match=r"step000004\.pt: the configuration in it was changed"):
            run_toy(toy, str(directory.path), ["ppo.steps=5"])
    changed = state["config"] | {"ppo.learning_rate": 7.0, "run.seed": 3, "ppo.steps": 9, "ppo.foreign": 1}
    save_checkpoint(path, state | {"config": changed, "config_sha256": config_sha256(changed)})
    with pytest.raises(CheckpointError, match=r"other values of ppo\.foreign, ppo\.learning_rate, run\.seed; use a"):
        run_toy(toy, str(directory.path), ["ppo.steps=5"])
    harmless = state["config"] | {"ppo.steps": 9, "logging.save_interval": 3, "run.output_root": "elsewhere"}
    save_checkpoint(path, state | {"config": harmless, "config_sha256": config_sha256(harmless)})
    assert run_toy(toy, str(directory.path), ["ppo.steps=5"]) == 0


def broken_rollout(policy: EPDParamPolicy) -> Rollout:
    """Finite rewards, and samples that the policy had no chance to draw: ratios and gradients overflow."""
    sample = policy.sample_tables(range(4))
    sample.log_prob.fill_(-1e9)
    draw = Draw(sample, ["a", "a", "b", "b"], [1, 1, 2, 2], torch.tensor([0, 0, 1, 1]))
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    return Rollout(draw, rewards, raw=rewards[:, None])


def test_a_gradient_that_is_not_finite_is_left_out_and_counted():
    policy = EPDParamPolicy(cold_start_table(4, 2), parameterization="direct")
    learner = RDPO(policy, PPOConfig(rollout_batch_size=4, rloo_k=2, ppo_epochs=3), seed=0)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    found = learner.update(1, broken_rollout(policy))
    assert found["skipped_updates"] == 3 and "loss" not in found
    json.dumps(found, allow_nan=False)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    assert not learner.optimizer.state_dict()["state"]


class Overflowing(RDPO):
    """Every update of it overflows."""

    def _optimize(self, rollout, gains, index):
        return super()._optimize(rollout, gains * float("inf"), index)


def test_too_many_such_gradients_end_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("training.ppo.ppo_trainer.RDPO", Overflowing)
    with pytest.raises(
        UserError, match=r"updates left out.*more than ppo\.max_skipped_updates=5; .*has the policy so far"
    ):
        run_toy(toy, "never", ["ppo.max_skipped_updates=5", "ppo.steps=8"])
    state = load_checkpoint(only_run(tmp_path).latest_checkpoint())
    assert state["step"] == 2 and state["skipped_updates"] == 8
    assert all(weight.isfinite().all() for weight in state["policy"].values())


def test_a_torn_line_goes_and_every_step_is_there_once(toy, tmp_path):
    """What a crash in the middle of a line leaves: steps after the last checkpoint, and a part of one more."""
    run_toy(toy, "never", ["ppo.steps=3"])
    directory = only_run(tmp_path)
    directory.checkpoint(3).unlink()
    whole = directory.metrics.read_text().splitlines(keepends=True)
    directory.metrics.write_text("".join(whole) + whole[-1].replace('"step": 3', '"step": 4')[: len(whole[-1]) // 2])
    assert run_toy(toy, str(directory.path), ["ppo.steps=5"]) == 0
    assert steps_of(directory.metrics) == [1, 2, 3, 4, 5]
