"""Rollouts and evaluations on the toy backbone: which draws they use, and that nothing else matters."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from toy_training import ToyDenoiser, ToyReward, colour

from solver_utils import get_schedule
from solvers import epd_sampler
from torch_utils.determinism import fixed_order
from torch_utils.seeds import derive_seed, noise
from training.denoisers import create_model
from training.generate import initial_latents
from training.ppo.cold_start import cold_start_table
from training.ppo.config import EvaluationConfig, PPOConfig
from training.ppo.evaluation import MeanTableEvaluator
from training.ppo.policy import EPDParamPolicy, TableArrays
from training.ppo.reward_mix import RewardMix
from training.ppo.reward_multi import create_reward
from training.ppo.rl_runner import EPDRolloutRunner, ImageScorer, PromptOrder, first_broken
from training.solver_table import SolverTable

PROMPTS = [f"prompt {n}" for n in range(7)]


def start():
    table = cold_start_table(4, 2)
    return SolverTable(table.positions, table.weights, dataset_name="toy", schedule_type="polynomial", schedule_rho=3.0)


def make_runner(reward=None, seed=3, **ppo):
    options = PPOConfig(**{"rollout_batch_size": 12, "rloo_k": 3, **ppo})
    return EPDRolloutRunner(ToyDenoiser(), RewardMix.of(reward or ToyReward()), PROMPTS, start(), options, seed)


def make_policy(concentration=20.0):
    return EPDParamPolicy(start(), concentration, parameterization="direct")


def roll_out(runner, policy, step):
    return runner.rollout(runner.draw(policy, step))


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
    rollout = roll_out(make_runner(), make_policy(), step=1)
    assert len(rollout.draw.prompts) == len(rollout.rewards) == 12
    for group in range(4):
        members = {rollout.draw.prompts[n] for n in range(12) if rollout.draw.group_ids[n] == group}
        assert len(members) == 1
    assert len(set(rollout.draw.prompts)) == 4
    assert (rollout.draw.group_ids.bincount() == 3).all()


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
    rollout = roll_out(runner, make_policy(), step=2)
    images = torch.cat(reward.seen).double() * 2 - 1
    sigmas = get_schedule(4, 0.02, 20.0, schedule_type="polynomial", schedule_rho=3.0)
    table = rollout.draw.sample.table
    for n, prompt in enumerate(rollout.draw.prompts):
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
    roll_out(make_runner(reward, shared_noise=shared), make_policy(concentration=1e9), step=1)
    images = torch.cat(reward.seen).view(4, 3, -1)
    spread = (images - images[:, :1]).abs().amax(dim=(1, 2))
    assert (spread < 0.01).all() if shared else (spread > 0.01).all()
    assert (images[0, 0] - images[1, 0]).abs().max() > 0.01


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 100])
def test_micro_batches_change_nothing(micro_batch):
    whole = roll_out(make_runner(), make_policy(), step=3)
    parts = roll_out(make_runner(rollout_micro_batch=micro_batch), make_policy(), step=3)
    assert torch.equal(whole.rewards, parts.rewards)
    assert torch.equal(whole.draw.sample.segments, parts.draw.sample.segments)


def test_micro_batch_bounds_the_network_batch():
    reward = RecordingReward()
    roll_out(make_runner(reward, rollout_micro_batch=5), make_policy(), step=1)
    assert [len(images) for images in reward.seen] == [5, 5, 2]


def test_draws_depend_on_run_seed_and_step_alone():
    policy = make_policy()
    used = make_runner()
    roll_out(used, policy, step=1)
    again, fresh = roll_out(used, policy, step=2), roll_out(make_runner(), policy, step=2)
    assert torch.equal(again.rewards, fresh.rewards) and again.draw.prompts == fresh.draw.prompts
    for other in (roll_out(used, policy, step=3), roll_out(make_runner(seed=4), policy, step=2)):
        assert not torch.equal(other.draw.sample.segments, fresh.draw.sample.segments)
        assert not torch.equal(other.rewards, fresh.rewards)


def test_a_group_with_a_score_that_is_not_a_number_is_left_out():
    class Broken(ToyReward):
        def score(self, images, prompts):
            scores = super().score(images, prompts)
            scores[4] = float("nan")
            return scores

    runner = make_runner(Broken())
    rollout = roll_out(runner, make_policy(), step=1)
    prompts = rollout.draw.prompts
    words = first_broken(rollout.raw, runner.mix.rewards, prompts)
    assert words == f"toy_reward gave nan for the prompt {prompts[4]!r}"
    kept, dropped = rollout.finite_groups()
    assert dropped == 1 and len(kept.rewards) == 9 and kept.rewards.isfinite().all()
    assert prompts[4] not in kept.draw.prompts and torch.equal(kept.rewards[:3], rollout.rewards[:3])
    assert torch.equal(kept.draw.group_ids, torch.tensor([0, 0, 0, 2, 2, 2, 3, 3, 3]))
    assert torch.equal(kept.draw.sample.log_prob[3:], rollout.draw.sample.log_prob[6:])


def shifted(arrays, name, index, by):
    """`arrays` with one number of one sample changed."""
    part = getattr(arrays, name).clone()
    part[index] += by
    return arrays._replace(**{name: part})


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_pathwise_gradient_is_the_derivative_of_the_reward(micro_batch):
    class Smooth(ToyReward):
        """In float64, without the kink of the distance."""

        def score(self, images, prompts):
            wanted = torch.tensor([colour(prompt) for prompt in prompts], dtype=torch.float64)[:, :, None, None]
            return -((images.double() * 2 - 1 - wanted) ** 2).flatten(1).mean(1)

    runner = make_runner(Smooth(), rollout_batch_size=3, rollout_micro_batch=micro_batch)
    draw = runner.draw_mean(make_policy(), step=1)
    rollout = runner.rollout(draw, with_gradients=True)
    assert torch.equal(rollout.rewards, runner.rollout(draw).rewards)  # the very pixels that are scored otherwise
    assert rollout.gradients.positions.shape == (3, 3, 2)
    # The reward is of 8-bit pixels, a staircase: the difference quotient is taken on the unrounded ones.
    scorer = ImageScorer(ToyDenoiser(), RewardMix.of(Smooth()), start(), None)

    def smooth_scores(arrays):
        x, _ = initial_latents(scorer.net, draw.prompts, draw.noise_seeds, scorer.sigmas)
        cond = scorer.net.encode_prompts(draw.prompts)
        images = epd_sampler(scorer.net, x.double(), scorer.sigmas, cond, table=arrays)
        return Smooth().score(((images + 1) / 2).clamp(0, 1), draw.prompts)

    for name in TableArrays._fields:
        gradient = getattr(rollout.gradients, name)
        for index in ((0, 0, 0), (1, 1, 1), (2, 2, 0)):
            up, down = (smooth_scores(shifted(draw.sample.arrays, name, index, by)) for by in (1e-4, -1e-4))
            quotient = ((up - down) / 2e-4)[index[0]].item()
            assert gradient[index].item() == pytest.approx(quotient, rel=0.03, abs=2e-4), (name, index)


class ScoresPutInPlace(ToyReward):
    """The toy reward by way of an operation for which PyTorch has no fixed order."""

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return torch.zeros_like(scores).put(torch.arange(len(scores)), scores)


def test_a_reward_without_a_fixed_order_is_noted_once_and_climbed_all_the_same(capfd):
    runners = [make_runner(reward, rollout_micro_batch=4) for reward in (ToyReward(), ScoresPutInPlace())]
    ordered, unordered = (
        [runner.rollout(runner.draw(make_policy(), step), with_gradients=True) for step in (1, 2)] for runner in runners
    )
    for one, other in zip(ordered, unordered, strict=True):
        for part, same in zip(one.gradients, other.gradients, strict=True):
            assert torch.equal(part, same) and part.any()
    (note,) = capfd.readouterr().err.splitlines()
    assert note.startswith("note: put_ does not have a deterministic implementation: gradients are not the same")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_fixed_order_ends_with_its_block_and_hides_no_error():
    settings = torch.utils.deterministic
    assert settings.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="elements") as caught, fixed_order():
        assert torch.are_deterministic_algorithms_enabled() and not settings.fill_uninitialized_memory
        torch.ones(2) @ torch.ones(3)
    assert caught.type is RuntimeError
    assert not torch.are_deterministic_algorithms_enabled() and settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with fixed_order():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # as it was before
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_keep_no_activations_of_the_network():
    """Beside the backward pass of one call, memory holds states and tables, whatever the number of intervals."""

    def kept(num_steps):
        table = cold_start_table(num_steps, 2)
        scorer = ImageScorer(net, RewardMix.of(reward), table, None)
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            scorer.gradients(EPDParamPolicy(table).mean_sample(1).arrays, ["a cat"], [1])
        return sum(sizes)

    net, reward = create_model("emoji", guidance_rate=7.5), create_reward("emoji_reward")
    latents = 4 * net.img_channels * net.img_resolution**2
    assert kept(4) - kept(3) < 10 * latents  # an interval's activations are worth 29,000


def test_the_mean_draw_takes_every_prompt_once_with_the_mean_table():
    policy = make_policy()
    draw = make_runner(rollout_batch_size=7, rloo_k=7).draw_mean(policy, step=2)
    assert sorted(draw.prompts) == PROMPTS and len(set(draw.noise_seeds)) == 7
    for sampled in draw.sample.table.positions:
        torch.testing.assert_close(sampled, start().positions)


def make_evaluator(micro_batch=None, reward=None, prompts=PROMPTS, **options):
    evaluation = EvaluationConfig(**{"grid_images": 5, "seed": 1, **options})
    judges = RewardMix.of(reward or ToyReward()), [ToyReward("toy_spread", power=2)]
    return MeanTableEvaluator(ToyDenoiser(), *judges, prompts, start(), evaluation, micro_batch)


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
