"""The policy against scipy's densities, and the promises about its draws and its mean."""

import numpy as np
import pytest
import torch
from scipy import stats

from training.ppo.policy import EPDParamPolicy
from training.table import SolverTable

POSITIONS = [[0.2, 0.5, 0.55], [0.3, 0.6, 0.9]]
WEIGHTS = [[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]]
SCALE_DIR = [[1.1, 0.9, 1.0], [1.0, 1.05, 0.98]]
SCALE_TIME = [[1.0, 1.02, 0.97], [0.95, 1.0, 1.01]]


def start_table(**changes):
    values = {"positions": POSITIONS, "weights": WEIGHTS, "scale_dir": SCALE_DIR, "scale_time": SCALE_TIME}
    return SolverTable(**{**values, **changes}, guidance_rate=3.0, dataset_name="emoji")


def trained_policy(**options):
    """A policy moved away from its start by a fixed random amount."""
    policy = EPDParamPolicy(start_table(), **options)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    return policy


BOTH_SCALES = {"parameterization": "direct", "train_scale_dir": True, "train_scale_time": True, "scale_std": 0.07}


def dirichlets(policy):
    output = policy.all_rows()
    return [row.detach().numpy() for alpha in (output.alpha_pos, output.alpha_weight) for row in alpha]


def log_normals(policy):
    output = policy.all_rows()
    medians = torch.cat([output.log_scale_dir, output.log_scale_time]).detach().exp().numpy().ravel()
    return [stats.lognorm(s=policy.scale_std, scale=median) for median in medians]


@pytest.mark.parametrize("parameterization", ["mlp", "direct"])
@pytest.mark.parametrize("scales", [False, True])
def test_initial_mean_is_the_start_table(parameterization, scales):
    table = start_table()
    policy = EPDParamPolicy(table, parameterization=parameterization, train_scale_dir=scales, train_scale_time=scales)
    mean = policy.mean_table()
    for name in ("positions", "weights", "scale_dir", "scale_time"):
        torch.testing.assert_close(getattr(mean, name), getattr(table, name), rtol=0, atol=1e-12)
    assert mean.metadata() == table.metadata()
    assert policy.kl().item() == pytest.approx(0, abs=1e-12)


def test_concentration_is_the_sum_of_a_row():
    output = EPDParamPolicy(start_table(), concentration=37.0).all_rows()
    torch.testing.assert_close(output.alpha_pos.sum(-1), torch.full((2,), 37.0, dtype=torch.float64))
    torch.testing.assert_close(output.alpha_weight.sum(-1), torch.full((2,), 37.0, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"parameterization": "mlp"}, BOTH_SCALES])
def test_log_prob_equals_scipy(options):
    policy = trained_policy(**options)
    sample = policy.sample_table(5, seed=1)
    for b in range(5):
        rows = [*sample.segments[b].numpy(), *sample.weights[b].numpy()]
        expected = sum(
            stats.dirichlet.logpdf(row / row.sum(), a) for row, a in zip(rows, dirichlets(policy), strict=True)
        )
        if policy.train_scale_dir:
            values = torch.cat([sample.scale_dir[b], sample.scale_time[b]]).numpy().ravel()
            expected += sum(law.logpdf(v) for v, law in zip(values, log_normals(policy), strict=True))
        assert sample.log_prob[b].item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(policy.log_prob(sample), sample.log_prob)
    assert not sample.log_prob.requires_grad and policy.log_prob(sample).requires_grad


@pytest.mark.parametrize("options", [{"parameterization": "mlp"}, BOTH_SCALES])
def test_entropy_equals_scipy(options):
    policy = trained_policy(**options)
    expected = sum(stats.dirichlet.entropy(alpha) for alpha in dirichlets(policy))
    if policy.train_scale_dir:
        expected += sum(law.entropy() for law in log_normals(policy))
    assert policy.entropy().item() == pytest.approx(expected, rel=1e-9)


