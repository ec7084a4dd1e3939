"""What every solver is tested for: exact trajectories, order of convergence, and the shared call; float64 on CPU."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from solver_runs import F64, SIGMA0, SIGMA1, constant_table, make_table, random_table, run, variants

from benchmarks.closed_form import MixtureDenoiser, gaussian_solution, reference_solution
from solver_utils import (
    HIGHEST_ORDER,
    ONE_EVALUATION,
    SOLVER_OPTIONS,
    SOLVERS_TO_ZERO,
    UNIPC_VARIANTS,
    SolverError,
    check_options,
    get_schedule,
)
from solvers import SOLVERS


@pytest.fixture(scope="module")
def problem():
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    return net, x, reference_solution(net, x, SIGMA0, SIGMA1)


# ----------------------------------------------------------------------------
# The exact solution and the order of convergence.

# The order each solver shows at 40 and 80 intervals. Of the rest, `ipndm_v` and `deis` of order 3 and 4 are between the
# order of their formula and that of their start there, `unipc` of order 2 with `lower_order_final` and of order 3
# without between their own and that of the last or first step: tests/test_multistep.py takes the parts one by one.
ORDERS = [
    ("ddim", {}, 1),
    ("dpm", {"inner_steps": 1}, 2),
    ("dpm", {"inner_steps": 2}, 2),
    ("dpm2", {}, 2),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("epd", {}, 2),
    ("ipndm", {"max_order": 1}, 1),
    # Equal-step weights on unequal steps and a low-order start hold the later orders at 2.
    *(("ipndm", {"max_order": k}, 2) for k in (2, 3, 4)),
    *((name, {"max_order": k}, k) for name in ("ipndm_v", "deis") for k in (1, 2)),
    # The published order 3 takes half the second derivative.
    *(
        ("dpmpp", {"max_order": k, "lower_order_final": lower}, order)
        for k, order in ((1, 1), (2, 2), (3, 2))
        for lower in (True, False)
    ),
    *(
        ("unipc", {"max_order": k, "variant": variant, "lower_order_final": lower}, order)
        for k, lower, order in ((1, True, 2), (1, False, 2), (2, False, 3), (3, True, 2))
        for variant in UNIPC_VARIANTS
    ),
    ("epd_ipndm", {"max_order": 1}, 2),
    ("epd_ipndm", {"max_order": 3}, 2),
    ("epd_ipndm", {"max_order": 4}, 2),
    *(("epd_dpmpp", {"max_order": k, "lower_order_final": lower}, 2) for k in (1, 2, 3) for lower in (True, False)),
]


@pytest.mark.parametrize("schedule_type", ["polynomial", "logsnr"])
@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_observed_order(problem, name, options, order, schedule_type):
    net, x, exact = problem
    errors = []
    for intervals in (40, 80):
        sigmas = get_schedule(intervals + 1, SIGMA1, SIGMA0, schedule_type=schedule_type)
        errors.append((run(name, net, x, sigmas, **options) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    assert errors[1] < {1: 2e-2, 2: 1.3e-3, 3: 1e-4}[order]


@pytest.fixture(scope="module")
def flow_interior():
    """A flow model away from its ends, where the half log SNR is infinite and every order shows late."""
    net = MixtureDenoiser(is_flow=True)
    x = net.start(2, 0.9)
    return net, x, reference_solution(net, x, 0.9, SIGMA1, steps=400)


FLOW_ORDERS = [
    ("ddim", {}, 1),
    ("dpm2", {}, 2),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("ipndm", {"max_order": 2}, 2),
    ("deis", {"max_order": 2}, 2),
    ("dpmpp", {"max_order": 1}, 1),
    ("dpmpp", {"max_order": 2, "lower_order_final": False}, 2),
    *(("unipc", {"max_order": 1, "variant": variant}, 2) for variant in UNIPC_VARIANTS),
    *(("unipc", {"max_order": 2, "variant": variant, "lower_order_final": False}, 3) for variant in UNIPC_VARIANTS),
    ("epd", {}, 2),
    *(("epd_ipndm", {"max_order": k}, 2) for k in (1, 2, 3, 4)),
    ("epd_dpmpp", {"max_order": 1}, 2),
]


@pytest.mark.parametrize(("name", "options", "order"), FLOW_ORDERS)
def test_observed_order_on_a_flow_model(flow_interior, name, options, order):
    net, x, exact = flow_interior
    errors = []
    for intervals in (80, 160):
        sigmas = get_schedule(intervals + 1, SIGMA1, 0.9, schedule_type="flowmatch", schedule_rho=1, net=net)
        errors.append((run(name, net, x, sigmas, **options) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
def test_single_gaussian_closed_form(name):
    net = MixtureDenoiser(components=1)
    x = net.start(2, SIGMA0)
    sigmas = get_schedule(161, SIGMA1, SIGMA0)
    error = (run(name, net, x, sigmas) - gaussian_solution(net, x, SIGMA0, SIGMA1)).abs().max()
    assert error < (0.03 if name == "ddim" else 5e-4)


@pytest.fixture(scope="module")
def flow_problem():
    net = MixtureDenoiser(is_flow=True)
    x = net.start(2, 1.0)
    return net, x, reference_solution(net, x, 1.0, 0.003)


@pytest.mark.parametrize(("name", "options"), variants())
def test_flow_model(flow_problem, name, options):
    """The whole range, pure noise included, where the exponential solvers begin with a step of order 1. The last steps
    are long in half log SNR: without `lower_order_final` they extrapolate far."""
    net, x, exact = flow_problem
    sigmas = get_schedule(81, 0.003, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net)
    tolerance = 5e-3
    if name == "ddim" or (name != "epd_ipndm" and options.get("max_order") == 1):
        tolerance = 0.05
    elif name in ("dpmpp", "unipc", "epd_dpmpp"):
        tolerance = 0.015 if options["lower_order_final"] else 0.15
    assert (run(name, net, x, sigmas, **options) - exact).abs().max() < tolerance


def test_dpm_inner_grid():
    """inner_steps m on one interval is dpm2 on the polynomial grid of m intervals inside it."""
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    fine = torch.linspace(SIGMA0 ** (1 / 7), SIGMA1 ** (1 / 7), 4, dtype=F64) ** 7
    coarse = torch.tensor([SIGMA0, SIGMA1], dtype=F64)
    assert torch.allclose(run("dpm", net, x, coarse, inner_steps=3), run("dpm2", net, x, fine), rtol=1e-12, atol=1e-12)


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
# AFS, callback, dtypes, devices.


@pytest.mark.parametrize(("name", "options"), variants())
def test_afs_replaces_the_first_slope_only(name, options):
    class FirstSlopeReplaced(MixtureDenoiser):
        def slope(self, x, sigma, cond=None):
            d = super().slope(x, sigma, cond)
            return x / math.sqrt(1 + SIGMA0**2) if self.calls == 1 else d

    x = MixtureDenoiser().start(2, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    replaced = run(name, FirstSlopeReplaced(), x, sigmas, **options)
    result = run(name, MixtureDenoiser(), x, sigmas, afs=True, **options)
    assert torch.allclose(result, replaced, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(result, run(name, MixtureDenoiser(), x, sigmas, **options), rtol=1e-4)


def test_afs_in_dpm_touches_one_inner_step():
    counts = []
    for afs in (False, True):
        net = MixtureDenoiser()
        run("dpm", net, net.start(1, SIGMA0), get_schedule(5, SIGMA1, SIGMA0), inner_steps=3, afs=afs)
        counts.append(net.calls)
    assert counts == [24, 23]


@pytest.mark.parametrize(("name", "options"), variants())
def test_callback_sees_every_node(name, options):
    net = MixtureDenoiser()
    x = net.start(2, SIGMA0)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    seen = []
    result = run(
        name, net, x, sigmas, **options, callback=lambda i, x, sigma: seen.append((i, x.clone(), sigma.item()))
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert [sigma for _, _, sigma in seen] == sigmas.tolist()
    assert torch.equal(seen[0][1], x) and torch.equal(seen[-1][1], result)


@pytest.mark.parametrize(("name", "options"), variants())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name, options, dtype):
    """The result has at least float32 and float32 agrees with float64; every slope call gets the state's dtype."""
    net, dtypes = MixtureDenoiser(), set()

    class Recorder:
        is_flow = False

        def slope(self, x, sigma, cond=None):
            dtypes.add(x.dtype)
            return net.slope(x, sigma, cond)

        def sigma_inv(self, sigma):
            return net.sigma_inv(sigma)

    x = net.start(2, SIGMA0, dtype)
    sigmas = get_schedule(6, SIGMA1, SIGMA0)
    table = random_table(2, 5, 2)
    result = run(name, Recorder(), x, sigmas, table=table, **options)
    expected_dtype = F64 if dtype == F64 else torch.float32
    assert result.dtype == expected_dtype and dtypes == {expected_dtype}
    exact = run(name, net, x.double(), sigmas, table=table, **options)
    assert torch.allclose(result.double(), exact, rtol=1e-4, atol=1e-4)


