"""Solvers against exact trajectories, their orders of convergence, and independent implementations; float64 on CPU."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from closed_form import MixtureDenoiser, ShiftCond, gaussian_solution, reference_solution

from solver_utils import SOLVER_OPTIONS, SOLVERS_TO_ZERO, SolverError, adams_bashforth, check_options, get_schedule
from solvers import SOLVERS, epd_ipndm_sampler, epd_sampler

SIGMA0, SIGMA1 = 10.0, 0.05
F64 = torch.float64


def make_table(positions, weights, scale_time=None, scale_dir=None):
    """What a SolverTable holds, without its validation, so that equal points can be tried."""
    r, w = torch.as_tensor(positions, dtype=F64), torch.as_tensor(weights, dtype=F64)
    ones = torch.ones_like(r)
    return SimpleNamespace(
        positions=r,
        weights=w,
        scale_time=ones if scale_time is None else torch.as_tensor(scale_time, dtype=F64),
        scale_dir=ones if scale_dir is None else torch.as_tensor(scale_dir, dtype=F64),
    )


def constant_table(intervals, positions, weights):
    return make_table([positions] * intervals, [weights] * intervals)


def random_table(*shape, seed=3):
    """Rows like a trained table: positions increase, weights on the simplex, scales near 1. `shape` ends in K."""
    random = torch.Generator().manual_seed(seed)
    gaps = torch.rand(*shape[:-1], shape[-1] + 1, generator=random, dtype=F64) + 0.2
    weights = torch.rand(*shape, generator=random, dtype=F64) + 0.2
    return make_table(
        (gaps.cumsum(-1) / gaps.sum(-1, keepdim=True))[..., :-1],
        weights / weights.sum(-1, keepdim=True),
        0.9 + 0.2 * torch.rand(*shape, generator=random, dtype=F64),
        0.9 + 0.2 * torch.rand(*shape, generator=random, dtype=F64),
    )


def run(name, net, x, sigmas, cond=None, table=None, **options):
    """Run a solver; those that need a table get the midpoint table unless one is given."""
    if "table" in SOLVER_OPTIONS[name]:
        options["table"] = constant_table(len(sigmas) - 1, [0.5], [1.0]) if table is None else table
    return SOLVERS[name](net, x, sigmas, cond, **options)


def plain_epd(net, x, sigmas, table, cond=None):
    """EPD read off its four equations, one sample, one interval, one point at a time."""
    results = []
    for b in range(len(x)):
        row = x[b : b + 1]
        row_cond = None if cond is None else cond[b : b + 1]
        for i in range(len(sigmas) - 1):
            t, u = sigmas[i].item(), sigmas[i + 1].item()
            d = net.slope(row, torch.tensor(t, dtype=F64), row_cond)
            total = torch.zeros_like(row)
            for k in range(table.positions.shape[-1]):
                index = (b, i, k) if table.positions.ndim == 3 else (i, k)
                r, w = table.positions[index].item(), table.weights[index].item()
                a, c = table.scale_time[index].item(), table.scale_dir[index].item()
                tau = math.exp(r * math.log(u) + (1 - r) * math.log(t))
                total += w * c * a * net.slope(row + (tau - t) * d, torch.tensor(a * tau, dtype=F64), row_cond)
            row = row + (u - t) * total
        results.append(row)
    return torch.cat(results)


@pytest.fixture(scope="module")
def problem():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    return net, x, reference_solution(net, x, SIGMA0, SIGMA1)


# ----------------------------------------------------------------------------
# The exact solution and the order of convergence.

ORDERS = [
    ("ddim", {}, 1),
    ("dpm", {"inner_steps": 1}, 2),
    ("dpm", {"inner_steps": 2}, 2),
    ("dpm2", {}, 2),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("epd", {}, 2),
    ("ipndm", {"max_order": 1}, 1),
    ("ipndm", {"max_order": 2}, 2),
    # Equal-step weights on unequal steps and a low-order start hold the later orders at 2.
    ("ipndm", {"max_order": 3}, 2),
    ("ipndm", {"max_order": 4}, 2),
    ("epd_ipndm", {"max_order": 1}, 2),
    ("epd_ipndm", {"max_order": 4}, 2),
]


@pytest.mark.parametrize("schedule_type", ["polynomial", "logsnr"])
@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_observed_order(problem, name, options, order, schedule_type):
    net, x, exact = problem
    errors = []
    for intervals in (80, 160):
        sigmas = get_schedule(intervals + 1, SIGMA1, SIGMA0, schedule_type=schedule_type)
        errors.append((run(name, net, x, sigmas, **options) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.12)
    assert errors[1] < {1: 2e-2, 2: 5e-4}[order]


@pytest.mark.parametrize("name", SOLVERS)
def test_single_gaussian_closed_form(name):
    net = MixtureDenoiser(components=1)
    x = net.start(2, SIGMA0)
    sigmas = get_schedule(161, SIGMA1, SIGMA0)
    error = (run(name, net, x, sigmas) - gaussian_solution(net, x, SIGMA0, SIGMA1)).abs().max()
    assert error < (0.03 if name == "ddim" else 3e-4)


@pytest.fixture(scope="module")
def flow_problem():
    net = MixtureDenoiser(is_flow=True)
    x = net.start(2, 1.0)
    return net, x, reference_solution(net, x, 1.0, 0.003)


@pytest.mark.parametrize("name", SOLVERS)
def test_flow_model(flow_problem, name):
    net, x, exact = flow_problem
    sigmas = get_schedule(201, 0.003, 1.0, schedule_type="flowmatch", net=net)
    assert (run(name, net, x, sigmas) - exact).abs().max() < (0.05 if name == "ddim" else 1e-3)


class PowerNet:
    """A slope that depends on sigma alone, sigma^power: linear multistep rules are then plain quadrature."""

    is_flow = False

    def __init__(self, power):
        self.power = power

    def slope(self, x, sigma, cond=None):
        return torch.ones_like(x) * sigma**self.power


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_ipndm_weights_are_exact_to_their_degree(max_order):
    """Once the history is full, order k on equal steps integrates degree k-1 exactly and degree k wrongly."""
    sigmas = torch.linspace(3.0, 1.0, 9, dtype=F64)
    for power, is_exact in ((max_order - 1, True), (max_order, False)):
        states, x = [], torch.zeros(1, 1, 1, 1, dtype=F64)
        SOLVERS["ipndm"](
            PowerNet(power),
            x,
            sigmas,
            max_order=max_order,
            callback=lambda i, x, sigma, seen=states: seen.append(x.item()),
        )
        start, end = sigmas[max_order - 1].item(), sigmas[-1].item()
        integral = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        error = abs(states[8] - states[max_order - 1] - integral)
        assert (error < 1e-13) == is_exact, (power, error)


def test_ipndm_start_uses_lower_orders():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    t0, t1, t2, t3 = sigmas = get_schedule(4, SIGMA1, SIGMA0)
    d0 = net.slope(x, t0)
    x1 = x + (t1 - t0) * d0
    d1 = net.slope(x1, t1)
    x2 = x1 + (t2 - t1) * (3 * d1 - d0) / 2
    d2 = net.slope(x2, t2)
    x3 = x2 + (t3 - t2) * (23 * d2 - 16 * d1 + 5 * d0) / 12
    assert torch.allclose(run("ipndm", net, x, sigmas), x3, rtol=1e-13, atol=1e-13)
    x3_order2 = x2 + (t3 - t2) * (3 * d2 - d1) / 2
    assert torch.allclose(run("ipndm", net, x, sigmas, max_order=2), x3_order2, rtol=1e-13, atol=1e-13)


def test_dpm_inner_grid():
    """inner_steps m on one interval is dpm2 on the polynomial grid of m intervals inside it."""
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    fine = torch.linspace(SIGMA0 ** (1 / 7), SIGMA1 ** (1 / 7), 4, dtype=F64) ** 7
    coarse = torch.tensor([SIGMA0, SIGMA1], dtype=F64)
    assert torch.allclose(run("dpm", net, x, coarse, inner_steps=3), run("dpm2", net, x, fine), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------
# EPD.


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


@pytest.mark.parametrize("shape", [(5, 1), (5, 2), (5, 3), (3, 5, 2)])
def test_batched_epd_equals_sequential_epd(shape):
    """Also pins the row order b*K + k (conditions differ per sample) and both scales."""
    net = MixtureDenoiser()
    x = net.start(3, SIGMA0)
    cond = ShiftCond(torch.tensor([0.0, 1.0, -2.0], dtype=F64))
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    table = random_table(*shape)
    expected = plain_epd(net, x, sigmas, table, cond)
    net.calls = net.rows = 0
    result = run("epd", net, x, sigmas, cond, table=table)
    assert (result - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (net.calls, net.rows) == (10, 5 * 3 * (1 + shape[-1]))


def test_per_sample_tables_equal_separate_runs():
    net = MixtureDenoiser()
    x = net.start(3, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    tables = random_table(3, 5, 2)
    for name in ("epd", "epd_ipndm"):
        together = run(name, net, x, sigmas, table=tables)
        for b in range(3):
            own = SimpleNamespace(**{key: value[b] for key, value in vars(tables).items()})
            alone = run(name, net, x[b : b + 1], sigmas, table=own)
            assert torch.allclose(together[b : b + 1], alone, rtol=1e-12, atol=1e-12)


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
# EDM.


def karras_sampler(net, x, sigmas, s_churn, s_min, s_max, s_noise, noises):
    """Algorithm 2 of arXiv 2206.00364 in the paper's terms, through the denoiser D = x - sigma * slope."""

    def denoise(x, sigma):
        return x - sigma * net.slope(x, torch.tensor(sigma, dtype=F64))

    ts = sigmas.tolist()
    for i in range(len(ts) - 1):
        gamma = min(s_churn / (len(ts) - 1), math.sqrt(2) - 1) if s_min <= ts[i] <= s_max else 0.0
        t_hat = ts[i] + gamma * ts[i]
        if gamma > 0:
            x = x + math.sqrt(t_hat**2 - ts[i] ** 2) * s_noise * noises.pop(0)
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (ts[i + 1] - t_hat) * d
        if ts[i + 1] != 0:
            d_prime = (x_next - denoise(x_next, ts[i + 1])) / ts[i + 1]
            x_next = x + (ts[i + 1] - t_hat) * (d / 2 + d_prime / 2)
        x = x_next
    return x


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("churn", [(0.0, 0.0, math.inf, 1.0), (2.0, 0.3, 5.0, 1.007), (100.0, 0.0, math.inf, 1.0)])
def test_edm_against_its_paper(churn, to_zero):
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    sigmas = get_schedule(9, SIGMA1, SIGMA0)
    if to_zero:
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    noises = [torch.randn(x.shape, generator=torch.Generator().manual_seed(n), dtype=F64) for n in range(9)]
    left = list(noises)
    options = dict(zip(("s_churn", "s_min", "s_max", "s_noise"), churn, strict=True))
    result = run("edm", net, x, sigmas, **options, randn_like=lambda x: left.pop(0))
    expected = karras_sampler(net, x, sigmas, *churn, list(noises))
    assert torch.allclose(result, expected, rtol=1e-11, atol=1e-11)
    assert (len(left) < len(noises)) == (churn[0] > 0)


