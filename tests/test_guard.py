"""The rule against reward hacking: which evaluations it flags, which is the best, and that a resumed run agrees."""

import math

import pytest
import torch

from torch_utils.checkpoint import load_checkpoint, save_checkpoint
from training.ppo.guard import Difference, HackingGuard, difference
from training.ppo.intervals import summarize

# Four prompts of very unequal difficulty.
START = [0.1, 0.4, 0.6, 0.9]
UP = [0.01, 0.02, 0.03, 0.04]  # significant: 0.025 +- 0.0205
NOISE = [0.05, -0.02, 0.04, -0.01]  # not significant: 0.015 +- 0.056


def moved(gaps, sign=1):
    return [score + sign * gap for score, gap in zip(START, gaps, strict=True)]


def scores(reward, held_out=None):
    """What an evaluation hands over: columns of one matrix."""
    columns = {"reward": reward} if held_out is None else {"reward": reward, "held": held_out}
    matrix = torch.tensor(list(columns.values()), dtype=torch.float64).T.contiguous()
    return dict(zip(columns, matrix.unbind(1), strict=True))


def started(metrics=("held",)):
    """A guard that has seen the start table at step 0."""
    guard = HackingGuard("emoji_reward", metrics)
    guard.judge(0, scores(START, START))
    return guard


def test_paired_interval_by_hand():
    # Gaps 1, 2, 3, 4: mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3, t(0.975, 3) = 3.182446.
    found = difference(torch.tensor([11.0, 102.0, 1003.0, 4.0]), torch.tensor([10.0, 100.0, 1000.0, 0.0]))
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert found.is_rise and not found.is_fall
    # 1, 2, 3, -1: mean 1.25, variance (0.0625 + 0.5625 + 3.0625 + 5.0625) / 3 = 35/12: half width 2.717 > 1.25.
    found = difference(torch.tensor([1.0, 2.0, 3.0, -1.0]), torch.zeros(4))
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(35 / 12) / 2, rel=1e-6)
    assert not found.is_rise and not found.is_fall


@pytest.mark.parametrize(
    ("mean", "half_width", "rise", "fall"),
    [
        (0.2, 0.1, True, False),
        (-0.2, 0.1, False, True),
        (0.1, 0.1, False, False),
        (-0.1, 0.1, False, False),
        (0.0, 0.0, False, False),
        (0.2, None, False, False),
        (-0.2, None, False, False),
    ],
)
def test_an_interval_that_touches_zero_says_nothing(mean, half_width, rise, fall):
    found = Difference(mean, half_width)
    assert (found.is_rise, found.is_fall) == (rise, fall)


def test_reward_up_and_held_out_down_is_diverging():
    verdict = started().judge(20, scores(moved(UP), moved(UP, -1)))
    assert verdict.diverging and not verdict.is_best and verdict.consecutive == 1
    assert verdict.reward.mean == pytest.approx(0.025) and verdict.held_out.mean == pytest.approx(-0.025)
    assert verdict.reward.half_width == pytest.approx(0.0205427, rel=1e-5)
    assert verdict.message == (
        "step 20: emoji_reward rose by 0.025 ± 0.021 over step 0, but held fell by 0.025 ± 0.021 (95 % intervals, 4 "
        "prompts): the policy exploits the reward; use policy-best.pt, which keeps step 0"
    )


def test_intervals_of_the_means_would_overlap_where_the_paired_one_is_clear():
    for sign in (1, -1):
        before, after = summarize(START)["ci95"], summarize(moved(UP, sign))["ci95"]
        assert before[0] < after[1] and after[0] < before[1]
    assert started().judge(20, scores(moved(UP), moved(UP, -1))).diverging