class MetaNet:
    """A net on the meta device, where reading any value raises: what passes there never waits for a device."""

    is_flow = False

    def slope(self, x, sigma, cond=None):
        if not (x.is_meta and sigma.is_meta and sigma.dtype == F64):
            raise ValueError(f"x on {x.device}, sigma {sigma.dtype} on {sigma.device}")
        return torch.empty_like(x)

    def sigma_inv(self, sigma):
        return sigma.log1p()  # asked on the CPU, before the loop


@pytest.mark.parametrize(("is_flow", "afs"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("name", "options"), variants())
def test_no_value_is_read_from_the_device(name, options, is_flow, afs):
    net = MetaNet()
    net.is_flow = is_flow
    if name == "edm" and not is_flow:
        options = {**options, "s_churn": 3.0, "randn_like": torch.empty_like}
    if "max_rows" in SOLVER_OPTIONS[name]:
        options = {**options, "max_rows": 1}
    x = torch.empty(2, 3, 4, 4, device="meta")
    result = run(name, net, x, get_schedule(5, SIGMA1, 1.0), afs=afs, **options)
    assert result.is_meta and result.shape == x.shape


@pytest.mark.parametrize(("name", "options"), variants())
def test_input_is_not_changed_and_nothing_outlives_a_run(name, options):
    net = MixtureDenoiser()
    x, sigmas = net.start(2, SIGMA0), get_schedule(4, SIGMA1, SIGMA0)
    before, nodes = x.clone(), sigmas.clone()
    result = run(name, net, x, sigmas, **options)
    assert torch.equal(x, before) and torch.equal(sigmas, nodes)
    assert torch.equal(run(name, net, x, sigmas, **options), result)


@pytest.mark.parametrize(("name", "options"), variants(ONE_EVALUATION))
def test_one_interval(name, options):
    """Two nodes leave no history: every solver of one evaluation makes the same Euler step."""
    net = MixtureDenoiser()
    x, sigmas = net.start(2, SIGMA0), torch.tensor([SIGMA0, 6.0], dtype=F64)
    t, u = sigmas
    expected = x + (u - t) * net.slope(x, t)
    assert torch.allclose(run(name, net, x, sigmas, **options), expected, rtol=1e-13, atol=1e-13)


# ----------------------------------------------------------------------------
# Mistakes.


def test_every_solver_is_short_and_names_its_paper():
    for name, sampler in SOLVERS.items():
        assert len(inspect.getsource(sampler).splitlines()) <= 40, name
        assert re.search(r"arXiv \d{4}\.\d{5}.*(Eq|Alg|Sec|EPD-Plugin)", sampler.__doc__), name


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
    takers = "ipndm, ipndm_v, deis, dpmpp, unipc, epd_ipndm, epd_dpmpp"
    with pytest.raises(SolverError, match=f"^ddim takes no option max_order; it belongs to {takers}$"):
        check_options("ddim", {"max_order": 3})
    with pytest.raises(SolverError, match="no option maxorder; no solver has it"):
        check_options("ipndm", {"maxorder": 3})
    with pytest.raises(SolverError, match="unknown solver 'dmp'; use one of ddim, dpm, "):
        check_options("dmp", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ipndm", {"max_order": 7}, "max_order of ipndm must be 1 to 4, got 7"),
        *((name, {"max_order": 0}, f"max_order of {name} must be") for name in HIGHEST_ORDER),
        *(
            (name, {"max_order": k + 1}, f"max_order of {name} must be .* {k}, got")
            for name, k in HIGHEST_ORDER.items()
        ),
        *((name, {"max_order": 1.5}, "must be a whole number") for name in HIGHEST_ORDER),
        ("unipc", {"variant": "bh3"}, "variant must be bh1 or bh2, got bh3"),
        ("dpm", {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ("edm", {"s_churn": 1.0}, "needs randn_like"),
        ("edm", {"s_churn": -1.0}, "s_churn must not be negative"),
        ("edm", {"s_noise": math.nan}, "s_noise must be a finite number, got nan"),
        ("ipndm", {"max_order": 2.0}, "max_order must be a whole number, got 2.0"),
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


@pytest.mark.parametrize(("name", "options"), variants())
def test_sigma_zero(name, options):
    """A last node of 0 is reached by Euler or multistep steps, and refused by solvers that would evaluate there."""
    net = MixtureDenoiser(components=1)
    x = net.start(2, SIGMA0)
    sigmas = torch.cat([get_schedule(81, 0.01, SIGMA0), torch.zeros(1, dtype=F64)])
    if name in SOLVERS_TO_ZERO:
        assert (run(name, net, x, sigmas, **options) - gaussian_solution(net, x, SIGMA0, 0.0)).abs().max() < 0.06
    else:
        with pytest.raises(SolverError, match=f"{name} cannot step to sigma 0"):
            run(name, net, x, sigmas, **options)
        assert net.calls == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_sigma_zero_of_a_flow_model(flow_problem, name):
    """The data end of a flow: 0.003 away from the reference, over which the slope hardly changes."""
    net, x, exact = flow_problem
    sigmas = get_schedule(81, 0.003, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net)
    sigmas = torch.cat([sigmas, torch.zeros(1, dtype=F64)])
    if name in SOLVERS_TO_ZERO:
        end = exact - 0.003 * net.slope(exact, torch.tensor(0.003, dtype=F64))
        assert (run(name, net, x, sigmas) - end).abs().max() < 0.05
    else:
        with pytest.raises(SolverError, match=f"{name} cannot step to sigma 0"):
            run(name, net, x, sigmas)