def test_kl_is_the_mean_log_ratio_under_the_policy():
    policy, start = trained_policy(**BOTH_SCALES), EPDParamPolicy(start_table(), **BOTH_SCALES)
    kl = policy.kl().item()
    sample = policy.sample_table(4000, seed=2)
    ratios = (sample.log_prob - start.log_prob(sample)).detach().numpy()
    assert kl > 1
    assert abs(ratios.mean() - kl) < 4 * ratios.std() / np.sqrt(len(ratios))


def test_kl_of_one_row_by_integration():
    # K = 1: one position, so the segments follow a Beta law; its KL is a one-dimensional integral.
    policy = EPDParamPolicy(SolverTable(positions=[[0.3]], weights=[[1.0]]), 10.0, parameterization="direct")
    with torch.no_grad():
        policy.residuals.weight.copy_(torch.tensor([[0.5, -0.2, 0.9]]))
    now, start = stats.beta(*policy.all_rows().alpha_pos[0].detach().numpy()), stats.beta(3.0, 7.0)
    expected = now.expect(lambda r: now.logpdf(r) - start.logpdf(r))
    assert policy.kl().item() == pytest.approx(expected, rel=1e-6)


def test_draws_follow_the_dirichlet_law():
    policy = trained_policy(parameterization="direct", concentration=10.0)  # the smallest is below 1
    sample = policy.sample_table(3000, seed=3)
    rows = [*sample.segments.unbind(1), *sample.weights.unbind(1)]
    assert min(alpha.min() for alpha in dirichlets(policy)) < 1
    for values, alpha in zip(rows, dirichlets(policy), strict=True):
        for k, marginal in enumerate(values.T.numpy()):
            law = stats.beta(alpha[k], alpha.sum() - alpha[k])
            assert stats.kstest(marginal, law.cdf).pvalue > 1e-4
        law = stats.dirichlet(alpha)
        np.testing.assert_allclose(np.cov(values.T.numpy()), law.cov(), atol=0.012)


def test_scale_draws_follow_the_log_normal_law():
    policy = trained_policy(**BOTH_SCALES)
    sample = policy.sample_table(2000, seed=4)
    values = torch.cat([sample.scale_dir, sample.scale_time], dim=1).flatten(1)
    for drawn, law in zip(values.T.numpy(), log_normals(policy), strict=True):
        assert stats.kstest(drawn, law.cdf).pvalue > 1e-4


def test_frozen_scales_keep_the_start_values():
    policy = trained_policy(parameterization="direct", train_scale_time=True)
    sample = policy.sample_table(3, seed=0)
    torch.testing.assert_close(sample.scale_dir, start_table().scale_dir.expand(3, 2, 3))
    assert (sample.scale_time != start_table().scale_time).all()
    torch.testing.assert_close(policy.mean_table().scale_dir, start_table().scale_dir)
    # A frozen scale adds no density: the same draws, scored without any scale, differ by the trained ones alone.
    both = trained_policy(parameterization="direct")
    assert both.log_prob(sample).shape == (3,)
    assert both.sample_table(1, seed=0).log_prob.item() != policy.sample_table(1, seed=0).log_prob.item()


def test_another_concentration_keeps_the_mean_and_narrows_the_draws():
    policy = trained_policy(**BOTH_SCALES)
    mean, wide = policy.mean_table(), policy.sample_table(500, seed=3)
    policy.set_concentration(20.0 * 25)
    for name, array in policy.mean_arrays()._asdict().items():
        torch.testing.assert_close(array.detach(), getattr(mean, name))
    narrow = policy.sample_table(500, seed=3)
    ratio = wide.segments.std(0) / narrow.segments.std(0)  # a Dirichlet's variance is about 1 / (sum + 1)
    assert (ratio > 4).all() and (ratio < 6).all()
    fresh = EPDParamPolicy(start_table(), 500.0, **BOTH_SCALES)
    fresh.load_state_dict(policy.state_dict())
    torch.testing.assert_close(fresh.log_prob(narrow), policy.log_prob(narrow))
    torch.testing.assert_close(fresh.kl(), policy.kl())