@pytest.mark.parametrize(
    ("reward", "held_out"),
    [
        (moved(NOISE), moved(UP, -1)),  # the reward's mean rises, but not significantly
        (moved(UP), moved(NOISE, -1)),  # the held-out mean falls, but not significantly
        (moved(UP), START),
        (START, moved(UP, -1)),
        (moved(UP), moved(UP)),
        (moved(UP, -1), moved(UP, -1)),
        (moved(UP, -1), moved(UP)),
        (START, START),
    ],
)
def test_anything_else_is_not(reward, held_out):
    verdict = started().judge(20, scores(reward, held_out))
    assert not verdict.diverging and verdict.consecutive == 0 and verdict.message is None


def test_the_first_evaluation_is_the_best_and_has_nothing_to_compare_with():
    verdict = HackingGuard("emoji_reward", ["held"]).judge(0, scores(START, START))
    assert verdict.is_best and not verdict.diverging
    assert verdict.reward is None and verdict.held_out is None


def test_the_best_follows_the_held_out_metric_beyond_its_noise():
    guard = started()
    assert guard.judge(1, scores(moved(UP), moved(NOISE, -1))).is_best  # the reward clearly higher, the other not lower
    assert (guard.best_step, guard.peak_step) == (1, 0)
    assert guard.summary() == (
        "policy-best.pt keeps step 1, the best by emoji_reward, with held level with its peak at step 0"
    )
    assert not guard.judge(2, scores(moved(UP), START)).is_best  # no more reward than the best, no more than the peak
    assert guard.judge(3, scores(moved(UP, -1), moved(NOISE))).is_best  # a new peak, whatever the reward
    assert (guard.best_step, guard.peak_step) == (3, 3)
    assert guard.summary() == "policy-best.pt keeps step 3, the best by held"
    assert not guard.judge(4, scores(moved(UP), moved([0.2, 0.3, 0.2, 0.3], -1))).is_best  # clearly below the peak
    assert not guard.judge(5, scores(moved(UP, -1), list(reversed(moved(NOISE))))).is_best  # the same mean
    assert (guard.best_step, guard.peak_step) == (3, 3)


def test_small_falls_do_not_add_up():
    """Each is lost in the noise of the one before, but what counts is the distance to the peak."""
    guard, best = started(), []
    for step in range(1, 5):
        held_out = moved([0.01 * step * (1 + 0.2 * (-1) ** n) for n in range(4)], -1)
        reward = moved([0.1 * step + 0.001 * gap for gap in UP])
        best.append(guard.judge(step, scores(reward, [a + 0.03 * b for a, b in zip(held_out, NOISE, strict=True)])))
    assert not any(verdict.is_best for verdict in best) and guard.best_step == 0


def test_differences_are_to_the_best_not_to_the_last_evaluation():
    guard = started()
    guard.judge(1, scores(moved(UP), moved(UP)))  # the new best
    guard.judge(2, scores(START, START))
    verdict = guard.judge(3, scores(moved(NOISE), START))
    assert verdict.held_out.mean == pytest.approx(-0.025) and verdict.held_out.is_fall
    assert verdict.reward.mean == pytest.approx(0.015 - 0.025)
    # A drift in steps too small to be seen one by one.
    guard = started()
    slight = [0.1 * gap + 0.001 * noise for gap, noise in zip(NOISE, UP, strict=True)]
    near, far = moved(UP), [a + b for a, b in zip(moved(UP), slight, strict=True)]
    guard.judge(1, scores(near, moved(UP, -1)))
    assert not difference(torch.tensor(far), torch.tensor(near)).is_rise
    assert guard.judge(2, scores(far, moved(UP, -1))).consecutive == 2


DIVERGING = (moved(UP), moved(UP, -1))
HARMLESS = (moved(NOISE), moved(NOISE, -1))


def test_consecutive_counts():
    guard = started()
    order = [DIVERGING, DIVERGING, HARMLESS, DIVERGING, (moved(UP), moved(UP)), DIVERGING]
    counts = [guard.judge(step, scores(*pair)).consecutive for step, pair in enumerate(order, start=1)]
    # The fifth is the new best, whose reward the sixth does not exceed.
    assert counts == [1, 2, 0, 1, 0, 0]


