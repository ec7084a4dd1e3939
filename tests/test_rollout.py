"""Rollouts and evaluations on the toy backbone: which draws they use, and that nothing else matters."""

import pytest
import torch
from toy_training import ToyDenoiser, ToyReward, colour

from solver_utils import get_schedule
from torch_utils.seeds import derive_seed, noise
from training.ppo.cold_start import cold_start_table
from training.ppo.config import EvaluationConfig, PPOConfig
from training.ppo.evaluation import MeanTableEvaluator
from training.ppo.policy import EPDParamPolicy
from training.ppo.rl_runner import EPDRolloutRunner, PromptOrder, RolloutError
from training.solver_table import SolverTable

PROMPTS = [f"prompt {n}" for n in range(7)]


def start():
    table = cold_start_table(4, 2)
    return SolverTable(table.positions, table.weights, dataset_name="toy", schedule_type="polynomial", schedule_rho=3.0)


def make_runner(reward=None, seed=3, **ppo):
    options = PPOConfig(**{"rollout_batch_size": 12, "rloo_k": 3, **ppo})
    return EPDRolloutRunner(ToyDenoiser(), reward or ToyReward(), PROMPTS, start(), options, seed)


def make_policy(concentration=20.0):
    return EPDParamPolicy(start(), concentration, parameterization="direct")