def test_the_density_of_a_table_is_that_of_its_rows():
    policy = trained_policy(**BOTH_SCALES)
    sample = policy.sample_table(4, seed=1)
    rows = policy.log_prob_rows(sample)
    assert rows.shape == (4, 2)
    torch.testing.assert_close(rows.sum(1), policy.log_prob(sample))
    with torch.no_grad():
        policy.residuals.weight[1] += 0.1  # the second row's own numbers
    changed = policy.log_prob_rows(sample)
    assert torch.equal(changed[:, 0], rows[:, 0]) and (changed[:, 1] != rows[:, 1]).all()


def test_the_mean_sample_is_the_mean_table():
    policy = trained_policy(**BOTH_SCALES)
    sample = policy.mean_sample(3)
    for name, array in sample.arrays._asdict().items():
        torch.testing.assert_close(array, getattr(policy.mean_table(), name).expand(3, -1, -1))
    torch.testing.assert_close(policy.log_prob(sample), sample.log_prob)


@pytest.mark.parametrize("concentration", [1e-3, 0.1, 1e6])
def test_extreme_policies_still_draw_valid_tables(concentration):
    table = SolverTable(positions=[[1e-4, 2e-4]], weights=[[1e-4, 1 - 1e-4]])
    policy = EPDParamPolicy(table, concentration, parameterization="direct", train_scale_dir=True)
    for push in (-1e3, 0.0, 1e3):
        with torch.no_grad():
            policy.residuals.weight.fill_(push)
            policy.residuals.weight[:, ::2] *= -1
        sample = policy.sample_table(200, seed=0)
        assert sample.table.positions.shape == (200, 1, 2)  # building the table validates every row
        assert torch.isfinite(sample.log_prob).all()
        policy.log_prob(sample).sum().backward()
        assert policy.mean_table().positions.shape == (1, 2)


def test_draws_depend_on_seed_alone():
    policy = trained_policy(parameterization="direct")
    four, two = policy.sample_table(4, seed=9), policy.sample_table(2, seed=9)
    assert torch.equal(four.segments[:2], two.segments) and torch.equal(four.weights[:2], two.weights)
    torch.manual_seed(123)
    np.random.seed(7)
    assert torch.equal(policy.sample_table(4, seed=9).segments, four.segments)
    assert not torch.equal(policy.sample_table(4, seed=10).segments, four.segments)
    assert len({row.numpy().tobytes() for row in four.segments}) == 4


def test_sampling_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    EPDParamPolicy(start_table(), seed=3).sample_table(2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_mlp_weights_come_from_the_seed():
    first, same, other = (EPDParamPolicy(start_table(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_table_of_a_sample_and_selection():
    policy = trained_policy(**BOTH_SCALES)
    sample = policy.sample_table(6, seed=0)
    picked = sample.select(torch.tensor([4, 1]))
    assert torch.equal(picked.table.positions, sample.table.positions[[4, 1]])
    assert torch.equal(picked.log_prob, sample.log_prob[[4, 1]])
    assert torch.equal(sample.select(slice(2, 4)).table.scale_time, sample.scale_time[2:4])
    torch.testing.assert_close(sample.table.positions, sample.segments.cumsum(-1)[..., :3])
    assert sample.table.guidance_rate == 3.0


@pytest.mark.parametrize("parameterization", ["mlp", "direct"])
def test_gradient_raises_the_probability_of_a_better_table(parameterization):
    policy = EPDParamPolicy(start_table(), parameterization=parameterization, hidden_dim=16)
    sample = policy.sample_table(1, seed=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    (-policy.log_prob(sample)).sum().backward()
    optimizer.step()
    assert policy.log_prob(sample).item() > sample.log_prob.item()


def test_a_batched_start_table_is_refused():
    batched = EPDParamPolicy(start_table()).sample_table(2, seed=0).table
    with pytest.raises(ValueError, match="single table"):
        EPDParamPolicy(batched)
    with pytest.raises(ValueError, match="linear"):
        EPDParamPolicy(start_table(), parameterization="linear")
