"""Runs of the embedded model that stop and go on, in processes of their own: the network gives the same bits again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import NEEDS_A_GPU, NEEDS_TWO_GPUS, python_path, torchrun
from run_folders import assert_same_end, only_run

from torch_utils import determinism
from torch_utils.checkpoint import record_path
from training.ppo.run_dir import RunDirectory

pytestmark = pytest.mark.reliability
STEPS, SAVE_EVERY = 4, 2
# Every call on every process has the same number of images, so that a single shape is compiled.
CONFIG = f"""
run: {{run_name: emoji}}
data: {{prompt_csv: src/prompts/emoji_train.txt}}
model: {{dataset_name: emoji, guidance_rate: 7.5, schedule_type: logsnr, num_steps: 4, num_points: 1}}
ppo: {{steps: {STEPS}, rollout_batch_size: 8, rloo_k: 4, rollout_micro_batch: 4, learning_rate: 0.05}}
pathwise: {{learning_rate: 0.05}}
reward: {{type: emoji_reward}}
evaluation:
  {{interval: 2, prompt_file: src/prompts/emoji_eval.txt, num_prompts: 8, grid_images: 0, metrics: [emoji_heldout]}}
logging: {{save_interval: {SAVE_EVERY}, tensorboard: false}}
"""


def train(root: Path, resume: str, overrides: list[str], device: str, ranks: int = 1) -> RunDirectory:
    root.mkdir(exist_ok=True)
    (root / "emoji.yaml").write_text(CONFIG)
    command = [sys.executable, *torchrun(ranks), "-m", "training.ppo.launch", "--config", str(root / "emoji.yaml")]
    command += ["--resume", resume, "--device", device, "--override", f"run.output_root={root}/exps"]
    command += [word for override in overrides for word in ("--override", override)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    environment.pop(determinism.WORKSPACE_VARIABLE)  # training sets it itself
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert device == "cpu" or ("compiled the network" in done.stderr) == ("model.compile=default" in overrides)
    return only_run(root)


def forget_after(directory: RunDirectory, step: int) -> None:
    """As if the machine had gone down before the next checkpoint; what was logged since then stays."""
    for later in directory.checkpoint_steps():
        if later > step:
            directory.checkpoint(later).unlink()
            record_path(directory.checkpoint(later)).unlink()


@pytest.mark.parametrize(
    ("device", "overrides"),
    [
        ("cpu", ["trainer.algorithm=rdpo"]),
        ("cpu", ["trainer.algorithm=pathwise"]),
        pytest.param("cuda", ["trainer.algorithm=rdpo", "model.precision=float16"], marks=NEEDS_A_GPU),
        pytest.param("cuda", ["trainer.algorithm=pathwise", "model.precision=float16"], marks=NEEDS_A_GPU),
        pytest.param("cuda", ["trainer.algorithm=pathwise"], marks=NEEDS_A_GPU),
        pytest.param(
            "cuda", ["trainer.algorithm=rdpo", "model.precision=float16", "model.compile=default"], marks=NEEDS_A_GPU
        ),
    ],
)
def test_a_run_that_lost_its_last_steps_makes_them_again(tmp_path, device, overrides):
    undisturbed = train(tmp_path / "undisturbed", "never", overrides, device)
    assert len(undisturbed.metrics.read_text().splitlines()) == STEPS
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "cut")
    cut = only_run(tmp_path / "cut")
    forget_after(cut, SAVE_EVERY)
    assert_same_end(train(tmp_path / "cut", str(cut.path), overrides, device), undisturbed, STEPS)


@NEEDS_TWO_GPUS
@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.algorithm=rdpo", "model.precision=float16"],
        ["trainer.algorithm=rdpo", "model.precision=float16", "model.compile=default"],
        ["trainer.algorithm=pathwise", "model.precision=float16"],
        ["trainer.algorithm=pathwise"],
    ],
)
def test_two_gpus_end_as_one(tmp_path, overrides):
    alone = train(tmp_path / "alone", "never", overrides, "cuda")
    assert_same_end(train(tmp_path / "together", "never", overrides, "cuda", ranks=2), alone, STEPS)
