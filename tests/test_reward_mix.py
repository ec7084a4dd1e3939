"""Mixes of rewards: their arithmetic, what a run writes down of them, and scores that are no numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from run_folders import lines, only_run
from toy_training import ToyDenoiser, ToyReward, run_toy, toy_models, write_files

from torch_utils.checkpoint import load_checkpoint
from torch_utils.errors import UserError
from training.ppo.config import (
    PUBLISHED_REWARDS,
    PUBLISHED_TRANSFORMS,
    Config,
    ConfigError,
    RewardComponent,
    check_names,
    check_values,
    load_config,
    to_yaml,
)
from training.ppo.launch import Models
from training.ppo.reward_mix import Component, RewardMix, RunningStatistics
from training.ppo.reward_multi import create_mix, create_reward

ROOT = Path(__file__).resolve().parents[1]
RAW = torch.tensor([[0.25, 21.0], [0.30, 19.0], [-0.10, 30.0]], dtype=torch.float64)


def mix(*parts: tuple[str, float, str]) -> RewardMix:
    return RewardMix([Component(ToyReward(name), name, weight, transform) for name, weight, transform in parts])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # By hand: (3 * clamp(hps) + 1 * clamp(pick / 26)) / 4.
        (
            [("hps", 3.0, "published"), ("pick", 1.0, "published")],
            [(3 * 0.25 + 21 / 26) / 4, (3 * 0.30 + 19 / 26) / 4, (0 + 1) / 4],
        ),
        ([("hps", 2.0, "none"), ("pick", -1.0, "/26")], [(2 * h - p / 26) / 3 for h, p in RAW.tolist()]),
        ([("hps", 1.0, "clamp01"), ("pick", 1.0, "/ 1e2")], [(0.25 + 0.21) / 2, (0.30 + 0.19) / 2, (0 + 0.30) / 2]),
    ],
)
def test_a_mix_is_the_weighted_mean_of_transformed_scores(parts, expected):
    torch.testing.assert_close(mix(*parts).combine(RAW), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("imagereward", -0.5, (-0.5 + 3.1000184898) / 10),
        ("imagereward", -3.2, 0.0),
        ("aesthetic", 5.25, 0.525),
        ("clip", 0.27, 0.27),
        ("pick", 27.0, 1.0),
    ],
)
def test_published_transforms(name, raw, expected):
    found = mix((name, 1.0, "published")).combine(torch.tensor([[raw]], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_a_lone_reward_is_left_as_it_is():
    lone = RewardMix.of(ToyReward())
    assert torch.equal(lone.combine(RAW[:, :1]), RAW[:, 0])
    assert lone.raw_means(RAW[:, :1]) == {} and lone.name == "toy_reward"
    turned = mix(("hps", -2.0, "none"))
    assert torch.equal(turned.combine(RAW[:, :1]), -RAW[:, 0]) and "raw_hps_mean" in turned.raw_means(RAW[:, :1])


def test_running_statistics_are_those_of_everything_seen():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 20
    statistics = RunningStatistics()
    for part in (values[:1], values[1:4], values[4:4], values[4:900], values[900:]):
        statistics.observe(torch.cat([part, torch.tensor([math.nan, math.inf], dtype=torch.float64)]))
    assert statistics.count == 1000
    torch.testing.assert_close(statistics.standardize(values), (values - values.mean()) / values.std(correction=0))


def test_z_scores_follow_the_run_and_stand_still_in_evaluations():
    running = mix(("hps", 1.0, "zscore"), ("pick", 1.0, "zscore"))
    judge = running.for_evaluation()
    first, second = RAW[:2], RAW[1:] + 1
    running.observe(first)
    torch.testing.assert_close(running.combine(first), torch.tensor([0.0, 0.0], dtype=torch.float64))  # -1 + 1, 1 - 1
    running.observe(second)
    seen = torch.cat([first, second])
    wanted = ((second - seen.mean(0)) / seen.std(0, correction=0)).mean(1)
    torch.testing.assert_close(running.combine(second), wanted)
    assert not judge.has_observed
    again = mix(("hps", 1.0, "zscore"), ("pick", 1.0, "zscore"))
    again.restore(json.loads(json.dumps(running.state())))
    assert torch.equal(again.combine(second), running.combine(second))


def test_gradients_pass_the_transforms():
    raw = RAW.clone().requires_grad_()
    mix(("hps", 3.0, "published"), ("pick", 1.0, "/26")).combine(raw).sum().backward()
    wanted = torch.tensor([[0.75, 0.25 / 26], [0.75, 0.25 / 26], [0.0, 0.25 / 26]], dtype=torch.float64)
    torch.testing.assert_close(raw.grad, wanted)


# --- Configuration --------------------------------------------------------------------------------------------------


def mixed(*components: RewardComponent) -> Config:
    config = Config()
    config.model.num_steps, config.model.num_points = 4, 2
    config.reward.type, config.reward.components = "mixed", list(components)
    return config


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ([], "reward.type=mixed with 0 reward.components"),
        ([RewardComponent("hps", 0.0)], "every weight is 0"),
        ([RewardComponent("hps"), RewardComponent("hps", 2.0)], "holds hps more than once"),
        ([RewardComponent("hps", math.nan)], r"components\[0\].weight=nan must be a finite number"),
        ([RewardComponent("hps", transform="/0")], r"components\[0\].transform=/0 must be one of: none, clamp01"),
        ([RewardComponent("hps", transform="sqrt")], "transform=sqrt must be one of"),
        ([RewardComponent("mps", transform="published")], "published is for hps, clip, aesthetic, pick, imagereward"),
        ([RewardComponent("clap")], r"reward.components\[0\].type=clap is unknown; use one of hps"),
        ([RewardComponent()], r"reward.components\[0\].type= is unknown"),
        ([RewardComponent("mixed")], "type=mixed is unknown"),
        ([RewardComponent("os.system")], "type=os.system is unknown"),
    ],
)
def test_bad_mixes_are_refused(components, words):
    config = mixed(*components)
    with pytest.raises(ConfigError, match=words):
        check_values(config)
        check_names(config)


def test_mixes_are_checked_against_the_rest():
    config = mixed(RewardComponent("hps", transform="zscore"), RewardComponent("clip", 0.0), RewardComponent("pick"))
    check_values(config)
    check_names(config)
    config.trainer.algorithm = "pathwise"
    with pytest.raises(ConfigError, match="zscore needs the scores before their gradients"):
        check_values(config)
    config.trainer.algorithm = "rdpo"
    config.evaluation.metrics = ["clip"]  # of weight 0, so held out
    check_values(config)
    config.evaluation.metrics = ["pick"]
    with pytest.raises(ConfigError, match="holds pick, a trained reward"):
        check_values(config)
    config.evaluation.metrics = []
    config.reward.weights_path = "weights/mine.pt"
    with pytest.raises(ConfigError, match="each component has its own"):
        check_values(config)
    config.reward.weights_path, config.reward.type = None, "hps"
    with pytest.raises(ConfigError, match=r"reward\.type=hps with 3 reward\.components"):
        check_values(config)


def test_mixes_survive_yaml_and_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(mixed(RewardComponent("hps", 0.5), RewardComponent("mine.rewards:red", 2.0, "/10"))))
    read = load_config(path)
    assert read.reward.components == [RewardComponent("hps", 0.5), RewardComponent("mine.rewards:red", 2.0, "/10")]
    check_names(read)
    assert load_config(path, ["reward.components=[{type: clip}]"]).reward.components == [RewardComponent("clip")]
    with pytest.raises(ConfigError, match="wieght"):
        load_config(path, ["reward.components=[{type: clip, wieght: 2}]"])
    with pytest.raises(ConfigError, match="weight"):
        load_config(path, ["reward.components=[{type: clip, weight: heavy}]"])


def test_every_published_transform_is_of_a_published_reward():
    assert set(PUBLISHED_TRANSFORMS) < set(PUBLISHED_REWARDS)


def test_the_examples_of_the_documentation_work(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "metrics.md").read_text()
    blocks = {language: re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1] for language in ("yaml", "python")}
    (tmp_path / "config.yaml").write_text(blocks["yaml"])
    config = load_config(tmp_path / "config.yaml", ["model.num_steps=4", "model.num_points=2"])
    check_names(config)
    (tmp_path / "my_rewards.py").write_text(blocks["python"])
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2] = 0.5
    assert create_reward(config.reward.components[2].type).score(images, ["a", "b"]).tolist() == [0, 0.5]


# --- Loading --------------------------------------------------------------------------------------------------------

OWN = """
import torch