def test_edm_without_churn_is_heun(problem):
    net, x, _ = problem
    sigmas = get_schedule(9, SIGMA1, SIGMA0)
    assert torch.equal(run("edm", net, x, sigmas), run("heun", net, x, sigmas))


# ----------------------------------------------------------------------------
# Against diffusers.


def test_ddim_against_diffusers():
    """DDIMScheduler steps the variance-preserving state x / sqrt(1 + sigma^2) through its own table."""
    from diffusers import DDIMScheduler

    net = MixtureDenoiser()
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    times = scheduler.timesteps.tolist()  # 900, 800, ..., 0
    sigmas = (1 / scheduler.alphas_cumprod[times] - 1).sqrt()
    x = net.start(2, sigmas[0].item())
    sample = x / (1 + sigmas[0] ** 2).sqrt()
    for t, sigma in zip(times[:-1], sigmas[:-1], strict=True):
        eps = net.slope(sample * (1 + sigma**2).sqrt(), sigma)
        sample = scheduler.step(eps, t, sample).prev_sample
    expected = sample * (1 + sigmas[-1] ** 2).sqrt()
    assert torch.allclose(run("ddim", net, x, sigmas), expected, rtol=1e-10, atol=1e-10)


def test_edm_against_diffusers_heun():
    """HeunDiscreteScheduler ends at sigma 0 and keeps its sigmas in float32."""
    from diffusers import HeunDiscreteScheduler

    net = MixtureDenoiser()
    scheduler = HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    x = sample = net.start(2, scheduler.sigmas[0].item())
    for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        scheduler.scale_model_input(sample, t)  # moves the scheduler's step counter
        sample = scheduler.step(net.slope(sample, sigma.double()), t, sample).prev_sample
    sigmas = scheduler.sigmas.unique().flip(0).double()
    assert torch.allclose(run("edm", net, x, sigmas), sample, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------
# AFS, callback, dtypes, devices.


@pytest.mark.parametrize("name", SOLVERS)
def test_afs_replaces_the_first_slope_only(name):
    class FirstSlopeReplaced(MixtureDenoiser):
        def slope(self, x, sigma, cond=None):
            d = super().slope(x, sigma, cond)
            return x / math.sqrt(1 + SIGMA0**2) if self.calls == 1 else d

    x = MixtureDenoiser().start(2, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    replaced = run(name, FirstSlopeReplaced(), x, sigmas)
    result = run(name, MixtureDenoiser(), x, sigmas, afs=True)
    assert torch.allclose(result, replaced, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(result, run(name, MixtureDenoiser(), x, sigmas), rtol=1e-4)


def test_afs_in_dpm_touches_one_inner_step():
    counts = []
    for afs in (False, True):
        net = MixtureDenoiser()
        run("dpm", net, net.start(1, SIGMA0), get_schedule(5, SIGMA1, SIGMA0), inner_steps=3, afs=afs)
        counts.append(net.calls)
    assert counts == [24, 23]


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_sees_every_node(name):
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    seen = []
    result = run(name, net, x, sigmas, callback=lambda i, x, sigma: seen.append((i, x.clone(), sigma.item())))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert [sigma for _, _, sigma in seen] == sigmas.tolist()
    assert torch.equal(seen[0][1], x) and torch.equal(seen[-1][1], result)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name, dtype):
    """The result has at least float32 and float32 agrees with float64; every slope call gets the state's dtype."""
    net, dtypes = MixtureDenoiser(), set()

    class Recorder:
        is_flow = False

        def slope(self, x, sigma, cond=None):
            dtypes.add(x.dtype)
            return net.slope(x, sigma, cond)

    x = net.start(2, SIGMA0, dtype)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    table = random_table(2, 5, 2)
    result = run(name, Recorder(), x, sigmas, table=table)
    expected_dtype = F64 if dtype == F64 else torch.float32
    assert result.dtype == expected_dtype and dtypes == {expected_dtype}
    exact = run(name, net, x.double(), sigmas, table=table)
    assert torch.allclose(result.double(), exact, rtol=1e-4, atol=1e-4)


class MetaNet:
    """A net on the meta device, where reading any value raises: what passes there never waits for a device."""

    is_flow = False

    def slope(self, x, sigma, cond=None):
        if not (x.is_meta and sigma.is_meta and sigma.dtype == F64):
            raise ValueError(f"x on {x.device}, sigma {sigma.dtype} on {sigma.device}")
        return torch.empty_like(x)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_no_value_is_read_from_the_device(name, afs):
    options = {"edm": {"s_churn": 3.0, "randn_like": torch.empty_like}}.get(name, {})
    x = torch.empty(2, 3, 4, 4, device="meta")
    result = run(name, MetaNet(), x, get_schedule(6, SIGMA1, SIGMA0), afs=afs, **options)
    assert result.is_meta and result.shape == x.shape


def test_input_state_is_not_changed():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    before = x.clone()
    for name in SOLVERS:
        run(name, net, x, get_schedule(4, SIGMA1, SIGMA0))
    assert torch.equal(x, before)


# ----------------------------------------------------------------------------
# Mistakes.


def test_options_match_the_signatures():
    assert set(SOLVERS) == set(SOLVER_OPTIONS)
    for name, sampler in SOLVERS.items():
        parameters = inspect.signature(sampler).parameters
        assert list(parameters)[:4] == ["net", "x", "sigmas", "cond"]
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
        own = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert own.pop("afs") is False and own.pop("callback") is None
        assert {key: None if value is inspect.Parameter.empty else value for key, value in own.items()} == (
            SOLVER_OPTIONS[name]
        )


def test_check_options_names_the_takers():
    check_options("ipndm", {"max_order": 3})
    with pytest.raises(SolverError, match=r"^ddim takes no option max_order; it belongs to ipndm, epd_ipndm$"):
        check_options("ddim", {"max_order": 3})
    with pytest.raises(SolverError, match="no option maxorder; no solver has it"):
        check_options("ipndm", {"maxorder": 3})
    with pytest.raises(SolverError, match="unknown solver 'dmp'; use one of ddim, dpm, "):
        check_options("dmp", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ipndm", {"max_order": 7}, "max_order must be 1, 2, 3 or 4, got 7"),
        ("ipndm", {"max_order": 0}, "max_order must be"),
        ("epd_ipndm", {"max_order": 5}, "max_order must be"),
        ("dpm", {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ("edm", {"s_churn": 1.0}, "needs randn_like"),
        ("edm", {"s_churn": -1.0}, "s_churn must not be negative"),
        ("epd", {"table": constant_table(4, [0.5], [1.0])}, r"shape \(4, 1\) does not fit: 6 sigmas and 2 samples"),
        ("epd", {"table": random_table(3, 5, 2)}, r"shape \(3, 5, 2\) does not fit"),
        ("epd", {"table": make_table([0.5], [1.0])}, "does not fit"),
    ],
)
def test_bad_options_are_one_line(name, options, message):
    net = MixtureDenoiser()
    with pytest.raises(SolverError, match=message) as error:
        run(name, net, net.start(2, SIGMA0), get_schedule(6, SIGMA1, SIGMA0), **options)
    assert "\n" not in str(error.value) and net.calls == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_flow_models_refuse_afs(name):
    net = MixtureDenoiser(is_flow=True)
    with pytest.raises(SolverError, match="afs"):
        run(name, net, net.start(1, 1.0), get_schedule(4, 0.1, 1.0), afs=True)
    assert net.calls == 0


def test_flow_models_refuse_churn():
    net = MixtureDenoiser(is_flow=True)
    with pytest.raises(SolverError, match="flow model"):
        run("edm", net, net.start(1, 1.0), get_schedule(4, 0.1, 1.0), s_churn=1.0, randn_like=torch.randn_like)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0], [1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0], [1.0, -1.0]])
def test_bad_sigmas(sigmas):
    net = MixtureDenoiser()
    with pytest.raises(SolverError, match="sigmas must"):
        run("ddim", net, net.start(1, 1.0), torch.tensor(sigmas, dtype=F64))


@pytest.mark.parametrize("name", SOLVERS)
def test_sigma_zero(name):
    """A last node of 0 is reached by Euler or multistep steps, and refused by solvers that would evaluate there."""
    net = MixtureDenoiser(components=1)
    x = net.start(2, SIGMA0)
    sigmas = torch.cat([get_schedule(161, 0.01, SIGMA0), torch.zeros(1, dtype=F64)])
    if name in SOLVERS_TO_ZERO:
        assert (run(name, net, x, sigmas) - gaussian_solution(net, x, SIGMA0, 0.0)).abs().max() < 0.05
    else:
        with pytest.raises(SolverError, match=f"{name} cannot step to sigma 0"):
            run(name, net, x, sigmas)


def test_adams_bashforth_weights_sum_to_one():
    for order in (1, 2, 3, 4):
        ones = [torch.ones(1, 1, 1, 1, dtype=F64)] * order
        assert adams_bashforth(ones).item() == pytest.approx(1.0, abs=1e-15)
