"""EPD and its plug-ins against their equations read one sample and one point at a time; float64 on CPU."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from solver_runs import F64, SIGMA0, SIGMA1, TABLE_SOLVERS, constant_table, make_table, random_table, run, variants

from benchmarks.closed_form import MixtureDenoiser, ShiftCond, reference_solution
from solver_utils import SolverError, get_schedule
from solvers import epd_ipndm_sampler, epd_sampler, epd_slopes

SHIFTS = torch.tensor([0.0, 1.0, -2.0], dtype=F64)


@pytest.fixture(scope="module")
def problem():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    return net, x, reference_solution(net, x, SIGMA0, SIGMA1)


def lam_of(sigma, is_flow):
    return math.log((1 - sigma if is_flow else 1) / sigma)


def dpmpp_2211_01095(x, tau, nodes, data, is_flow):
    """From the last of `nodes` to tau by DPM-Solver++ with the data predictions at the last nodes, newest first.

    Order 1 and 2 are Algorithm 2 of the paper, order 3 is `multistep_dpm_solver_third_update` of its authors' code.
    """
    lams = [lam_of(node, is_flow) for node in nodes[::-1]]
    h = lam_of(tau, is_flow) - lams[0]
    alpha, phi = 1 - tau if is_flow else 1, math.expm1(-h)
    first = tau / nodes[-1] * x
    if len(data) == 1:
        return first - alpha * phi * data[0]
    r0 = (lams[0] - lams[1]) / h
    d10 = (data[0] - data[1]) / r0
    if len(data) == 2:
        return first - alpha * phi * (data[0] + d10 / 2)
    r1 = (lams[1] - lams[2]) / h
    d11 = (data[1] - data[2]) / r1
    d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
    return first - alpha * phi * data[0] + alpha * (phi / h + 1) * d1 - alpha * ((phi + h) / h**2 - 0.5) * d2


def plain(name, net, x, sigmas, table, cond=None, max_order=1, lower_order_final=True):
    """EPD or a plug-in read off its equations, one sample, one interval, one point at a time."""
    nodes, results = sigmas.tolist(), []
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    for b in range(len(x)):
        row, row_cond = x[b : b + 1], None if cond is None else cond[b : b + 1]
        slopes, datas = [], []  # newest first
        for i in range(len(nodes) - 1):
            t, u = nodes[i], nodes[i + 1]
            slopes.insert(0, net.slope(row, torch.tensor(t, dtype=F64), row_cond))
            datas.insert(0, row - t * slopes[0])
            order = min(i + 1, max_order)
            direction = sum(w * d for w, d in zip(weights[order], slopes[:order], strict=True))
            if name == "epd_dpmpp" and lower_order_final:
                order = min(order, len(nodes) - 1 - i)
            slope = data = 0
            for k in range(table.positions.shape[-1]):
                index = (b, i, k) if table.positions.ndim == 3 else (i, k)
                r, w = table.positions[index].item(), table.weights[index].item()
                a, c = table.scale_time[index].item(), table.scale_dir[index].item()
                tau = math.exp(r * math.log(u) + (1 - r) * math.log(t))
                if name == "epd_dpmpp":
                    x_k = dpmpp_2211_01095(row, tau, nodes[i + 1 - order : i + 1], datas[:order], net.is_flow)
                else:
                    x_k = row + (tau - t) * direction
                d_k = a * net.slope(x_k, torch.tensor(a * tau, dtype=F64), row_cond)
                slope = slope + w * c * d_k
                data = data + w * (x_k - tau * c * d_k)
            euler = row + (u - t) * slope
            row = dpmpp_2211_01095(row, u, [t], [data], net.is_flow) if name == "epd_dpmpp" else euler
        results.append(row)
    return torch.cat(results)


@pytest.mark.parametrize("shape", [(5, 1), (5, 3), (3, 5, 2), (3, 5, 8)])
@pytest.mark.parametrize(("name", "options"), variants(TABLE_SOLVERS))
def test_batched_equals_sequential(name, options, shape):
    """One call per stage equals one call per point. Pins the row order b*K + k (conditions and, with a batch axis,
    tables differ per sample) and both scales."""
    net = MixtureDenoiser()
    x = net.start(3, SIGMA0)
    cond = ShiftCond(SHIFTS)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    table = random_table(*shape)
    expected = plain(name, net, x, sigmas, table, cond, **options)
    net.calls = net.rows = 0
    result = run(name, net, x, sigmas, cond, table=table, **options)
    assert (result - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (net.calls, net.rows) == (10, 5 * 3 * (1 + shape[-1]))


@pytest.mark.parametrize(("name", "options"), variants(TABLE_SOLVERS))
def test_batched_equals_sequential_on_a_flow_model(name, options):
    net = MixtureDenoiser(is_flow=True)
    x = net.start(3, 0.8)
    sigmas = get_schedule(6, SIGMA1, 0.8)
    table = random_table(3, 5, 2)
    expected = plain(name, net, x, sigmas, table, ShiftCond(SHIFTS), **options)
    result = run(name, net, x, sigmas, ShiftCond(SHIFTS), table=table, **options)
    assert (result - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", TABLE_SOLVERS)
def test_per_sample_tables_equal_separate_runs(name):
    net = MixtureDenoiser()
    x = net.start(3, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    tables = random_table(3, 5, 2)
    together = run(name, net, x, sigmas, table=tables)
    for b in range(3):
        own = SimpleNamespace(**{key: value[b] for key, value in vars(tables).items()})
        alone = run(name, net, x[b : b + 1], sigmas, table=own)
        assert torch.allclose(together[b : b + 1], alone, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------
# max_rows.


class LargestCall(MixtureDenoiser):
    """Notes the rows of every call."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def slope(self, x, sigma, cond=None):
        self.sizes.append(len(x))
        return super().slope(x, sigma, cond)