def red(images, prompts):
    assert images.ndim == 4 and len(images) == len(prompts) <= 2
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def of_prompts(images, prompts):
    return [float(len(prompt)) for prompt in prompts]

def one(images, prompts):
    return 1.0

number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "own_rewards.py"


def test_a_function_of_ones_own_is_a_reward(own_module):
    images = torch.zeros(5, 3, 4, 4)
    images[1, 0], images[2, 2] = 1, 1
    reward = create_reward("own_rewards:red", batch_size=2)
    assert reward.score(images, ["a"] * 5).tolist() == [0, 1, -0.5, 0, 0]
    assert create_reward("own_rewards:of_prompts").score(images[:2], ["ab", "c"]).tolist() == [2, 1]
    assert create_reward("own_rewards:one").score(images[:0], []).tolist() == []
    before = reward.weights_sha256
    own_module.write_text(OWN + "\n# changed")
    assert create_reward("own_rewards:red").weights_sha256 != before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_rewards:blue", "own_rewards.py has no function blue"),
        ("own_rewards:number", "own_rewards.py has no function number"),
        ("no_such_module:red", "there is no module no_such_module; start in the folder that holds it"),
        ("own_rewards.inner:red", "there is no module own_rewards.inner"),
    ],
)
def test_functions_that_are_not_there(own_module, name, words):
    with pytest.raises(UserError, match=words):
        create_reward(name)


