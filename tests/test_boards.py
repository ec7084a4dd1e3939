"""Watching a run: TensorBoard's event files; and Weights & Biases, which may fail without stopping it."""

from __future__ import annotations

import importlib.metadata
import io
import os
import statistics
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from run_folders import lines, only_run
from test_scoring import refused
from toy_training import run_toy, write_files

from training.images import load_image
from training.ppo.config import Config, ConfigError, check_packages, load_config
from training.ppo.launch import main
from training.ppo.ppo_trainer import mean_and_interval
from training.ppo.run_dir import FREE_KEYS

try:
    import wandb
except ImportError:
    wandb = None
needs_wandb = pytest.mark.skipif(wandb is None, reason="the package wandb is not installed: pip install '.[wandb]'")


@pytest.fixture
def toy(tmp_path):
    return write_files(tmp_path)


def test_intervals_are_over_independent_scores():
    scores = torch.tensor([1.0, 3.0, 2.0, 6.0])
    found = mean_and_interval("x", scores)
    half = 3.1824463 * statistics.stdev([1, 3, 2, 6]) / 2  # t(0.975, 3)
    assert found == pytest.approx({"x_mean": 3.0, "x_ci95_low": 3 - half, "x_ci95_high": 3 + half})
    found = mean_and_interval("x", scores, torch.tensor([0, 1, 0, 1]))  # groups with means 1.5 and 4.5
    half = 12.7062047 * 3 / 2  # t(0.975, 1) * (3 / sqrt 2) / sqrt 2
    assert found == pytest.approx({"x_mean": 3.0, "x_ci95_low": 3 - half, "x_ci95_high": 3 + half})
    assert mean_and_interval("x", scores, torch.zeros(4)) == {"x_mean": 3.0}
    assert mean_and_interval("x", scores[:1]) == {"x_mean": 1.0}


# --- TensorBoard ---


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_shows_what_the_logs_hold(toy, tmp_path):
    run_toy(toy, "never", ["logging.tensorboard=true"])
    directory = only_run(tmp_path)
    events = read_events(directory.tensorboard)
    for group, log in (("train", directory.metrics), ("evaluation", directory.evaluations)):
        records = lines(log)
        for name in set().union(*records) - {"step"}:
            shown = [(event.step, event.value) for event in events.Scalars(f"{group}/{name}")]
            wanted = [
                (record["step"], pytest.approx(float(record[name]), rel=1e-6)) for record in records if name in record
            ]
            assert shown == wanted, name
    train = {
        "reward_mean",
        "reward_ci95_low",
        "reward_ci95_high",
        "kl",
        "clip_fraction",
        "entropy",
        "images_per_second",
    }
    held_out = {f"{name}_{end}" for name in ("reward", "toy_spread") for end in ("mean", "ci95_low", "ci95_high")}
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in train} | {f"evaluation/{name}" for name in held_out} <= tags
    pictures = events.Images("evaluation/samples")
    assert [picture.step for picture in pictures] == [0, 2, 4]
    for picture in pictures:
        pixels = np.array(Image.open(io.BytesIO(picture.encoded_image_string)))
        saved = load_image(directory.sample_grid(picture.step)).permute(1, 2, 0).numpy() * 255
        assert np.array_equal(pixels, saved.round())


def test_tensorboard_draws_the_intervals_as_bands(toy, tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    run_toy(toy, "never", ["logging.tensorboard=true"])
    events = read_events(only_run(tmp_path).tensorboard)
    (written,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1:]
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    bands = {chart.title: chart.margin.series[0] for category in layout.category for chart in category.chart}
    assert bands.keys() == {"train/reward", "evaluation/reward", "evaluation/toy_spread"}
    for title, band in bands.items():
        assert (band.value, band.lower, band.upper) == (f"{title}_mean", f"{title}_ci95_low", f"{title}_ci95_high")


def test_a_resumed_run_shows_each_step_once(toy, tmp_path):
    run_toy(toy, "never", ["logging.tensorboard=true"])
    directory = only_run(tmp_path)
    directory.checkpoint(4).unlink()
    directory.checkpoint(4).with_name("policy-step000004.pt.sha256").unlink()
    run_toy(toy, str(directory.path), ["logging.tensorboard=true"])
    events = read_events(directory.tensorboard)
    assert [event.step for event in events.Scalars("train/kl")] == [1, 2, 3, 4]


# --- Weights & Biases ---


def test_a_missing_package_is_one_line_before_anything_loads(toy, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    arguments = [
        "--config",
        str(toy),
        "--override",
        "model.dataset_name=emoji",
        "--override",
        "reward.type=emoji_reward",
    ]
    arguments += ["--override", "evaluation.metrics=[]"]
    refused(CliRunner().invoke(main, [*arguments, "--override", "logging.wandb=true"]), "pip install '.[wandb]'")
    assert CliRunner().invoke(main, [*arguments, "--dry-run"]).exit_code == 0
    check_packages(Config())


def test_the_key_is_checked_and_free_on_resuming(toy):
    assert load_config(toy).logging.wandb is False
    assert FREE_KEYS.fullmatch("logging.wandb")
    with pytest.raises(ConfigError, match=r"logging\.wandb"):
        load_config(toy, ["logging.wandb=perhaps"])


class Failing(types.ModuleType):
    """Stands for a wandb whose calls fail from the one named on."""

    def __init__(self, fails):
        super().__init__("wandb")
        self.fails, self.logged = fails, []

    def Settings(self, **settings):
        assert all(settings[name] <= 60 for name in ("init_timeout", "login_timeout", "finish_timeout"))
        return settings

    def Image(self, pixels):
        return pixels.shape

    def init(self, **options):
        self.options = options
        self.call("init")
        return self

    def log(self, values, step):
        self.call("log")
        self.logged.append((step, values))

    def finish(self):
        self.call("finish")

    def call(self, name):
        if name == self.fails:
            raise RuntimeError("no\nnetwork")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_what_fails_there_does_not_end_the_run(toy, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setitem(sys.modules, "wandb", Failing(fails))
    assert run_toy(toy, "never", ["logging.wandb=true"]) == 0
    assert [record["step"] for record in lines(only_run(tmp_path).metrics)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("note: nothing more goes to Weights & Biases: no network") == 1


def test_the_same_names_go_there_as_to_tensorboard(toy, tmp_path, monkeypatch):
    service = Failing(None)
    monkeypatch.setitem(sys.modules, "wandb", service)
    run_toy(toy, "never", ["logging.wandb=true", "logging.tensorboard=true"])
    directory = only_run(tmp_path)
    names = {name for _, values in service.logged for name in values}
    tags = read_events(directory.tensorboard).Tags()
    assert names == set(tags["scalars"]) | set(tags["images"])
    assert service.options["id"] == directory.path.name and service.options["resume"] == "allow"
    assert service.options["config"]["ppo.steps"] == 4
    assert [step for step, _ in service.logged] == sorted(step for step, _ in service.logged)


@needs_wandb
def test_the_real_package_offline(toy, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run_toy(toy, "never", ["logging.wandb=true"]) == 0
    directory = only_run(tmp_path)
    (folder,) = (directory.path / "logs" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(directory.path.name)
    (record,) = folder.glob("run-*.wandb")
    stored = record.read_bytes()
    for name in (b"train/reward_mean", b"train/entropy", b"evaluation/toy_spread_mean", b"evaluation/samples"):
        assert name in stored
