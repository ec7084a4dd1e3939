"""Several nodes: launchers that meet over TCP as those of two machines do, here on one, with Gloo on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from launchers import free_port, python_path
from run_folders import assert_same_end, lines, only_run
from toy_training import run_toy, write_files

import sample
from torch_utils.checkpoint import load_checkpoint
from training.ppo import launch
from training.ppo.cold_start import cold_start_table
from training.ppo.export_epd_predictor import export_predictor
from training.ppo.run_dir import RunDirectory
from training.table import load_table, save_table

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
CONFIG = "training/ppo/cfgs/embedded.yaml"
STEPS = 4
SMALL = (
    "model.num_steps=3",
    f"ppo.steps={STEPS}",
    "ppo.rollout_batch_size=4",
    "ppo.rloo_k=2",
    "ppo.rollout_micro_batch=2",  # of every rank alike: products of matrices of equal height round equally
    f"evaluation.interval={STEPS}",
    "evaluation.num_prompts=4",
    "evaluation.grid_images=4",
)
SECONDS = 120  # a launcher takes some ten, where the cores are free


@pytest.fixture(autouse=True)
def from_the_project(monkeypatch):
    """The configuration names its prompts relative to it."""
    monkeypatch.chdir(ROOT)


def environment(**variables: object) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path()}
    return {**os.environ, **own, **{name: str(value) for name, value in variables.items()}}


class Node:
    """A launcher with one process, and what it says."""

    def __init__(self, folder: Path, number: int, command: list[str]):
        self.out, self.err = (folder / f"node{number}.{stream}" for stream in ("out", "err"))
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(command, env=environment(), stdout=out, stderr=err)

    def wait(self) -> int:
        return self.process.wait(timeout=SECONDS)

    def worker(self) -> int:
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)


@pytest.fixture
def start_nodes(tmp_path) -> Iterator[Callable[..., list[Node]]]:
    """Gives `start(program, ..., count=2, options=())`: the same command on so many nodes of two."""
    started: list[Node] = []

    def start(*program: object, count: int = 2, options: tuple[str, ...] = ()) -> list[Node]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        command += ["--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{free_port()}", *options]
        nodes = [Node(tmp_path, number, [*command, *map(str, program)]) for number in range(count)]
        started.extend(nodes)
        return nodes

    yield start
    for node in started:
        if node.process.poll() is None:
            node.process.terminate()
            node.wait()


def launch_options(root: Path, *overrides: str) -> list[str]:
    keys = (*SMALL, f"run.output_root={root}", *overrides)
    return ["--config", CONFIG, "--device", "cpu", *(part for key in keys for part in ("--override", key))]


def run_alone(command, *arguments: str) -> None:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output


def assert_same_run(first: RunDirectory, second: RunDirectory, steps: int = STEPS) -> None:
    """Equal to the last bit: logs, weights, pictures and the exported table."""
    assert [record["step"] for record in lines(first.metrics)] == list(range(1, steps + 1))
    assert_same_end(first, second, steps)
    pictures = {path.name: path.read_bytes() for path in first.path.glob("samples/*.png")}
    assert pictures == {path.name: path.read_bytes() for path in second.path.glob("samples/*.png")}
    tables = [load_table(export_predictor(run.path, run.checkpoint(steps))) for run in (first, second)]
    assert tables[0].sha256() == tables[1].sha256() != load_table(first.start_table).sha256()


# --- The plain commands ---------------------------------------------------------------------------------------------


def test_two_nodes_train_as_one_process_does(tmp_path, start_nodes):
    nodes = start_nodes("-m", "training.ppo.launch", *launch_options(tmp_path / "two", "trainer.algorithm=rdpo"))
    run_alone(launch.main, *launch_options(tmp_path / "one", "trainer.algorithm=rdpo"))
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].err.read_text()
    one, two = only_run(tmp_path, "one"), only_run(tmp_path, "two")
    assert_same_run(one, two)
    assert {"loss", "reward_mean", "grad_norm"} <= lines(two.metrics)[0].keys()
    assert len(lines(two.evaluations)) == 2
    assert sorted(node.out.read_text() for node in nodes) == ["", f"{two.path}\n"]  # rank 0 speaks for all


def test_two_nodes_sample_as_one_process_does(tmp_path, start_nodes):
    table = tmp_path / "table.json"
    save_table(replace(cold_start_table(3, 2), dataset_name="emoji"), table)
    options = ["--predictor_path", str(table), "--prompt-file", "src/prompts/emoji_test.txt", "--seeds", "3-10"]
    options += ["--batch", "2", "--grid", "--device", "cpu", "--outdir"]
    nodes = start_nodes("sample.py", *options, tmp_path / "two")
    run_alone(sample.main, *options, str(tmp_path / "one"))
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].err.read_text()
    one, two = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two  # pictures, their grid, and the manifest, with nothing left of the ranks' own


def test_a_node_that_stays_alone_gives_up(tmp_path, start_nodes):
    started = time.monotonic()
    options = launch_options(tmp_path / "exps")
    (node,) = start_nodes("-m", "training.ppo.launch", *options, count=1, options=("--rdzv_conf=join_timeout=2",))
    assert node.wait() == 1
    assert time.monotonic() - started < SECONDS / 4
    assert "RendezvousTimeoutError" in node.err.read_text()
    assert not (tmp_path / "exps").exists()


def test_a_node_that_dies_ends_the_others_and_the_same_command_goes_on(tmp_path, start_nodes):
    toy = write_files(tmp_path)
    options = ["ppo.steps=120", "logging.save_interval=8", "evaluation.interval=0", "evaluation.metrics=[]"]
    program = ("tests/toy_training.py", toy, "auto", *options)
    nodes = start_nodes(*program)
    deadline = time.monotonic() + SECONDS
    while not list((tmp_path / "exps").glob("*/checkpoints/policy-step000016.pt")):
        assert time.monotonic() < deadline and nodes[0].process.poll() is None, nodes[0].err.read_text()
        time.sleep(0.01)
    worker = nodes[1].worker()
    nodes[1].process.kill()
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    assert nodes[0].wait() == 1
    assert time.monotonic() - killed < SECONDS / 4
    # By its process, or by its launcher where the dead one held the meeting point.
    assert re.search(
        "Connection (closed|reset) by peer|connection to the C10d store has failed", nodes[0].err.read_text()
    )
    broken = only_run(tmp_path)
    assert not broken.checkpoint(120).exists()

    again = start_nodes(*program)
    run_toy(toy, "never", [*options, f"run.output_root={tmp_path}/undisturbed"])
    assert [node.wait() for node in again] == [0, 0], again[0].err.read_text()
    assert only_run(tmp_path) == broken
    assert_same_run(only_run(tmp_path, "undisturbed"), broken, steps=120)


# --- The SLURM script -----------------------------------------------------------------------------------------------

SCRIPT = ROOT / "docs/train.slurm"
# What the script calls, on two nodes that are this machine. `calls` lists what would have reached SLURM.
STUBS = {
    # As the real one: every node runs the task, one that fails ends all, SIGTERM kills them.
    "srun": """
        while [[ $1 == -* ]]; do shift; done
        trap 'kill -KILL $(jobs -p)' TERM
        : >"$STUB/tasks"
        for SLURM_NODEID in 0 1; do
            export SLURM_NODEID
            "$@" &
            echo $! >>"$STUB/tasks"
        done
        for _ in 0 1; do
            wait -n || { code=$?; kill -KILL $(jobs -p); wait; exit $code; }
        done
    """,
    "scontrol": """
        if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; exit; fi
        echo "scontrol $*" >>"$STUB/calls"
        if kill -0 $(cat "$STUB/tasks") 2>/dev/null; then echo "which kills the tasks" >>"$STUB/calls"; fi
    """,
    "scancel": """
        echo "scancel $*" >>"$STUB/calls"
        kill -TERM $(cat "$STUB/tasks")
    """,
}


class Cluster:
    """A folder with stubs in place of SLURM's commands, and the jobs that run there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.exps, self.start = folder / "exps", folder / "start/table.safetensors"
        (folder / "bin").mkdir()
        (folder / "calls").touch()
        for name, body in STUBS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{body}")
            path.chmod(0o755)
        self.overrides = (
            *SMALL,
            f"run.output_root={self.exps}",
            "distill.prompts=1",
            "distill.teacher_steps=1",
            "distill.grid_points=2",
        )

    def submit(self) -> subprocess.Popen:
        slurm = {"JOB_ID": 42, "JOB_NUM_NODES": 2, "JOB_NODELIST": "n[1-2]", "CPUS_PER_TASK": 1, "SUBMIT_DIR": ROOT}
        chosen = {"PYTHON": sys.executable, "CONFIG": CONFIG, "OVERRIDES": " ".join(self.overrides)}
        chosen |= {"START": self.start, "GPUS_PER_NODE": 1, "DEVICE": "cpu", "PORT": free_port()}
        variables = environment(
            **{f"SLURM_{name}": value for name, value in slurm.items()},
            **chosen,
            STUB=self.folder,
            PATH=os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]]),
        )
        return subprocess.Popen(["bash", SCRIPT], cwd=self.folder, env=variables, text=True, stderr=subprocess.PIPE)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture(scope="module")