def test_a_function_that_returns_something_else(own_module):
    with pytest.raises(UserError, match=r"reward own_rewards:one returned shape \[\] for 2 images"):
        create_reward("own_rewards:one").score(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_the_embedded_rewards_mix_and_what_has_no_weight_is_not_loaded(own_module):
    """PickScore's 4 GB are nowhere on this machine."""
    config = mixed(
        RewardComponent("emoji_reward", 1.0),
        RewardComponent("own_rewards:red", 0.5, "/2"),
        RewardComponent("pick", 0.0),
    ).reward
    loaded = create_mix(config, torch.device("cpu"))
    assert loaded.name == "emoji_reward + own_rewards:red" and len(loaded.rewards) == 2
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    raw = torch.stack([reward.score(images, ["a red heart"] * 2) for reward in loaded.rewards], dim=1)
    torch.testing.assert_close(loaded.combine(raw), (raw[:, 0] + 0.5 * raw[:, 1] / 2) / 1.5)


# --- Training -------------------------------------------------------------------------------------------------------


class Faulty(ToyReward):
    """Not a number for every prompt that holds `word`, from its `calls`-th call on."""

    def __init__(self, word: str, value: float = math.nan, calls: int = 0):
        super().__init__("faulty")
        self.word, self.value, self.left = word, value, calls

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        self.left -= 1
        if self.left < 0:
            scores[[self.word in prompt for prompt in prompts]] = self.value
        return scores


@pytest.fixture
def toy(tmp_path):
    return write_files(tmp_path)


def two_rewards(transform: str) -> Models:
    components = [Component(ToyReward(), "toy_reward", 3.0, transform)]
    components.append(Component(ToyReward("toy_bright", power=3), "toy_bright", 1.0, transform))
    return Models(ToyDenoiser(), RewardMix(components), toy_models().metrics)


@pytest.mark.parametrize("transform", ["none", "zscore"])
def test_a_run_writes_every_component_s_raw_scores(toy, tmp_path, transform):
    run_toy(toy, "never", [f"run.output_root={tmp_path}/whole"], two_rewards(transform))
    whole = only_run(tmp_path, "whole")
    for record in lines(whole.metrics):
        assert record["raw_toy_reward_mean"] < 0 < record["raw_toy_reward_std"]
        if transform == "none":
            mean = (3 * record["raw_toy_reward_mean"] + record["raw_toy_bright_mean"]) / 4
            assert record["reward_mean"] == pytest.approx(mean, rel=1e-9)
    evaluations = lines(whole.evaluations)
    assert {"reward_mean", "toy_reward_mean", "toy_bright_mean", "toy_spread_mean"} <= evaluations[0].keys()
    if transform == "zscore":
        assert evaluations[0]["reward_mean"] == pytest.approx(0, abs=1e-9)  # by its own mean and spread
        assert evaluations[-1]["reward_mean"] > 0.01  # by those of the first, as the table has become better


def test_an_interrupted_mix_goes_on_bit_for_bit(toy, tmp_path):
    options = ["ppo.learning_rate_schedule=constant", "ppo.concentration_end=null"]
    run_toy(toy, "never", [*options, f"run.output_root={tmp_path}/whole"], two_rewards("zscore"))
    run_toy(toy, "never", [*options, "ppo.steps=2"], two_rewards("zscore"))
    begun = only_run(tmp_path)
    run_toy(toy, str(begun.path), options, two_rewards("zscore"))
    whole, resumed = (load_checkpoint(run.checkpoint(4)) for run in (only_run(tmp_path, "whole"), begun))
    assert whole["mix"] == resumed["mix"] and whole["evaluation_mix"] == resumed["evaluation_mix"]
    for name, weight in whole["policy"].items():
        assert torch.equal(weight, resumed["policy"][name])


def test_pathwise_refuses_a_component_without_a_gradient(toy):
    class Detached(ToyReward):
        def score(self, images, prompts):
            return super().score(images.detach(), prompts)

    mixed = RewardMix([Component(ToyReward(), "a"), Component(Detached("detached"), "b", 0.1)])
    with pytest.raises(UserError, match="rewards that can be differentiated, and detached cannot; use rdpo"):
        run_toy(toy, "never", ["trainer.algorithm=pathwise"], Models(ToyDenoiser(), mixed, []))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("algorithm", ["rdpo", "pathwise"])
def test_prompts_without_a_number_are_left_out_and_counted(toy, tmp_path, capsys, value, algorithm):
    """Of ten prompts; each comes up once in 2.5 steps of 4 prompts, and in every pathwise step of 16."""
    components = [Component(ToyReward(), "toy", 1.0), Component(Faulty("prompt 3", value), "faulty", 1.0, "clamp01")]
    models = Models(ToyDenoiser(), RewardMix(components), toy_models().metrics)
    options = [f"trainer.algorithm={algorithm}", "ppo.max_dropped_groups=100"]
    assert run_toy(toy, "never", options, models) == 0
    directory = only_run(tmp_path)
    records = lines(directory.metrics)
    counts = [record["dropped_groups"] for record in records]
    assert sum(counts) == records[-1]["dropped_groups_in_all"] > 0 and len(records) == 4
    assert f"faulty gave {value} for the prompt 'prompt 3'; prompts left out:" in capsys.readouterr().err
    state = load_checkpoint(directory.checkpoint(4))
    assert all(weight.isfinite().all() for weight in state["policy"].values())
    assert state["dropped_groups"] == sum(counts)
    text = directory.metrics.read_text() + directory.evaluations.read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_too_many_prompts_without_a_number_end_the_run_with_what_was_learned(toy, tmp_path):
    models = Models(ToyDenoiser(), RewardMix.of(Faulty("prompt", calls=2)), toy_models().metrics)
    with pytest.raises(UserError, match=r"faulty gave nan .* more than ppo.max_dropped_groups=5; .* has the policy"):
        run_toy(toy, "never", ["ppo.max_dropped_groups=5", "ppo.steps=8", "logging.save_interval=100"], models)
    directory = only_run(tmp_path)
    records = lines(directory.metrics)
    assert "reward_mean" in records[0] and "reward_mean" not in records[-1] and "kl" not in records[-1]
    step = records[-1]["step"]
    state = load_checkpoint(directory.checkpoint(step))
    assert state["step"] == step and all(weight.isfinite().all() for weight in state["policy"].values())
    # With a working reward and a higher limit it goes on from there.
    options = ["ppo.max_dropped_groups=50", "ppo.steps=8", "logging.save_interval=100"]
    assert run_toy(toy, str(directory.path), options) == 0
    assert lines(directory.metrics)[-1] | {"step": 8, "dropped_groups": 0} == lines(directory.metrics)[-1]


def test_an_evaluation_without_a_number_is_reported_and_not_judged(toy, tmp_path, capsys):
    models = Models(ToyDenoiser(), RewardMix.of(Faulty("held out 2")), toy_models().metrics)
    run_toy(toy, "never", [], models)
    directory = only_run(tmp_path)
    assert all(record["prompts"] == 5 and "diverging" not in record for record in lines(directory.evaluations))
    assert not directory.best_checkpoint.exists()
    words = "1 held-out prompts have a score that is not a number; this evaluation is not judged"
    assert words in capsys.readouterr().err
