"""The reward that can be hacked, and the benchmark around it from end to end."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from run_folders import lines, only_run

from benchmarks.hacking import SaturationReward, hacking_config, main
from training.ppo.cold_start import cold_start_table
from training.table import save_table

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = (
    "ppo.rollout_batch_size=8",
    "evaluation.num_prompts=4",
    "evaluation.grid_images=4",
    "logging.tensorboard=false",
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def picture(*pixels):
    """A 1 x n image of (red, green, blue) pixels: `[3, 1, n]`."""
    return torch.tensor(pixels).T[:, None, :].contiguous()


def test_saturation_by_hand():
    colours = picture((1.0, 0.0, 0.0), (0.2, 0.6, 0.5), (0.3, 0.3, 0.3), (0.0, 0.5, 1.0))
    grey = picture((0.1, 0.1, 0.1), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    scores = SaturationReward().score(torch.stack([colours, grey]), ["a", "b"])
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([(1.0 + 0.4 + 0.0 + 1.0) / 4, 0.0])
    assert SaturationReward().score(torch.zeros(0, 3, 2, 2), []).shape == (0,)


def test_saturation_has_a_gradient():
    image = picture((0.9, 0.5, 0.1), (0.2, 0.4, 0.3))[None].requires_grad_()
    SaturationReward().score(image, ["a"]).sum().backward()
    # Half of one for each pixel's largest channel, minus half for its smallest.
    assert torch.equal(image.grad[0, :, 0].T, torch.tensor([[0.5, 0.0, -0.5], [-0.5, 0.5, 0.0]]))


def test_saturation_keeps_to_the_contract_of_rewards():
    images = torch.full((2, 3, 2, 2), 0.5)
    images[1, 0, 0, 0] = float("nan")
    assert SaturationReward().score(images, ["a", "b"]).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="1 prompts"):
        SaturationReward().score(images, ["a"])


def test_the_start_table_decides_the_shape(tmp_path):
    path = tmp_path / "start: 1.safetensors"  # a name that YAML would not read as text
    save_table(cold_start_table(4, 1), path)
    config = hacking_config(tmp_path, 50, path, ["ppo.rloo_k=8"])
    assert config.data.predictor_snapshot == str(path) and config.model.num_steps is None
    assert config.evaluation.interval == 5 and config.ppo.rloo_k == 8 and config.ppo.train_scale_dir
    assert hacking_config(tmp_path, 50, None, []).model.num_steps == 6


def test_from_end_to_end(tmp_path):
    outdir = tmp_path / "out"
    arguments = ["--outdir", str(outdir), "--steps", "2", "--device", "cpu"]
    for override in (*SMALL, "model.num_steps=3"):
        arguments += ["--override", override]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((outdir / "hacking.json").read_text())
    assert [record["step"] for record in found["evaluations"]] == [0, 1, 2]
    assert found["settings"]["ppo.train_scale_dir"] is True and found["settings"]["model.num_steps"] == 3
    run = only_run(outdir, "run")
    logged = lines(run.evaluations)
    for record, line in zip(found["evaluations"], logged, strict=True):
        assert record["reward_mean"] == line["reward_mean"] and record["prompts"] == 4
        assert 0 < record["reward_mean"] < 1
    best = max(logged, key=lambda line: line["emoji_reward_mean"])
    assert found["best_step"] == best["step"]
    with Image.open(outdir / "hacking.png") as figure:
        assert figure.width > 2 * figure.height


def test_nothing_to_show_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["--outdir", str(tmp_path / "out"), "--override", "evaluation.grid_images=0"])
    assert result.exit_code == 2 and "evaluation.grid_images" in result.output
    assert not (tmp_path / "out").exists()
