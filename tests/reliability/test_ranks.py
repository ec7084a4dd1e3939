"""Pictures do not depend on how many processes make them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launchers import torchrun
from run_folders import lines

from training.manifest import image_name
from training.ppo.cold_start import cold_start_table
from training.table import save_table

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[2]
SEEDS = 7


def test_any_number_of_ranks_makes_the_same_pictures(tmp_path):
    """To the last bit, where there is a batch for every process. Plain python with MASTER_PORT set runs alone."""
    table = tmp_path / "table.json"
    save_table(replace(cold_start_table(3, 2), dataset_name="emoji"), table)
    words = ["--prompt-file", "src/prompts/emoji_test.txt", "--seeds", f"0-{SEEDS - 1}", "--batch", "2"]
    words += ["--predictor_path", str(table), "--device", "cpu"]
    for ranks in (1, 2, 3):
        command = [sys.executable, *torchrun(ranks), "sample.py", *words, "--outdir", str(tmp_path / str(ranks))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "29600"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240, capture_output=True)
    for ranks in (2, 3):
        for seed in range(SEEDS):
            one, other = (tmp_path / name / image_name(seed) for name in ("1", str(ranks)))
            assert one.read_bytes() == other.read_bytes(), (seed, ranks)
        one, other = (lines(tmp_path / name / "manifest.jsonl") for name in ("1", str(ranks)))
        assert one == other
