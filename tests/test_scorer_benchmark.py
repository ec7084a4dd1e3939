"""The benchmark of the scorers on tiny networks: it runs, keeps what it has, and judges by the target."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import scorers
from benchmarks.results import figures_table, reached
from benchmarks.scorer_models import pictures, random_reward
from training.ppo.reward_multi import PUBLISHED


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache; scorers tell their times at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_utils.progress.SHOW_AFTER", 0.0)
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def bench(folder, *arguments):
    common = ["--tiny", "--device", "cpu", "--repeats", "1"]
    return CliRunner().invoke(
        scorers.main, [*common, "--models", str(folder / "models"), "--outdir", str(folder / "out"), *arguments]
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorers")
    return folder, bench(folder)


def test_every_metric_and_a_folder_are_measured(measured):
    folder, result = measured
    assert result.exit_code == 0, result.output
    parts = json.loads((folder / "out/scorers.json").read_text())["parts"]
    found = {row["figure"]: row for part in parts.values() for row in part["rows"]}
    for metric in PUBLISHED:
        row = found[f"{metric}: 8 images, float32"]
        speed = float(re.match(r"(\d+) images/s", row["note"])[1])
        assert speed == pytest.approx(8000 / row["value"], abs=0.51)
        assert f"| {row['figure']} |" in result.stdout
    row = found["hps: folder, float32"]
    count, took = re.fullmatch(r"(\d+) in ([\d.]+) s", row["note"]).groups()
    assert int(count) == 6 and row["value"] == pytest.approx(6 / float(took), rel=1e-3)
    assert 0 <= found["hps: folder, float32: waiting for files"]["value"] <= 100
    pictures = sorted((folder / "models/tiny/pictures").rglob("*.png"))
    assert len(pictures) == 6 and all(Image.open(path).size == (64, 64) for path in pictures)


def test_what_is_measured_is_kept(measured):
    folder, _ = measured
    before = (folder / "out/scorers.json").read_text()
    assert bench(folder).exit_code == 0
    assert (folder / "out/scorers.json").read_text() == before


@pytest.mark.parametrize("metric", PUBLISHED)
def test_random_weights_tell_pictures_apart(measured, metric):
    """Else the change by half precision would be set against a spread of rounding errors."""
    cpu = torch.device("cpu")
    reward = random_reward(metric, measured[0] / "models/tiny", cpu, amp=False, tiny=True)
    assert reward.score(pictures(4, 64, cpu), ["a red cube"] * 4).std() > 1e-4


def test_the_target_is_judged():
    row = scorers.figure_row("hps: 8 images, float16-autocast", 36.5, "ms", 36.0, "")
    assert not reached(row) and reached(row | {"value": 36.0})
    machine = {"gpu": None, "cpu": "a CPU", "torch": "2"}
    table = figures_table({"speed": {"rows": [row], "machine": machine, "settings": {}, "command": "x"}}, lambda _: "")
    assert "| 36.5 ms | at most 36 ms (missed) |" in table


def test_half_precision_is_judged_by_the_spread_of_the_scores():
    exact = torch.tensor([1.0, 3.0, 1.0, 3.0])
    half = exact + torch.tensor([0.0, 0.01, -0.02, 0.0])
    row = scorers.precision_row("hps", exact, half)
    assert row["value"] == pytest.approx(0.02 / exact.std().item(), rel=1e-5) and "4 images" in row["note"]


def test_unknown_parts_are_one_line(tmp_path):
    result = bench(tmp_path, "--parts", "sped")
    assert result.exit_code == 2 and result.stderr.startswith("Error: --parts") and result.stderr.count("\n") == 1
