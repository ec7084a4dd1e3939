"""The multistep solvers beyond what every solver is tested for: weights, history, start and end; float64 on CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from solver_runs import F64, SIGMA0, SIGMA1, PowerNet, run, variants

from benchmarks.closed_form import MixtureDenoiser, reference_solution
from solver_utils import ADAMS_BASHFORTH, adams_weights, get_schedule
from solvers import SOLVERS
from training.denoisers.stable_diffusion import NoiseTable

# Far from equal steps, in no order.
UNEQUAL = torch.tensor([3.0, 2.9, 2.5, 2.35, 1.9, 1.84, 1.5, 1.1, 1.0], dtype=F64)


@pytest.fixture(scope="module")
def problem():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    return net, x, reference_solution(net, x, SIGMA0, SIGMA1)


# ----------------------------------------------------------------------------
# Weights.


def quadrature_error(name, net, sigmas, max_order, integral):
    """Error of the solver on a slope of sigma alone, from the first node with a full history to the last."""
    states, x = [], torch.zeros(1, 1, 1, 1, dtype=F64)
    SOLVERS[name](net, x, sigmas, max_order=max_order, callback=lambda i, x, sigma: states.append(x.item()))
    first = max_order - 1
    return abs(states[-1] - states[first] - (integral(sigmas[-1].item()) - integral(sigmas[first].item())))


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "sigmas"), [("ipndm", torch.linspace(3.0, 1.0, 9, dtype=F64)), ("ipndm_v", UNEQUAL)])
def test_weights_are_exact_to_their_degree(name, sigmas, max_order):
    """Once the history is full, order k integrates degree k-1 in sigma exactly and degree k wrongly: `ipndm` on equal
    steps only, `ipndm_v` on any."""
    for power, is_exact in ((max_order - 1, True), (max_order, False)):

        def integral(sigma, n=power + 1):
            return sigma**n / n

        error = quadrature_error(name, PowerNet(power), sigmas, max_order, integral)
        assert (error < 1e-13) == is_exact, (power, error)
        assert is_exact or error > 1e-4


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
@pytest.mark.parametrize("root", [1, 2, 3])
def test_deis_weights_are_exact_to_their_degree_in_time(root, max_order):
    """The same with a polynomial in time = sigma^(1/root); for root 1 `deis` is `ipndm_v`."""
    for power, is_exact in ((max_order - 1, True), (max_order, False)):

        def integral(sigma, n=power / root + 1):
            return sigma**n / n

        net = PowerNet(power, lambda sigma: sigma ** (1 / root))
        error = quadrature_error("deis", net, UNEQUAL, max_order, integral)
        assert (error < 1e-13) == is_exact, (power, error)
        assert is_exact or error > 1e-5


def test_deis_weights_on_a_time_with_corners():
    """Stable Diffusion's time is piecewise linear in log alpha: integrating it piece by piece gives the same weights,
    up to what the corners cost one quadrature over the whole interval."""
    table = NoiseTable(0.00085, 0.012, 1000)
    roots, shares = np.polynomial.legendre.leggauss(6)
    knots = table.sigma(table.times).numpy()
    nodes = get_schedule(9, 0.1, 14.6).tolist()
    times = table.sigma_inv(torch.tensor(nodes, dtype=F64)).numpy()
    for i, row in enumerate(adams_weights(nodes, 3, table.sigma_inv)):
        t, u = nodes[i], nodes[i + 1]
        edges = np.concatenate([[t], knots[(knots < t) & (knots > u)][::-1], [u]])
        upper, lower = edges[:-1, None], edges[1:, None]
        sigmas = (upper + lower) / 2 + (lower - upper) / 2 * roots
        tau = table.sigma_inv(torch.from_numpy(sigmas)).numpy()
        known = range(i, max(i - 3, -1), -1)
        for j, weight in zip(known, row, strict=True):
            value = (lower - upper) / 2 * shares
            for k in known:
                if k != j:
                    value = value * (tau - times[k]) / (times[j] - times[k])
            assert weight == pytest.approx(value.sum(), abs=1e-5 * (t - u))


def test_weights_of_equal_steps_are_adams_bashforth():
    for order, expected in ADAMS_BASHFORTH.items():
        assert sum(expected) == pytest.approx(1, abs=1e-15)
        row = adams_weights(torch.linspace(3.0, 1.0, 9, dtype=F64).tolist(), order, lambda sigma: sigma)[-1]
        assert row == pytest.approx([-0.25 * weight for weight in expected], abs=1e-14)


# ----------------------------------------------------------------------------
# Start and end.


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
    assert torch.allclose(run("ipndm", net, x, sigmas, max_order=4), x3, rtol=1e-13, atol=1e-13)
    x3_order2 = x2 + (t3 - t2) * (3 * d2 - d1) / 2
    assert torch.allclose(run("ipndm", net, x, sigmas, max_order=2), x3_order2, rtol=1e-13, atol=1e-13)


FULL_HISTORY = [
    *((name, {"max_order": k}, k) for name in ("ipndm_v", "deis") for k in (2, 3, 4)),
    *(
        ("unipc", {"max_order": k, "variant": variant, "lower_order_final": False}, k + 1)
        for variant in ("bh1", "bh2")
        for k in (2, 3)
    ),
]


@pytest.mark.parametrize("schedule_type", ["polynomial", "logsnr"])
@pytest.mark.parametrize(("name", "options", "order"), FULL_HISTORY)
def test_order_once_the_history_is_full(problem, name, options, order, schedule_type):
    """Extra nodes close behind the first make the low-order start exact, so that the order of the rest shows."""
    net, x, exact = problem
    errors = []
    close = SIGMA0 * (1 - 5e-4 * torch.arange(1, options["max_order"], dtype=F64))
    for intervals in (80, 160):
        sigmas = get_schedule(intervals + 1, SIGMA1, SIGMA0, schedule_type=schedule_type)
        sigmas = torch.cat([sigmas[:1], close, sigmas[1:]])
        errors.append((run(name, net, x, sigmas, **options) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    assert errors[1] < {2: 5e-4, 3: 3e-5, 4: 5e-6}[order]


LOWERED = [
    *(("dpmpp", {"max_order": k}) for k in (2, 3)),
    *(("unipc", {"max_order": k, "variant": variant}) for k in (2, 3) for variant in ("bh1", "bh2")),
]


@pytest.mark.parametrize("schedule_type", ["polynomial", "logsnr"])
@pytest.mark.parametrize(("name", "options"), LOWERED)
def test_lower_order_final_costs_one_euler_step(problem, name, options, schedule_type):
    """It changes the last intervals alone, by the h^2 of a step of order 1: that is why it holds the order at 2."""
    net, x, _ = problem
    changes = []
    for intervals in (80, 160):
        sigmas = get_schedule(intervals + 1, SIGMA1, SIGMA0, schedule_type=schedule_type)
        states = []
        for lower in (True, False):
            seen = []
            run(name, net, x, sigmas, **options, lower_order_final=lower, callback=lambda i, x, s, a=seen: a.append(x))
            states.append(torch.stack(seen))
        change = (states[0] - states[1]).abs().amax((1, 2, 3, 4))
        same = intervals + 1 - (options["max_order"] - 1)
        assert (change[:same] == 0).all() and (change[same:] > 0).all()
        changes.append(change[-1].item())
    assert math.log2(changes[0] / changes[1]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("is_flow", [False, True])
@pytest.mark.parametrize(("name", "options"), variants(["dpmpp", "unipc"]))
def test_a_last_node_of_zero_is_reached_by_an_euler_step(name, options, is_flow):
    """There the exponential step has no other limit, whatever the order before it."""
    net = MixtureDenoiser(is_flow=is_flow)
    start = 0.9 if is_flow else SIGMA0
    x = net.start(2, start)
    sigmas = get_schedule(7, SIGMA1, start)
    to_zero = torch.cat([sigmas, sigmas.new_zeros(1)])
    seen = []
    result = run(name, net, x, to_zero, **options, callback=lambda i, x, sigma: seen.append(x))
    expected = run("ddim", net, seen[-2], to_zero[-2:])
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)
    if not options["lower_order_final"]:
        assert torch.allclose(seen[-2], run(name, net, x, sigmas, **options), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("name", "options"), variants(["dpmpp", "unipc", "epd_dpmpp"]))
def test_flow_start_from_pure_noise_stays_out_of_the_history(name, options):
    """At sigma 1 the half log SNR is -inf: that interval is one step of order 1, and the next starts afresh."""
    net = MixtureDenoiser(is_flow=True)
    x = net.start(2, 1.0)
    sigmas = get_schedule(8, 0.05, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net)
    first = run(name, net, x, sigmas[:2], **options)
    if name != "epd_dpmpp":
        assert torch.allclose(first, run("ddim", net, x, sigmas[:2]), rtol=1e-13, atol=1e-13)
    expected = run(name, net, first, sigmas[1:], **options)
    assert torch.allclose(run(name, net, x, sigmas, **options), expected, rtol=1e-12, atol=1e-12)


def test_unipc_corrects_with_the_slope_that_predicts_next():
    """Two intervals of UniP-1/UniC-1 by hand: D at a predicted node serves both, and the last node is not corrected."""
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    t0, t1, t2 = sigmas = get_schedule(3, SIGMA1, SIGMA0)
    data0 = x - t0 * net.slope(x, t0)
    predicted = t1 / t0 * x + (1 - t1 / t0) * data0
    data1 = predicted - t1 * net.slope(predicted, t1)
    for variant, b_h in (("bh1", -torch.log(t0 / t1)), ("bh2", t1 / t0 - 1)):
        corrected = predicted - b_h * 0.5 * (data1 - data0)
        expected = t2 / t1 * corrected + (1 - t2 / t1) * data1
        result = run("unipc", net, x, sigmas, max_order=1, variant=variant)
        assert torch.allclose(result, expected, rtol=1e-13, atol=1e-13)