@pytest.mark.parametrize("with_cond", [False, True])
@pytest.mark.parametrize("max_rows", [1, 3, 7, 9, 10, 100])
@pytest.mark.parametrize("name", TABLE_SOLVERS)
def test_max_rows_splits_calls_and_changes_nothing(name, max_rows, with_cond):
    """3 samples and 3 points: calls of 3 and 9 rows, split so that no row is lost, doubled or given another's table,
    level or condition."""
    net = LargestCall()
    x = net.start(3, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    cond = ShiftCond(SHIFTS) if with_cond else None
    table = random_table(3, 5, 3)
    whole = run(name, net, x, sigmas, cond, table=table)
    assert net.sizes == [3, 9] * 5
    net.sizes.clear()
    parts = run(name, net, x, sigmas, cond, table=table, max_rows=max_rows)
    assert (parts - whole).abs().max() < 1e-12 * whole.abs().max()
    assert max(net.sizes) <= max_rows and sum(net.sizes) == 5 * 12
    assert len(net.sizes) == 5 * (math.ceil(3 / max_rows) + math.ceil(9 / max_rows))  # no more calls than needed


@pytest.mark.parametrize("name", TABLE_SOLVERS)
def test_max_rows_below_one_is_refused(name):
    net = LargestCall()
    with pytest.raises(SolverError, match="max_rows must be at least 1, got 0"):
        run(name, net, net.start(2, SIGMA0), get_schedule(6, SIGMA1, SIGMA0), max_rows=0)
    assert net.sizes == []


# ----------------------------------------------------------------------------
# Tables with a meaning.


@pytest.mark.parametrize(("positions", "weights", "order"), [([0.2, 0.8], [0.5, 0.5], 2), ([0.2, 0.7], [0.5, 0.5], 1)])
@pytest.mark.parametrize("name", TABLE_SOLVERS)
def test_order_two_needs_points_with_mean_one_half(problem, name, positions, weights, order):
    net, x, exact = problem
    errors = []
    for intervals in (80, 160):
        sigmas = get_schedule(intervals + 1, SIGMA1, SIGMA0)
        table = constant_table(intervals, positions, weights)
        errors.append((run(name, net, x, sigmas, table=table) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_midpoint_table_is_dpm2(problem):
    net, x, _ = problem
    sigmas = get_schedule(7, SIGMA1, SIGMA0)
    assert (run("epd", net, x, sigmas) - run("dpm2", net, x, sigmas)).abs().max() < 1e-12


def test_equal_points_reduce_to_one(problem):
    net, x, _ = problem
    sigmas = get_schedule(7, SIGMA1, SIGMA0)
    two = constant_table(6, [0.4, 0.4], [0.3, 0.7])
    one = constant_table(6, [0.4], [1.0])
    assert (run("epd", net, x, sigmas, table=two) - run("epd", net, x, sigmas, table=one)).abs().max() < 1e-12


def test_scale_meaning():
    """d_k = c_k a_k slope(x_k, a_k tau_k): the point stays at tau_k, only the noise level told to the net moves."""
    net = MixtureDenoiser()
    x = net.start(1, SIGMA0)
    t, u = sigmas = torch.tensor([4.0, 1.0], dtype=F64)
    d = net.slope(x, t)
    x_k = x + (2.0 - 4.0) * d  # tau = sqrt(4 * 1)
    for a, c in ((1.2, 1.0), (1.0, 1.3), (0.8, 0.7)):
        expected = x + (u - t) * c * a * net.slope(x_k, torch.tensor(a * 2.0, dtype=F64))
        result = run("epd", net, x, sigmas, table=make_table([[0.5]], [[1.0]], [[a]], [[c]]))
        assert torch.allclose(result, expected, rtol=1e-13, atol=1e-13)


def test_epd_ipndm_reaches_points_along_the_multistep_direction():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    t0, t1, t2 = sigmas = get_schedule(3, SIGMA1, SIGMA0)
    table = random_table(2, 2)

    def ensemble(i, x, t, u, d):
        total = 0
        for r, w, a, c in zip(
            table.positions[i], table.weights[i], table.scale_time[i], table.scale_dir[i], strict=True
        ):
            tau = u**r * t ** (1 - r)
            total = total + w * c * a * net.slope(x + (tau - t) * d, a * tau)
        return total

    d0 = net.slope(x, t0)
    x1 = x + (t1 - t0) * ensemble(0, x, t0, t1, d0)
    d1 = net.slope(x1, t1)
    x2 = x1 + (t2 - t1) * ensemble(1, x1, t1, t2, (3 * d1 - d0) / 2)
    assert torch.allclose(epd_ipndm_sampler(net, x, sigmas, table=table), x2, rtol=1e-12, atol=1e-12)


def test_epd_ipndm_of_order_one_is_epd(problem):
    net, x, _ = problem
    sigmas, table = get_schedule(7, SIGMA1, SIGMA0), random_table(6, 2)
    plug_in = epd_ipndm_sampler(net, x, sigmas, table=table, max_order=1)
    assert torch.equal(plug_in, epd_sampler(net, x, sigmas, table=table))


# ----------------------------------------------------------------------------
# The slopes of one interval by themselves.


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1, 3)])
def test_slopes_of_an_interval_are_those_of_the_step(shape, afs):
    """Their weighted mean is the sampler's step, and each is c a slope(x + (tau - t) d, a tau)."""
    net, cond = MixtureDenoiser(), ShiftCond(SHIFTS)
    x = net.start(3, 4.0)
    t, u = sigmas = torch.tensor([4.0, 1.0], dtype=F64)
    table = random_table(*shape)
    slopes = epd_slopes(net, x, sigmas, cond, table=table, afs=afs)
    assert slopes.shape == (3, shape[-1], *x.shape[1:])
    weights = table.weights.expand(3, 1, -1)[:, 0, :, None, None, None]
    step = x + (u - t) * (weights * slopes).sum(1)
    assert torch.allclose(step, epd_sampler(net, x, sigmas, cond, table=table, afs=afs), rtol=1e-13, atol=1e-13)
    r, a, c = (part.expand(3, 1, -1)[:, 0] for part in (table.positions, table.scale_time, table.scale_dir))
    for b in range(3):
        row, row_cond = x[b : b + 1], cond[b : b + 1]
        d = row / math.sqrt(1 + 4.0**2) if afs else net.slope(row, t, row_cond)
        for k in range(shape[-1]):
            tau = u ** r[b, k] * t ** (1 - r[b, k])
            expected = c[b, k] * a[b, k] * net.slope(row + (tau - t) * d, a[b, k] * tau, row_cond)
            assert torch.allclose(slopes[b, k], expected[0], rtol=1e-12, atol=1e-13)


def test_slopes_of_an_interval_do_not_depend_on_the_weights_or_the_rows_of_a_call():
    net = LargestCall()
    x, sigmas = net.start(3, 4.0), torch.tensor([4.0, 1.0], dtype=F64)
    slopes = epd_slopes(net, x, sigmas, table=make_table([[0.2, 0.7]], [[0.5, 0.5]]))
    assert net.sizes == [3, 6]
    parts = epd_slopes(net, x, sigmas, table=make_table([[0.2, 0.7]], [[0.1, 0.9]]), max_rows=2)
    assert net.sizes == [3, 6, 2, 1, 2, 2, 2]
    assert torch.allclose(parts, slopes, rtol=1e-12, atol=1e-13)


def test_slopes_of_more_than_an_interval_are_refused():
    net = LargestCall()
    with pytest.raises(SolverError, match="two nodes of one interval, got 3"):
        epd_slopes(net, net.start(2, SIGMA0), get_schedule(3, SIGMA1, SIGMA0), table=random_table(2, 2))
    assert net.sizes == []
