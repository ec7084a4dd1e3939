"""PPO arithmetic on numbers small enough to work out by hand."""

import math

import pytest
import torch

from training.ppo.losses import advantages, clipped_surrogate, group_std, legacy_mixed_groups, ratio_statistics


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_leave_one_out_by_hand():
    # Group 7: 1, 2, 6 -> the others' means are 4, 3.5, 1.5; group 3: 10, 20 -> 20, 10.
    result = advantages(doubles(1, 10, 2, 20, 6), torch.tensor([7, 3, 7, 3, 7]), normalize=False)
    torch.testing.assert_close(result, doubles(-3, -10, -1.5, 10, 4.5))


def test_groups_are_told_by_id_not_by_position():
    random = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(24, dtype=torch.float64, generator=random), torch.arange(24) // 4
    order = torch.randperm(24, generator=random)
    shuffled = advantages(rewards[order], groups[order])
    torch.testing.assert_close(shuffled, advantages(rewards, groups)[order])


def test_a_prompt_that_is_easier_for_all_tables_gives_no_advantage():
    rewards = doubles(0.1, 0.2, 0.3, 0.4)
    groups = torch.tensor([0, 0, 1, 1])
    easier = rewards + doubles(0, 0, 5, 5)
    torch.testing.assert_close(advantages(easier, groups), advantages(rewards, groups))


def test_normalisation_is_over_the_batch_with_the_population_deviation():
    # Raw: -1, 1, -4, 4; mean 0, population variance (1 + 1 + 16 + 16) / 4 = 8.5.
    result = advantages(doubles(0, 1, 0, 4), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(result, doubles(-1, 1, -4, 4) / math.sqrt(8.5))


def test_equal_rewards_give_zero_not_amplified_rounding():
    result = advantages(torch.full((12,), 0.1, dtype=torch.float64), torch.arange(12) // 3)
    assert result.abs().max() < 1e-6


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="two samples"):
        advantages(doubles(1, 2, 3), torch.tensor([0, 0, 1]))


def test_legacy_groups_mix_prompts():
    # Samples 0-3 belong to prompt A and 4-7 to prompt B; each published column held A, A, B, B.
    groups = legacy_mixed_groups(8, 4)
    prompts = "AAAABBBB"
    assert [[prompts[n] for n in range(8) if groups[n] == g] for g in (0, 1)] == [list("AABB"), list("AABB")]
    assert [n for n in range(8) if groups[n] == 1] == [1, 3, 5, 7]
    # Only samples of prompt A were better than their baseline, although both prompts spread alike.
    raw = advantages(doubles(9, 8, 9, 8, 1, 0, 1, 0), groups, normalize=False)
    assert (raw[:4] > 0).all() and (raw[4:] < 0).all()


def test_group_std_is_the_spread_within_groups():
    # Deviations 1 within the first group and 3 within the second; the distance between the groups does not count.
    spread = group_std(doubles(100, 0, 102, 6), torch.tensor([4, 2, 4, 2]))
    assert spread.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # unclipped: d(-r A)/d log_prob = -r A
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # better and already likelier: clipped at 1.2, nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # better but less likely than before: pulled back with full force
        (0.5, -2.0, 1.6, 0.0),  # worse and already unlikelier: clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),  # worse and likelier: pushed down with full force
    ],
)
def test_clipped_surrogate_one_sample(ratio, advantage, loss, gradient):
    old = doubles(-3.0)
    log_prob = (old + math.log(ratio)).requires_grad_()
    value = clipped_surrogate(log_prob, old, doubles(advantage), clip_range=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(gradient)


def test_clipped_surrogate_is_a_mean():
    old = doubles(0, 0)
    value = clipped_surrogate(doubles(math.log(1.5), math.log(0.9)), old, doubles(1, -1), clip_range=0.2)
    assert value.item() == pytest.approx(-(1.2 - 0.9) / 2)


def test_ratio_statistics():
    ratios = doubles(1.0, 1.1, 0.7, 1.6)
    stats = ratio_statistics(ratios.log() - 5, torch.full((4,), -5.0, dtype=torch.float64), clip_range=0.2)
    assert stats.ratio_mean == pytest.approx(1.1)
    assert stats.ratio_max == pytest.approx(1.6)
    assert stats.clip_fraction == 0.5
    expected = (0 + 0.1 - math.log(1.1) - 0.3 - math.log(0.7) + 0.6 - math.log(1.6)) / 4
    assert stats.approx_kl == pytest.approx(expected)
