"""What safety costs: the step that a checkpoint delays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from run_folders import lines

from training.ppo.config import load_config

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "training" / "ppo" / "cfgs" / "embedded.yaml"


def test_checkpoints_take_less_than_a_hundredth_of_the_time(tmp_path):
    """The preset of the embedded model with the quicker algorithm, whose steps a checkpoint delays the most."""
    words = ["trainer.algorithm=rdpo", f"run.output_root={tmp_path}", "ppo.steps=4", "evaluation.interval=0"]
    command = [sys.executable, "-m", "training.ppo.launch", "--config", str(CONFIG), "--device", "cpu"]
    for word in [*words, "logging.save_interval=1"]:
        command += ["--override", word]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (metrics,) = tmp_path.glob("*/logs/metrics.jsonl")
    records = lines(metrics)
    saving = [record["seconds_checkpoint"] for record in records]
    assert saving[0] == 0 and all(seconds > 0 for seconds in saving[1:])
    every = load_config(CONFIG).logging.save_interval
    share = max(saving) / (every * fmean(record["seconds_step"] for record in records))
    print(f"the longest of {len(saving) - 1} saves took {max(saving):.3f} s: {share:.2%} of {every} steps")
    assert share < 0.01
