"""Pictures do not depend on how many processes make them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launchers import NEEDS_A_GPU, NEEDS_TWO_GPUS, torchrun
from run_folders import lines

from training.manifest import image_name
from training.ppo.cold_start import cold_start_table
from training.table import save_table

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[2]
SEEDS = 7


def sample(outdir: Path, ranks: int, device: str, *options: str) -> str:
    """`SEEDS` pictures, two at a time; returns what was said. Plain python with MASTER_PORT set runs alone."""
    table = outdir.parent / "table.json"
    save_table(replace(cold_start_table(3, 1), dataset_name="emoji"), table)
    words = ["--prompt-file", "src/prompts/emoji_test.txt", "--seeds", f"0-{SEEDS - 1}", "--batch", "2", *options]
    words += ["--predictor_path", str(table), "--device", device, "--outdir", str(outdir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "29600"}
    command = [sys.executable, *torchrun(ranks), "sample.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=280, capture_output=True, text=True)
    return done.stderr


def assert_same_pictures(one: Path, other: Path) -> None:
    for seed in range(SEEDS):
        assert (one / image_name(seed)).read_bytes() == (other / image_name(seed)).read_bytes(), seed
    assert lines(one / "manifest.jsonl") == lines(other / "manifest.jsonl")


def test_any_number_of_ranks_makes_the_same_pictures(tmp_path):
    """To the last bit."""
    said = [sample(tmp_path / str(ranks), ranks, "cpu") for ranks in (1, 2, 3)]
    assert "without work" not in "".join(said)
    for ranks in (2, 3):
        assert_same_pictures(tmp_path / "1", tmp_path / str(ranks))


def test_nor_where_some_of_them_have_nothing_to_do(tmp_path):
    """The batches stay what they were, and a note says how all would have some."""
    alone, crowd = (sample(tmp_path / str(ranks), ranks, "cpu", "--batch", "4") for ranks in (1, 3))
    note = f"note: {SEEDS} images in batches of --batch 4 leave 1 of 3 processes without work; --batch 3 is faster"
    assert crowd.count(note) == 1 and "without work" not in alone
    assert_same_pictures(tmp_path / "1", tmp_path / "3")
    assert "without work" not in sample(tmp_path / "single", 2, "cpu", "--seeds", "5")  # no --batch would help


@pytest.mark.parametrize(
    ("device", "mode", "precision", "ranks"),
    [
        ("cpu", "off", "float32", 2),
        pytest.param("cuda", "off", "float16", 1, marks=NEEDS_A_GPU),
        pytest.param("cuda", "default", "float16", 1, marks=NEEDS_A_GPU),
    ],
)
def test_sampling_that_goes_on_makes_the_same_pictures(tmp_path, device, mode, precision, ranks):
    """Compiled or not; the last batch is not full."""
    options = "--compile", mode, "--precision", precision
    said = sample(tmp_path / "undisturbed", 1, device, *options)
    assert ("compiled the network" in said) == (mode == "default")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "cut")
    for seed in (1, 4, 6):
        (tmp_path / "cut" / image_name(seed)).unlink()
    assert "3 images to make, 4 finished before" in sample(tmp_path / "cut", ranks, device, *options)
    assert_same_pictures(tmp_path / "undisturbed", tmp_path / "cut")


@NEEDS_TWO_GPUS
@pytest.mark.parametrize("mode", ["off", "default"])
def test_two_gpus_make_the_same_pictures(tmp_path, mode):
    options = "--compile", mode, "--precision", "float16"
    for ranks in (1, 2):
        sample(tmp_path / str(ranks), ranks, "cuda", *options)
    assert_same_pictures(tmp_path / "1", tmp_path / "2")
