"""One image's network calls spread over ranks: the same image, and a refusal where it cannot work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launchers import NEEDS_TWO_GPUS, python_path, torchrun
from run_folders import lines

from training.images import load_image
from training.manifest import image_name
from training.ppo.cold_start import cold_start_table
from training.table import save_table

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a red heart", "a very long prompt about a cat " * 20]
# Counts the rows that reach the network of this rank, and says so at the end.
COUNTING = """
import os
import sys
from pathlib import Path
from training.denoisers.unet import BranchedUNet
import sample
rows, forward = [], BranchedUNet.forward
def counted(self, x, timestep, text):
    rows.append(len(text))
    return forward(self, x, timestep, text)
BranchedUNet.forward = counted
os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("PRETEND_LOCAL", os.environ.get("LOCAL_WORLD_SIZE", "1"))
try:
    sample.main(sys.argv[2:])
finally:
    Path(sys.argv[1] + os.environ.get("RANK", "0")).write_text(repr(rows))
"""


def start(
    folder: Path, ranks: int, *arguments: str, guidance_rate: float = 7.5, device: str = "cpu"
) -> subprocess.Popen:
    folder.mkdir()
    table = replace(cold_start_table(3, 2), dataset_name="emoji", guidance_rate=guidance_rate)
    save_table(table, folder / "table.json")
    (folder / "count.py").write_text(COUNTING)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [sys.executable, *torchrun(ranks), str(folder / "count.py"), str(folder / "rows")]
    command += [
        "--predictor_path",
        str(folder / "table.json"),
        "--prompt-file",
        str(folder / "prompts.txt"),
        "--device",
        device,
    ]
    command += ["--outdir", str(folder / "out"), "--seeds", "0-1", *arguments]
    # TF32 rounds convolutions so coarsely that another number of rows, and so another kernel, shows in the picture.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "NVIDIA_TF32_OVERRIDE": "0"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return errors


def rows(folder: Path, rank: int) -> list[int]:
    return json.loads((folder / f"rows{rank}").read_text())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_TWO_GPUS)])
def test_two_ranks_make_one_image_together(tmp_path, device):
    alone, together = (tmp_path / name for name in ("alone", "together"))
    options = ["--batch", "1"]
    processes = [
        start(alone, 1, *options, device=device),
        start(together, 2, *options, "--parallel", "points", device=device),
    ]
    for process in processes:
        assert finish(process).count("tokens is cut to") == 1
    for seed in (0, 1):
        one, other = (load_image(folder / "out" / image_name(seed)) for folder in (alone, together))
        levels = ((one - other) * 255).abs()
        assert levels.max() <= 1.01 and levels.mean() < 1e-2
        assert one.std() > 0.05
    one, other = (lines(folder / "out/manifest.jsonl") for folder in (alone, together))
    assert [line["seed"] for line in other] == [0, 1]
    assert [line | {"sha256": ""} for line in one] == [line | {"sha256": ""} for line in other]
    # Two images, two intervals: a call of both branches, then one of both branches of both points.
    assert rows(alone, 0) == [2, 4] * 4
    assert rows(together, 0) == rows(together, 1) == [1, 2] * 4


@pytest.mark.parametrize(
    ("ranks", "arguments", "guidance_rate", "message"),
    [
        (1, [], 7.5, "start it with python -m torch.distributed.run"),
        (3, ["--batch", "1"], 1.0, "3 processes, but the largest network call has 2 rows"),
        (3, ["--batch", "4", "--max-rows", "1"], 7.5, "3 processes, but the largest network call has 2 rows"),
        (2, ["--batch", "1"], 7.5, "needs GPUs of one host, not of 2"),
    ],
)
def test_where_it_cannot_work_it_says_no(tmp_path, monkeypatch, ranks, arguments, guidance_rate, message):
    if "host" in message:
        monkeypatch.setenv("PRETEND_LOCAL", "1")
    process = start(tmp_path / "a", ranks, "--parallel", "points", *arguments, guidance_rate=guidance_rate)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert errors.count("Error: --parallel points") == 1 and message in errors
    assert not (tmp_path / "a/out").exists()
