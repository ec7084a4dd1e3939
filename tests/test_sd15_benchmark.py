"""The benchmark of Stable Diffusion v1.5 on tiny networks: it runs, keeps what it has, and judges by the targets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from launchers import torchrun

from benchmarks import sd15
from benchmarks.sd15_measures import flop_per_row
from benchmarks.sd15_models import random_backbone

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15")
    return folder, bench(folder, "--parts", "batch1,memory", "--precision", "float32", "--repeats", "1")


def bench(folder, *arguments):
    common = ["--tiny", "--device", "cpu", "--models", str(folder / "models"), "--outdir", str(folder / "out")]
    return CliRunner().invoke(sd15.main, [*common, *arguments])


def rows(folder) -> dict[str, dict]:
    parts = json.loads((folder / "out/sd15.json").read_text())["parts"]
    return {row["figure"]: row for part in parts.values() for row in part["rows"]}


def test_targets_stand_beside_the_figures(measured):
    folder, result = measured
    assert result.exit_code == 0, result.output
    found = rows(folder)
    whole, ratio = found["10 intervals, K = 2, batch 1"], found["K = 2 over K = 1, batch 1"]
    single = float(re.search(r"K = 1: ([\d.]+) ms", ratio["note"])[1])
    assert whole["value"] / single == pytest.approx(ratio["value"], rel=0.01)
    assert (whole["to_reach"], ratio["to_reach"]) == (150.0, 1.35)
    line = next(line for line in result.stdout.splitlines() if line.startswith("| 10 intervals, K = 2, batch 1 |"))
    assert "at most 150 ms" in line and ("(missed)" in line) == (whole["value"] > 150)
    assert {"batch 1", "batch 2", "batch 3", "batch 2, --max-rows 8"} <= set(found)


def test_what_is_measured_is_kept_and_judged(measured):
    folder, _ = measured
    path = folder / "out/sd15.json"
    before = path.read_text()
    again = bench(folder, "--parts", "batch1,memory", "--precision", "float32", "--repeats", "1")
    assert again.exit_code == 0
    assert path.read_text() == before
    content = json.loads(before)
    for value, code in ((149.0, 0), (151.0, 2)):
        content["parts"]["batch1"]["rows"] = [
            row | {"value": value} if row["to_reach"] == 150 else row | {"value": 0.0}
            for row in content["parts"]["batch1"]["rows"]
        ]
        path.write_text(json.dumps(content))
        judged = bench(folder, "--parts", "none", "--check")
        assert judged.exit_code == code, judged.output
        assert ("not reached: 10 intervals, K = 2, batch 1" in judged.output) == (code == 2)
    path.write_text(before)


def test_a_models_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "models").write_text("a file")
    result = bench(tmp_path, "--parts", "batch1")
    assert result.exit_code == 2
    assert result.stderr == f"Error: cannot make --models {tmp_path / 'models'}: File exists\n"
    assert (tmp_path / "models").read_text() == "a file"


@pytest.mark.slow
def test_two_ranks_stand_beside_one_and_do_the_same(tmp_path):
    """Gloo on the CPU: the last loss and reward of four steps are the same numbers; the ratios are of the times."""
    arguments = ["--tiny", "--device", "cpu", "--precision", "float32", "--repeats", "1", "--parts", "ranks"]
    arguments += ["--models", str(tmp_path / "models"), "--outdir", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for ranks in (1, 2):
        command = [sys.executable, *torchrun(ranks), "-m", "benchmarks.sd15", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    found = rows(tmp_path)
    steps = [found[f"PPO step of 16 images on {gpus}"] for gpus in ("1 GPU", "2 GPUs")]
    one, two = (re.search(r"last loss (\S+), reward (\S+)", step["note"]).groups() for step in steps)
    assert [float(number) for number in two] == pytest.approx([float(number) for number in one], abs=1e-5)
    ratio = found["the same over that of 1 GPU: PPO step of 16 images"]
    assert ratio["value"] == steps[1]["value"] / steps[0]["value"]
    assert ratio["to_reach"] == pytest.approx(1 / 1.9)
    assert found["the same over that of 1 GPU: 1 image"]["to_reach"] == pytest.approx(1 / 1.3)


def test_work_is_counted_by_diffusers_forward(measured):
    """Of the convolution at the input alone the operations are known in closed form; the whole is much more."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    folder, _ = measured
    net = random_backbone(folder / "models", torch.device("cpu"), "float32", "off", tiny=True)
    conv = net.unet.conv_in
    size = net.img_resolution
    with FlopCounterMode(display=False) as counter:
        conv(torch.zeros(1, 4, size, size))
    expected = 2 * size**2 * 9 * conv.in_channels * conv.out_channels
    assert counter.get_total_flops() == expected
    assert flop_per_row(net) > 100 * expected