def test_a_single_prompt_gives_no_interval():
    guard = HackingGuard("emoji_reward", ["held"])
    assert guard.judge(0, scores([0.1], [0.9])).is_best
    verdict = guard.judge(1, scores([0.9], [0.1]))
    assert not verdict.diverging and not verdict.is_best
    assert verdict.reward.mean == pytest.approx(0.8) and verdict.reward.half_width is None
    assert guard.judge(2, scores([0.2], [0.95])).is_best


def test_without_a_held_out_metric_the_reward_leads():
    guard = HackingGuard("emoji_reward", [])
    rewards = [START, moved(UP), moved(UP, -1), moved(UP), moved([0.1] * 4)]
    verdicts = [guard.judge(step, scores(reward)) for step, reward in enumerate(rewards)]
    assert [verdict.is_best for verdict in verdicts] == [True, True, False, False, True]
    assert not any(verdict.diverging or verdict.held_out for verdict in verdicts)
    assert verdicts[1].reward.mean == pytest.approx(0.025)


def test_of_several_held_out_metrics_the_first_counts():
    down, up = torch.tensor(moved(UP, -1)), torch.tensor(moved(UP))
    for first, diverging in (("falls", True), ("rises", False)):
        second = {"falls": "rises", "rises": "falls"}[first]
        guard = HackingGuard("emoji_reward", [first, second])
        start = torch.tensor(START)
        guard.judge(0, {"reward": start, "rises": start, "falls": start})
        verdict = guard.judge(1, {"reward": up, "rises": up, "falls": down})
        assert verdict.diverging == diverging and verdict.is_best != diverging


def test_another_number_of_prompts_is_refused():
    for others in ([0.5], START[:3], [*START, 0.5]):
        with pytest.raises(ValueError, match="zip"):
            started().judge(1, scores(others, others))


HACKED = (moved([0.1, 0.2, 0.2, 0.1]), moved([0.2, 0.3, 0.3, 0.2], -1))
EVALUATIONS = [
    (START, START),
    (moved(NOISE), moved(NOISE)),  # the best until the sixth
    HACKED,
    HACKED,
    (START, moved(UP, -1)),
    (moved([0.2, 0.3, 0.3, 0.2]), moved([0.1, 0.2, 0.3, 0.2])),
    (moved([0.4, 0.5, 0.4, 0.5]), START),
]


@pytest.mark.parametrize("metrics", [["held"], []])
def test_a_restored_guard_judges_as_an_undisturbed_one(tmp_path, metrics):
    undisturbed = HackingGuard("emoji_reward", metrics)
    expected = [undisturbed.judge(step, scores(*pair)) for step, pair in enumerate(EVALUATIONS)]
    if metrics:
        assert [verdict.consecutive for verdict in expected] == [0, 0, 1, 2, 0, 0, 1]
    for stop in range(len(EVALUATIONS) + 1):
        before = HackingGuard("emoji_reward", metrics)
        found = [before.judge(step, scores(*pair)) for step, pair in enumerate(EVALUATIONS[:stop])]
        save_checkpoint(tmp_path / "guard.pt", {"guard": before.state()})
        after = HackingGuard("emoji_reward", metrics)
        after.restore(load_checkpoint(tmp_path / "guard.pt")["guard"])
        found += [after.judge(step, scores(*pair)) for step, pair in enumerate(EVALUATIONS) if step >= stop]
        assert found == expected


def test_what_is_kept_is_a_copy():
    guard = HackingGuard("emoji_reward", ["held"])
    first = scores(START, START)
    guard.judge(0, first)
    state = guard.state()
    for column in first.values():
        column.zero_()
    guard.judge(1, scores(moved(UP), moved(UP)))  # a new best leaves a state that was taken before as it was
    assert state["best_scores"]["held"].tolist() == START and state["best_step"] == 0
    assert state["best_scores"]["held"].untyped_storage().nbytes() == 4 * 8