class RecordingReward(ToyReward):
    """The toy reward; keeps the images it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def score(self, images, prompts):
        self.seen.append(images)
        return super().score(images, prompts)


def test_every_prompt_is_used_before_any_repeats():
    order = PromptOrder(PROMPTS, seed=1)
    drawn = [prompt for step in range(1, 8) for prompt in order.take(step, 4)]  # 28 = 4 passes, some across a step
    passes = [drawn[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(one) == PROMPTS for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert [prompt for step in range(1, 8) for prompt in PromptOrder(PROMPTS, seed=2).take(step, 4)] != drawn


def test_the_prompts_of_a_step_do_not_depend_on_earlier_steps():
    used = PromptOrder(PROMPTS, seed=1)
    for step in range(1, 6):
        used.take(step, 4)
    assert PromptOrder(PROMPTS, seed=1).take(5, 4) == used.take(5, 4)


def test_more_prompts_a_step_than_there_are():
    assert sorted(PromptOrder(PROMPTS, seed=0).take(1, 14)) == sorted(PROMPTS * 2)


def test_samples_carry_their_group():
    rollout = make_runner().rollout(make_policy(), step=1)
    assert len(rollout.prompts) == len(rollout.rewards) == 12
    for group in range(4):
        members = {rollout.prompts[n] for n in range(12) if rollout.group_ids[n] == group}
        assert len(members) == 1
    assert len(set(rollout.prompts)) == 4
    assert (rollout.group_ids.bincount() == 3).all()


def epd_by_hand(x, table, sigmas, mean, std):
    """One sample, the equations of the paper spelled out: no batching, no shared code."""

    def slope(x, s):
        return s * (x - mean) / (std**2 + s**2)

    for i in range(len(sigmas) - 1):
        t, u = sigmas[i].item(), sigmas[i + 1].item()
        d, total = slope(x, t), 0
        for r, w, a, c in zip(*(part[i].tolist() for part in table), strict=True):
            tau = u**r * t ** (1 - r)
            total = total + w * c * a * slope(x + (tau - t) * d, a * tau)
        x = x + (u - t) * total
    return x


def test_each_image_comes_from_its_own_table_noise_and_prompt():
    reward = RecordingReward()
    runner = make_runner(reward)
    rollout = runner.rollout(make_policy(), step=2)
    images = torch.cat(reward.seen).double() * 2 - 1
    sigmas = get_schedule(4, 0.02, 20.0, schedule_type="polynomial", schedule_rho=3.0)
    table = rollout.sample.table
    for n, prompt in enumerate(rollout.prompts):
        # (run seed, purpose, step, prompt index, sample index), the last 0 for all where noise is shared
        seed = derive_seed(3, "noise", 2, n // 3, 0)
        x = noise([seed], (3, 4, 4))[0].double() * 20.0
        rows = (table.positions[n], table.weights[n], table.scale_time[n], table.scale_dir[n])
        expected = epd_by_hand(x, rows, sigmas, torch.tensor(colour(prompt)).double()[:, None, None], 0.1)
        assert (images[n] - expected.clamp(-1, 1)).abs().max() < 1.01 / 255 + 1e-4
        wanted = torch.tensor(colour(prompt)).double()[:, None, None]
        assert rollout.rewards[n].item() == pytest.approx(-(images[n] - wanted).abs().mean().item(), abs=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_noise(shared):
    # With tables that hardly differ, samples of one prompt look alike exactly when they start from the same noise.
    reward = RecordingReward()
    make_runner(reward, shared_noise=shared).rollout(make_policy(concentration=1e9), step=1)
    images = torch.cat(reward.seen).view(4, 3, -1)
    spread = (images - images[:, :1]).abs().amax(dim=(1, 2))
    assert (spread < 0.01).all() if shared else (spread > 0.01).all()
    assert (images[0, 0] - images[1, 0]).abs().max() > 0.01


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
def test_micro_batches_change_nothing(micro_batch):
    whole = make_runner().rollout(make_policy(), step=3)
    parts = make_runner(rollout_micro_batch=micro_batch).rollout(make_policy(), step=3)
    assert torch.equal(whole.rewards, parts.rewards)
    assert torch.equal(whole.sample.segments, parts.sample.segments)


def test_micro_batch_bounds_the_network_batch():
    reward = RecordingReward()
    make_runner(reward, rollout_micro_batch=5).rollout(make_policy(), step=1)
    assert [len(images) for images in reward.seen] == [5, 5, 2]


def test_draws_depend_on_run_seed_and_step_alone():
    policy = make_policy()
    used = make_runner()
    used.rollout(policy, step=1)
    again, fresh = used.rollout(policy, step=2), make_runner().rollout(policy, step=2)
    assert torch.equal(again.rewards, fresh.rewards) and again.prompts == fresh.prompts
    for other in (used.rollout(policy, step=3), make_runner(seed=4).rollout(policy, step=2)):
        assert not torch.equal(other.sample.segments, fresh.sample.segments)
        assert not torch.equal(other.rewards, fresh.rewards)


def test_a_reward_that_is_not_a_number_stops_with_its_prompt():
    class Broken(ToyReward):
        def score(self, images, prompts):
            scores = super().score(images, prompts)
            scores[4] = float("nan")
            return scores

    runner = make_runner(Broken())
    with pytest.raises(RolloutError, match="toy_reward gave nan for the prompt 'prompt"):
        runner.rollout(make_policy(), step=1)


def make_evaluator(micro_batch=None, reward=None, prompts=PROMPTS, **options):
    evaluation = EvaluationConfig(**{"grid_images": 5, "seed": 1, **options})
    rewards = [reward or ToyReward(), ToyReward("toy_spread", power=2)]
    return MeanTableEvaluator(ToyDenoiser(), rewards, prompts, start(), evaluation, micro_batch)


def test_evaluation_is_the_same_every_time_and_in_any_batch():
    evaluator = make_evaluator()
    table = make_policy().mean_table()
    first, second = evaluator.evaluate(table), evaluator.evaluate(table)
    parts = make_evaluator(micro_batch=2).evaluate(table)
    for other in (second, parts):
        assert torch.equal(first.scores["reward"], other.scores["reward"])
        assert torch.equal(first.scores["toy_spread"], other.scores["toy_spread"])
        assert torch.equal(first.images, other.images)
    assert first.images.shape == (5, 3, 4, 4)
    assert not torch.equal(make_evaluator(seed=2).evaluate(table).scores["reward"], first.scores["reward"])


def test_evaluation_pictures_are_the_scored_ones():
    reward = RecordingReward()
    evaluation = make_evaluator(micro_batch=3, reward=reward).evaluate(start())
    assert torch.equal(evaluation.images, torch.cat(reward.seen)[:5])
    assert len(make_evaluator(grid_images=0).evaluate(start()).images) == 0


def test_every_evaluation_image_has_noise_of_its_own():
    images = make_evaluator(prompts=["the same"] * 5).evaluate(start()).images
    assert all((images[i] - images[j]).abs().max() > 0.01 for i in range(5) for j in range(i))