def warned_job(tmp_path_factory) -> tuple[Cluster, int, str]:
    """A job that was told after its first step that its time is nearly up: cluster, exit code, messages."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    job = cluster.submit()
    messages = ""
    while f"step 1/{STEPS}" not in (line := job.stderr.readline()):
        messages += line
        assert line, messages
    job.send_signal(signal.SIGUSR1)
    messages += job.communicate(timeout=SECONDS)[1]
    return cluster, job.returncode, messages


def test_a_job_whose_time_is_up_saves_and_is_queued_again(warned_job):
    cluster, code, messages = warned_job
    assert code == 0, messages
    assert cluster.calls() == ["scancel --signal=TERM 42", "scontrol requeue 42"]
    assert "SIGTERM: finishing this step and saving" in messages
    run = only_run(cluster.exps, ".")
    done = load_checkpoint(run.latest_checkpoint())["step"]
    assert 1 <= done < STEPS
    assert [record["step"] for record in lines(run.metrics)] == list(range(1, done + 1))


def test_the_job_goes_on_and_ends_as_one_process_does(warned_job, tmp_path):
    cluster, *_ = warned_job
    run, calls = only_run(cluster.exps, "."), cluster.calls()
    before = cluster.start.stat().st_mtime_ns
    job = cluster.submit()
    run_alone(launch.main, *launch_options(tmp_path, f"data.predictor_snapshot={cluster.start}"))
    _, messages = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, messages
    assert (only_run(cluster.exps, "."), cluster.calls(), cluster.start.stat().st_mtime_ns) == (run, calls, before)
    assert len(list(run.export.glob("*.safetensors"))) == 1
    assert_same_run(only_run(tmp_path, "."), run)


def test_a_job_that_fails_says_so_and_is_not_queued_again(tmp_path):
    cluster = Cluster(tmp_path)
    cluster.overrides = ("ppo.rollout_batch_size=5",)
    job = cluster.submit()
    _, messages = job.communicate(timeout=SECONDS)
    assert job.returncode == 2 and "ppo.rollout_batch_size=5 is not a multiple" in messages
    assert cluster.calls() == []


def test_torchrun_waits_less_than_slurm():
    """For the step to end, after the warning: then there is time left to save and to be queued again."""
    text = SCRIPT.read_text()
    warning = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    patience = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", text)
    assert 30 < int(patience[1]) <= int(warning[1]) - 60
