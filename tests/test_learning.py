"""The benchmark of learning: its arithmetic, the lockstep, the rivals and variants on toys, and a small real run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from benchmarks.learning import main
from benchmarks.learning_curves import Gap, failed, find_gap, images_to_reach, paired, reached
from benchmarks.learning_lines import NEAR, SETTINGS, TRAINED, Line, Setting, jobs, run_config
from benchmarks.learning_lockstep import BatchScorer, Judge, Lockstep, Run, crews, roll_out, run_row
from benchmarks.learning_models import BatchReward, load_denoiser
from benchmarks.learning_rivals import CMAES, SuccessiveHalving, VectorTables, crossed_draw
from benchmarks.learning_runs import ALGORITHMS
from benchmarks.learning_starts import optimal_rows, stretch
from benchmarks.learning_variants import (
    AntitheticPolicy,
    CrossedPolicy,
    Fisher,
    OneIntervalPolicy,
    PlainMean,
    SobolPolicy,
    Stratified,
    variant_policy,
)
from tests.toy_training import ToyDenoiser, ToyReward
from torch_utils.errors import UserError
from training.denoisers import create_model
from training.images import quantize
from training.ppo.cold_start import cold_start_table
from training.ppo.config import Config, PathwiseConfig, PPOConfig, load_config
from training.ppo.pathwise import Pathwise
from training.ppo.policy import EPDParamPolicy, TableArrays, create_policy
from training.ppo.rdpo import RDPO
from training.ppo.reward_mix import RewardMix
from training.ppo.reward_multi import create_reward
from training.ppo.rl_runner import Draw, EPDRolloutRunner, ImageScorer, Rollout

TOY = Setting("a", guidance=1.0, num_steps=4)
START = replace(cold_start_table(4, 2), schedule_type="polynomial", schedule_rho=3.0)
PROMPTS = [f"prompt {index}" for index in range(300)]
REWARDS = [ToyReward(), ToyReward("toy_spread", power=2)]


def learn(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def toy_run(line, seed=0, images=256, reward=REWARDS[0]):
    config = run_config(TOY, line, seed, images, eval_prompts=4)
    learner, mean_table = ALGORITHMS[line.algorithm](config, START)
    runner = EPDRolloutRunner(ToyDenoiser(), RewardMix.of(reward), PROMPTS, START, config.ppo, seed)
    return Run(line, seed, learner, mean_table, runner, config.ppo.steps)


def toy_lockstep(chunk=1000):
    net, mix = ToyDenoiser(), RewardMix.of(REWARDS[0])
    judge = Judge(BatchScorer(ImageScorer(net, mix, START, None, REWARDS[1:]), chunk, 1), PROMPTS[:4], range(4))
    return Lockstep(BatchScorer(ImageScorer(net, mix, START, None), chunk, 16), judge, lambda n: None)


# ----------------------------------------------------------------------------
# Curves.


@pytest.mark.parametrize(
    ("target", "images"), [(0.1, 0), (0.2, 0), (0.25, 32), (0.3, 64), (0.45, 224), (0.5, math.inf), (0.35, 128)]
)
def test_images_to_a_share(target, images):
    curve = [(0, 0.2, 0.0), (64, 0.3, 0.0), (192, 0.4, 0.0), (256, 0.5 - 1e-9, 0.0)]
    assert images_to_reach(curve, target) == pytest.approx(images)
    assert images_to_reach([], target) == math.inf


def row(curve, seed=0, line="rdpo", start="cold", failure=None, start_images=0.0):
    scores = {name: [curve[-1][column]] * 2 for name, column in (("reward", 1), ("heldout", 2))} if curve else None
    return {
        "line": line,
        "start": start,
        "seed": seed,
        "curve": curve,
        "scores": scores,
        "failure": failure,
        "start_images": start_images,
    }


def test_median_over_seeds():
    rows = [row([[0, 0.0, 0], [100 * n, 1.0, 0]], n) for n in (1, 2, 3)]
    never = [row([[0, 0.0, 0], [64, 0.1, 0]], n) for n in (4, 5, 6)]
    assert reached(rows, 0.5) == (100, 50, 150)
    assert reached([*rows, *never], 0.5) == (150, 50, math.inf)
    assert reached([*rows[:2], *never], 0.5) is None
    assert reached([row([[0, 0.0, 0], [100, 1.0, 0]], start_images=40)], 0.5)[0] == 90
    assert failed([*rows, row([[0, 0.5, 0], [64, 0.89, 0]]), row([[0, 0.95, 0]], failure="broke")], Gap(0.0, 1.0)) == 2


def test_paired_differences_are_over_prompts():
    found = paired([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0])
    assert (found["mean"], found["count"]) == (1.5, 2)


# ----------------------------------------------------------------------------
# Lockstep.


def test_lockstep_is_the_same_as_a_run_alone():
    lines = [Line("rdpo"), Line("cmaes", "cmaes", overrides=("ppo.rollout_batch_size=16", "ppo.rloo_k=8"))]
    lines.append(Line("pathwise", "pathwise", overrides=("ppo.rollout_batch_size=8", "ppo.rloo_k=2")))
    together = [toy_run(line, seed, 64) for line in lines for seed in (0, 1)]
    toy_lockstep().run(together)
    for run in together:
        alone = toy_run(run.line, run.seed, 64)
        toy_lockstep().run([alone])
        assert len(run.curve) == 2
        torch.testing.assert_close(torch.tensor(alone.curve), torch.tensor(run.curve))
        production = toy_run(run.line, run.seed, 64)
        for step in range(1, production.steps + 1):
            draw = production.learner.draw(production.runner, step)
            production.learner.update(step, production.runner.rollout(draw, production.learner.needs_gradients))
        for name in ("positions", "weights"):
            torch.testing.assert_close(getattr(production.mean_table(), name), getattr(run.mean_table(), name))


class Broken(ToyReward):
    """No number for one prompt."""

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return torch.where(torch.tensor([prompt == "bad" for prompt in prompts]), torch.nan, scores)


def test_a_reward_that_is_no_number_ends_its_own_run_only():
    runs = [toy_run(Line("rdpo"), seed, 64) for seed in (0, 1)]
    bad = runs[1].learner.draw
    runs[1].learner.draw = lambda runner, step: replace(bad(runner, step), prompts=["bad"] * 32)
    lockstep = toy_lockstep()
    lockstep.scorer.scorer.rewards = [Broken()]
    lockstep.run(runs)
    assert (runs[0].failure, runs[0].step) == (None, 2)
    assert "toy_reward gave nan" in runs[1].failure and runs[1].step == 0
    assert run_row(runs[1])["curve"][0][0] == 0 and json.dumps(run_row(runs[1]), allow_nan=False)


def test_batches_are_cut_into_pieces():
    run = toy_run(Line("rdpo"))
    draws = [run.learner.draw(run.runner, step) for step in (1, 2, 3)]
    whole, pieces = (roll_out(draws, BatchScorer(run.runner.scorer, size, 1), False) for size in (1000, 20))
    for one, other in zip(whole, pieces, strict=True):
        assert isinstance(one, Rollout) and len(one.rewards) == 32
        torch.testing.assert_close(one.rewards, other.rewards)


def test_crews_are_alike_and_fit_a_batch():
    lines = [Line("rdpo"), Line("short", images=64), Line("pathwise", "pathwise")]
    runs = [toy_run(line, seed) for line in lines for seed in range(3)]
    found = list(crews(runs, chunk=64, gradient_chunk=96))
    assert sorted(len(crew) for crew in found) == [1, 1, 2, 2, 3]
    assert all(len({(run.steps, run.learner.needs_gradients) for run in crew}) == 1 for crew in found)


# ----------------------------------------------------------------------------
# Rivals and variants.


def closed_form_rewards(sample):
    """Best, 0, for the positions 0.2 and 0.9 and the weights 0.3 and 0.7 in every interval."""
    arrays, wanted = sample.arrays, (torch.tensor([0.2, 0.9]), torch.tensor([0.3, 0.7]))
    return -sum((part - goal).square().sum((1, 2)) for part, goal in zip(arrays[:2], wanted, strict=True))


def stand_in_runner(ppo):
    return EPDRolloutRunner(ToyDenoiser(), RewardMix.of(REWARDS[0]), PROMPTS, START, ppo, seed=0)


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"pathwise", "plain mean"}))
def test_every_algorithm_improves_a_closed_form(name):
    """With noise of the prompts that is as large as what there is to gain."""
    population = {"cmaes": ("ppo.rollout_batch_size=64", "ppo.rloo_k=16"), "halving": ("ppo.rloo_k=16",)}
    config = run_config(TOY, Line(name, name, overrides=population.get(name, ())), 0, 1600, 4)
    learner, mean_table = ALGORITHMS[name](config, START)
    runner = stand_in_runner(config.ppo)

    def value():
        return closed_form_rewards(EPDParamPolicy(mean_table()).mean_sample(1)).item()

    first = value()
    for step in range(1, config.ppo.steps + 1):
        draw = learner.draw(runner, step)
        offsets = torch.tensor([int(prompt.split()[1]) % 7 / 7 for prompt in draw.prompts], dtype=torch.float64)
        learner.update(step, Rollout(draw, closed_form_rewards(draw.sample) + offsets))
    assert value() > 0.6 * first


def test_the_plain_mean_follows_the_longest_gradient():
    """Two images pull a position up, one, many times harder, down; pathwise itself goes with the two."""
    pulls = TableArrays(*(torch.zeros(3, *START.positions.shape, dtype=torch.float64) for _ in range(4)))
    pulls.positions[:, 0, 0] = torch.tensor([1.0, 1.0, -10.0])
    moved = []
    for kind in (PlainMean, Pathwise):
        policy = create_policy(run_config(TOY, Line("pathwise"), 0, 64, 4), START)
        learner = kind(policy, PPOConfig(steps=10), PathwiseConfig(learning_rate=0.01))
        draw = Draw(policy.mean_sample(3), ["a", "b", "c"], [0, 1, 2], torch.arange(3))
        learner.update(1, Rollout(draw, torch.zeros(3, dtype=torch.float64), pulls))
        moved.append((policy.mean_table().positions - START.positions)[0, 0].item())
    assert moved[0] < 0 < moved[1]


def test_vectors_and_tables():
    ppo = replace(Config().ppo, train_scale_dir=True)
    tables = VectorTables(START, ppo)
    assert tables.sizes == [6, 3, 6, 0]
    same = tables.table(torch.zeros(15, dtype=torch.float64))
    for name in ("positions", "weights", "scale_dir", "scale_time"):
        torch.testing.assert_close(getattr(same, name), getattr(START, name), atol=1e-4, rtol=0)
    other = tables.table(torch.linspace(-9, 9, 15, dtype=torch.float64))  # SolverTable checks what it is given
    assert other.scale_dir.max() <= 2 and (other.scale_time == 1).all()
    alone = VectorTables(cold_start_table(4, 1), replace(ppo, train_scale_dir=False))
    assert (alone.table(torch.ones(3, dtype=torch.float64)).weights == 1).all()


def test_a_generation_is_crossed():
    ppo = replace(Config().ppo, rollout_batch_size=6, rloo_k=3)
    sample = EPDParamPolicy(START).sample_tables([0, 1, 2])
    draw = crossed_draw(stand_in_runner(ppo), 1, sample, 2)
    assert draw.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(draw.prompts)) == len(set(draw.noise_seeds)) == 2
    assert torch.equal(draw.sample.weights[:3], draw.sample.weights[3:])


def test_halving_spends_the_same_in_every_step():
    ppo = replace(Config().ppo, rollout_batch_size=32, rloo_k=16)
    search, runner = SuccessiveHalving(START, ppo, 0), stand_in_runner(ppo)
    tables = []
    for step in range(1, 6):
        draw = search.draw(runner, step)
        assert len(draw.prompts) == 32
        tables.append(len(search.sums))
        search.update(step, Rollout(draw, closed_form_rewards(draw.sample)))
    assert tables == [16, 8, 4, 2, 16]
    before = closed_form_rewards(EPDParamPolicy(START).mean_sample(1))
    assert closed_form_rewards(EPDParamPolicy(search.mean_table()).mean_sample(1)) >= before


def test_cmaes_is_repeatable():
    ppo = replace(Config().ppo, rollout_batch_size=16, rloo_k=8)
    first, second = (CMAES(START, ppo, 3).draw(stand_in_runner(ppo), 1).sample.weights for _ in range(2))
    assert torch.equal(first, second)


def test_one_interval_is_drawn_and_credited():
    config = run_config(TOY, Line("x"), 0, 64, 4)
    policy = variant_policy(OneIntervalPolicy, config, START)
    sample = policy.sample_tables(list(range(8)))
    mean = policy.mean_sample(8)
    differs = (sample.weights != mean.weights).any(-1)
    assert differs.sum(1).tolist() == [1] * 8
    assert differs.int().argmax(1).tolist() == sample.rows.tolist()
    assert sample.rows.view(2, 4).unique(dim=1).shape == (2, 1)  # one for each prompt
    policy.log_prob(sample.select(torch.tensor([1]))).sum().backward()
    touched = policy.residuals.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [sample.rows[1].item()]


@pytest.mark.parametrize("kind", [AntitheticPolicy, SobolPolicy, CrossedPolicy])
def test_drawn_tables_have_the_policy_s_mean(kind):
    config = run_config(TOY, Line("x"), 0, 64, 4)
    policy = variant_policy(kind, config, START)
    means = torch.stack([policy.sample_tables(list(range(n, n + 32))).weights.mean(0) for n in range(0, 3200, 32)])
    torch.testing.assert_close(means.mean(0), START.weights, atol=0.03, rtol=0)


def test_antithetic_pairs_lie_opposite():
    policy = variant_policy(AntitheticPolicy, run_config(TOY, Line("x"), 0, 64, 4), START)
    weights = policy.sample_tables(list(range(64))).weights[:, :, 0]
    assert torch.corrcoef(torch.stack([weights[0::2].flatten(), weights[1::2].flatten()]))[0, 1] < -0.8


def test_natural_gradient_is_downhill_and_of_another_shape():
    config = run_config(TOY, Line("x"), 0, 64, 4)
    steps = []
    for kind in (RDPO, Fisher):
        policy = create_policy(config, START)
        kind(policy, config.ppo, 0)
        policy.log_prob(policy.sample_tables([1])).sum().backward()
        steps.append(policy.residuals.weight.grad)
    plain, natural = steps
    cosine = torch.nn.functional.cosine_similarity(plain.flatten(), natural.flatten(), dim=0)
    assert 0.1 < cosine < 0.999


def test_stratified_prompts_come_from_every_quarter():
    config = run_config(TOY, Line("x"), 0, 512, 4)
    policy = create_policy(config, START)
    learner, runner = Stratified(policy, config.ppo, 0, 128), stand_in_runner(config.ppo)
    difficulty = {prompt: float(index) for index, prompt in enumerate(PROMPTS)}
    for step in range(1, 5):
        draw = learner.draw(runner, step)
        assert len(set(draw.prompts)) == 32
        learner.update(step, Rollout(draw, torch.tensor([difficulty[prompt] for prompt in draw.prompts]).double()))
    ranked = sorted(learner.scores.values())
    draw = learner.draw(runner, 5)
    quarters = [ranked.index(difficulty[prompt]) // 32 for prompt in draw.prompts[::4]]
    assert sorted(quarters) == [0, 0, 1, 1, 2, 2, 3, 3]


# ----------------------------------------------------------------------------
# Lines, starts.


@pytest.mark.parametrize(("part", "setting"), jobs(list(TRAINED), list(SETTINGS)))
def test_lines_are_distinct_and_their_configurations_hold(part, setting):
    lines = TRAINED[part](setting)
    names = [(line.label, line.start) for line in lines]
    assert len(set(names)) == len(names)
    for line in lines:
        config = run_config(setting, line, 0, 2048, 128)
        assert line.algorithm in ALGORITHMS
        assert line.steps or config.ppo.steps * config.ppo.rollout_batch_size <= 2048


@pytest.mark.parametrize("preset", ["sd15_single", "sd15_parallel"])
def test_the_presets_train_as_the_best_lines_from_the_distilled_table(preset):
    config = load_config(f"training/ppo/cfgs/{preset}.yaml")
    near = run_config(SETTINGS["b"], Line("rdpo", overrides=NEAR), 0, 2048, 128).ppo
    size = {"steps": near.steps, "rollout_batch_size": near.rollout_batch_size, "rollout_micro_batch": None}
    assert replace(config.ppo, **size, train_scale_dir=False) == near
    [line] = [line for line in TRAINED["curves"](SETTINGS["b"]) if line.label == "pathwise, scale_dir, 1024 images"]
    measured = run_config(SETTINGS["b"], line, 0, 2048, 128)
    assert (config.trainer, config.pathwise) == (replace(measured.trainer, algorithm="pathwise"), measured.pathwise)
    assert config.ppo.train_scale_dir and measured.ppo.train_scale_dir


def test_the_plain_line_is_the_default_configuration():
    config, plain = run_config(SETTINGS["a"], Line("rdpo"), 0, 2048, 128), Config()
    assert config.policy == plain.policy and config.ppo == replace(plain.ppo, steps=64)


@pytest.mark.parametrize("points", [1, 2, 3])
def test_optimal_placement_is_of_second_order(points):
    positions, weights = optimal_rows(points)
    assert sum(weights) == pytest.approx(1)
    assert sum(w * r for w, r in zip(weights, positions, strict=True)) == pytest.approx(1 / 2)


def test_a_stretched_table_keeps_its_ends():
    rows = torch.linspace(0.2, 0.6, 5, dtype=torch.float64)[:, None]
    table = replace(cold_start_table(6, 2), positions=torch.cat([rows, rows + 0.2], dim=1))
    for intervals in (4, 5, 8):
        found = stretch(table, intervals).positions[:, 0]
        torch.testing.assert_close(found, torch.linspace(0.2, 0.6, intervals, dtype=torch.float64))


# ----------------------------------------------------------------------------
# The command and its files.


def stored_part(rows, cold=0.2):
    reference = {"reward": cold, "heldout": 0.1, "start_images": 0.0, "seconds": 0.0}
    return {
        "machine": {"device": "cpu", "cpu": "c", "threads": 1, "gpu": None, "torch": "t"},
        "settings": {"images": 64},
        "solver_code": "code",
        "command": "python -m benchmarks.learning",
        "date": "2026-01-01",
        "references": {"cold": reference},
        "rows": rows,
    }


def write_results(folder, parts):
    folder.mkdir(exist_ok=True)
    (folder / "learning.json").write_text(json.dumps({"format": 1, "parts": parts}))


@pytest.fixture
def made_up(tmp_path):
    rows = [row([[0, 0.2, 0.1], [100, 0.3 - 0.008 * seed, 0.2]], seed) for seed in (0, 1)]
    rows.append(row([[0, 0.25, 0.1], [100, 0.3, 0.2]], line="pathwise", start="distilled", start_images=50.0))
    ddim = {"solver": "ddim", "calls": 50, "reward": 0.28, "heldout": 0.2}
    ddim["scores"] = {"reward": [0.27, 0.29], "heldout": [0.2, 0.2]}
    write_results(tmp_path, {"curves_a": stored_part(rows), "references_a": stored_part([ddim])})
    return tmp_path


def test_report_of_made_up_results(made_up):
    assert learn("--parts", "none", "--outdir", made_up).exit_code == 0
    text = (made_up / "learning_tables.md").read_text()
    assert "Gap: 0.2000 (cold start) to 0.3000" in text
    [line] = [line for line in text.splitlines() if line.startswith("| rdpo ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["rdpo", "cold", "90 [90 - 98]", "95 [95 - never]", "99 [99 - never]"]
    assert cells[5].startswith("0.2960 ±") and cells[7:10] == ["0.0080", "92.0%", "0 of 2"]
    assert cells[10].startswith("+0.0160 ± 0.12") and cells[11] == "+0.0000 ± 0.0000"
    [line] = [line for line in text.splitlines() if line.startswith("| pathwise ")]
    assert line.split("|")[3].strip() == "130"  # 80 % of its way, and the 50 images of the start table
    assert 5_000 < (made_up / "learning.png").stat().st_size < 200_000


def test_report_of_times(made_up):
    """Of an image, and of a whole run where one was measured."""
    parts = json.loads((made_up / "learning.json").read_text())["parts"]
    for line in parts["curves_a"]["rows"]:
        line |= {"steps": 25, "images_per_step": 4}
    seconds = {"seconds_draw": 0.001, "seconds_rollout": 0.048, "seconds_update": 0.001}
    times = [{"line": name, "seconds_per_image": 0.05, **seconds, "images_per_step": 32} for name in ("rdpo", "cmaes")]
    write_results(made_up, parts | {"time_a": stored_part(times)})
    assert learn("--parts", "none", "--outdir", made_up).exit_code == 0
    text = (made_up / "learning_tables.md").read_text()
    assert "| rdpo | 50.00 | 1.00 | 48.00 | 1.00 | 100 | 5 |" in text
    assert "| cmaes | 50.00 | 1.00 | 48.00 | 1.00 | - | - |" in text


def test_the_gap_is_of_all_parts(made_up):
    parts = json.loads((made_up / "learning.json").read_text())["parts"]
    assert find_gap(parts, "a") == Gap(0.2, 0.3) and find_gap(parts, "b") is None
    parts["variants_a"] = stored_part([row([[0, 0.2, 0.1], [64, 0.5, 0.1], [128, 0.4, 0.1]])])
    assert find_gap(parts, "a") == Gap(0.2, 0.5)
    assert Gap(0.2, 0.4).open_share(0.35) == pytest.approx(0.25)


def test_merge(made_up, tmp_path):
    rows = [row([[0, 0.2, 0.1], [100, 0.29, 0.2]], seed) for seed in (1, 2)]
    write_results(tmp_path / "b", {"curves_a": stored_part(rows), "curves_b": stored_part(rows)})
    result = learn("--parts", "none", "--outdir", made_up, "--merge", tmp_path / "b")
    assert result.exit_code == 0, result.output
    parts = json.loads((made_up / "learning.json").read_text())["parts"]
    assert set(parts) == {"curves_a", "curves_b", "references_a"}
    keys = [(line["line"], line["seed"]) for line in parts["curves_a"]["rows"]]
    assert keys == [("rdpo", 0), ("rdpo", 1), ("pathwise", 0), ("rdpo", 2)]
    other = stored_part(rows) | {"settings": {"images": 128}}
    write_results(tmp_path / "c", {"curves_a": other})
    result = learn("--parts", "none", "--outdir", made_up, "--merge", tmp_path / "c")
    assert result.exit_code == 2 and "the part curves_a with another settings" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "speed"], "--parts: unknown name 'speed'"),
        (["--settings", "a,z"], "--settings: unknown name 'z'"),
        (["--parts", "curves", "--lines", "sgd"], "--lines: no chosen part has 'sgd'"),
        (["--parts", "curves", "--starts", "warm"], "--starts: no chosen part has 'warm'"),
        (["--parts", "none", "--merge", "nowhere"], "--merge: nowhere holds no learning.json"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    result = learn(*arguments, "--outdir", tmp_path)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]


def test_transfer_needs_curves(tmp_path):
    from benchmarks.learning_runs import measure_transfer

    with pytest.raises(UserError, match="needs the part curves_a"):
        measure_transfer(SimpleNamespace(rows=[]), SETTINGS["a"], None, None)


def test_help_needs_no_torch():
    code = "import sys, benchmarks.learning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_real_run_goes_on_where_it_stopped(tmp_path):
    command = ["--parts", "curves", "--settings", "a", "--images", 8, "--eval-prompts", 1, "--device", "cpu"]
    command += ["--starts", "cold", "--lines", "reference", "--outdir", tmp_path]
    result = learn(*command, "--seeds", 1)
    assert result.exit_code == 0, result.output
    part = json.loads((tmp_path / "learning.json").read_text())["parts"]["curves_a"]
    [line] = part["rows"]
    assert [point[0] for point in line["curve"]] == [0, 8] and line["failure"] is None
    assert line["curve"][0][1] == pytest.approx(part["references"]["cold"]["reward"], abs=1e-4)
    assert len(line["scores"]["heldout"]) == 1 and len(line["table"]["positions"]) == 5
    stamp = part["rows"]
    assert learn(*command, "--seeds", 1).exit_code == 0
    assert json.loads((tmp_path / "learning.json").read_text())["parts"]["curves_a"]["rows"] == stamp


def test_the_models_with_a_memory_are_the_models():
    prompts = ["a red apple", "a blue fish", "a red apple"]
    net, plain = load_denoiser("cpu", "float32", 7.5), create_model("emoji", guidance_rate=7.5)
    for wanted in (prompts[:1], prompts, prompts[1:]):  # met before, and not
        torch.testing.assert_close(net.encode_prompts(wanted).text, plain.encode_prompts(wanted).text)
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = quantize(net.decode(latents))
    torch.testing.assert_close(pictures, quantize(plain.decode(latents)))
    judge, other = BatchReward("emoji_reward", torch.device("cpu")), create_reward("emoji_reward")
    for _ in range(2):
        torch.testing.assert_close(judge.score(pictures, prompts), other.score(pictures, prompts))
    assert (net.at(3.0).guidance_rate, net.guidance_rate) == (3.0, 7.5)
