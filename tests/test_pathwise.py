"""The pathwise update: which gradients count how much, and that it climbs."""

import pytest
import torch

from training.ppo.config import PathwiseConfig, PPOConfig
from training.ppo.pathwise import Pathwise, robust_mean
from training.ppo.policy import EPDParamPolicy, TableArrays
from training.ppo.rl_runner import Draw, Rollout
from training.table import SolverTable


def test_long_gradients_are_shortened_to_the_median():
    gradients = torch.tensor([[3.0, 4.0], [0.0, 1.0], [600.0, 800.0]], dtype=torch.float64)  # lengths 5, 1, 1000
    mean, norms = robust_mean(gradients)
    assert norms.tolist() == [5, 1, 1000]
    torch.testing.assert_close(mean, torch.tensor([3.0 + 0 + 3, 4.0 + 1 + 4], dtype=torch.float64) / 3)


def test_a_gradient_that_is_not_finite_counts_as_zero():
    gradients = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [0.0, 2.0]], dtype=torch.float64)
    mean, norms = robust_mean(gradients)
    assert norms.tolist() == [1, float("inf"), 2]
    assert mean.tolist() == pytest.approx([1 / 3, 2 / 3])
    mean, _ = robust_mean(torch.full((2, 3), float("inf"), dtype=torch.float64))
    assert mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scales", [False, True])
def test_an_update_moves_the_mean_table_along_the_gradient(scales):
    table = SolverTable(positions=[[0.3, 0.6]] * 2, weights=[[0.5, 0.5]] * 2)
    policy = EPDParamPolicy(table, parameterization="direct", train_scale_dir=scales)
    learner = Pathwise(policy, PPOConfig(steps=10), PathwiseConfig(learning_rate=0.01))
    wanted = TableArrays(*(torch.zeros(3, 2, 2, dtype=torch.float64) for _ in range(4)))
    wanted.positions[:, 0, 1] = 1.0  # the second point of the first row later
    wanted.weights[:, 1, 0] = 1.0  # more weight on the first point of the second row
    wanted.scale_dir[:, 1, 1] = -1.0
    draw = Draw(policy.mean_sample(3), ["a", "b", "c"], [0, 1, 2], torch.arange(3))
    statistics = learner.update(1, Rollout(draw, torch.zeros(3, dtype=torch.float64), wanted))
    after = policy.mean_table()
    assert after.positions[0, 1] > 0.6 and after.weights[1, 0] > 0.5
    torch.testing.assert_close(after.positions[1], table.positions[1])  # rows are independent
    assert (after.scale_dir[1, 1] < 1) == scales
    assert statistics["learning_rate"] == 0.01 and statistics["kl"] > 0
    assert learner.update(6, Rollout(draw, torch.zeros(3), wanted))["learning_rate"] == pytest.approx(0.005)
