"""What the solvers share: noise schedules, multistep coefficients, the options of each solver, and evaluation counts.

Everything here works in float64 and needs torch and numpy only. `num_steps` is always the number of nodes N, so a
schedule has N - 1 intervals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils.errors import UserError

# Options of each solver with their defaults, beside `afs` and `callback` which all of them take (None: no default).
# `max_order` is 2 everywhere: under strong guidance higher orders diverge at the few steps that matter here (figures in
# docs/solvers.md).
SOLVER_OPTIONS: dict[str, dict[str, object]] = {
    "ddim": {},
    "dpm": {"inner_steps": 1},
    "dpm2": {},
    "heun": {},
    "edm": {"s_churn": 0.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.0, "randn_like": None},
    "ipndm": {"max_order": 2},
    "ipndm_v": {"max_order": 2},
    "deis": {"max_order": 2},
    "dpmpp": {"max_order": 2, "lower_order_final": True},
    "unipc": {"max_order": 2, "variant": "bh2", "lower_order_final": True},
    "epd": {"table": None, "max_rows": None},
    "epd_ipndm": {"table": None, "max_order": 2, "max_rows": None},
    "epd_dpmpp": {"table": None, "max_order": 2, "lower_order_final": True, "max_rows": None},
}
# The highest `max_order` of the solvers that take one.
HIGHEST_ORDER = {"ipndm": 4, "ipndm_v": 4, "deis": 4, "dpmpp": 3, "unipc": 3, "epd_ipndm": 4, "epd_dpmpp": 3}
UNIPC_VARIANTS = ("bh1", "bh2")
# One evaluation per interval, at its upper end. Only these, and `edm` by an Euler step, can reach a last node of sigma
# 0: the others evaluate the slope at, or between, both ends of an interval.
ONE_EVALUATION = ("ddim", "ipndm", "ipndm_v", "deis", "dpmpp", "unipc")
SOLVERS_TO_ZERO = ("edm", *ONE_EVALUATION)

# Adams-Bashforth weights for equal steps, newest slope first, by order (PNDM, arXiv 2202.09778, Eq. 12 has order 4).
ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
QUADRATURE_POINTS = 64  # Gauss-Legendre points per interval for the weights of `adams_weights`

SCHEDULE_TYPES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
LOWEST_RHO, HIGHEST_RHO, HIGHEST_SIGMA = 0.05, 1000.0, 1e6  # beyond them the powers leave float64
HIGHEST_STEPS = 100_000
VP_TIME_MIN = 1e-3  # where the `time_uniform` schedule ends; its time starts at 1


class SolverError(UserError):
    """A solver, schedule or option that cannot be used as asked: one line for the user."""


# ----------------------------------------------------------------------------
# Schedules.


def default_rho(schedule_type: str) -> float:
    """The exponent that the command lines use when none is given: 7 for `polynomial`, 1 for every other type."""
    check_schedule_type(schedule_type)
    return 7.0 if schedule_type == "polynomial" else 1.0


def get_schedule(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    device: torch.device | str | None = None,
    schedule_type: str = "polynomial",
    schedule_rho: float = 7,
    net=None,
    *,
    shift: float | None = None,
    mu: float | None = None,
) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, both included exactly: float64 `[num_steps]` on `device`.

    Types, with i = 0 ... N-1 and lerp(a, b)_i = (a^(1/rho) + i/(N-1) (b^(1/rho) - a^(1/rho)))^rho:

    * `polynomial`: lerp of sigma itself (EDM, arXiv 2206.00364, Eq. 5).
    * `logsnr`: equal steps in log sigma; rho is not used (DPM-Solver, arXiv 2206.00927, Sec. 3.4).
    * `time_uniform`: lerp of the VP time from 1 to 1e-3, sigma(t)^2 = exp(beta_d t^2/2 + beta_min t) - 1, where beta_d
      and beta_min make sigma(1) = sigma_max and sigma(1e-3) = sigma_min (EDM, Table 1, VP column).
    * `discrete`: lerp of the model's time `net.sigma_inv(sigma)`, mapped back by `net.sigma(t)`.
    * `flowmatch`: lerp of a flow model's time t, sigma = s t / (1 + (s - 1) t), sigma_max <= 1 (Stable Diffusion 3,
      arXiv 2403.03206, Eq. 23). `shift` gives s itself (static), `mu` its logarithm (dynamic, chosen by the caller for
      the image size as FLUX does); with neither, time is the model's own `net.sigma_inv(sigma)`, or sigma without net.

    `net` is needed by `discrete` only; its `sigma` and `sigma_inv` get float64 tensors on `device`.
    Raises SolverError for an unknown type, fewer than two nodes, a sigma range, rho or shift that does not fit.
    """
    check_schedule(schedule_type, num_steps, sigma_min, sigma_max, schedule_rho, shift, mu)
    sigma_min, sigma_max, rho = float(sigma_min), float(sigma_max), float(schedule_rho)

    if schedule_type == "polynomial":
        sigmas = _lerp(sigma_max, sigma_min, num_steps, rho)
    elif schedule_type == "logsnr":
        sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_steps, dtype=torch.float64).exp()
    elif schedule_type == "time_uniform":
        sigmas = _vp_sigmas(num_steps, sigma_min, sigma_max, rho)
    else:
        shift = shift if mu is None else math.exp(mu)
        time_of, sigma_of = _model_time(schedule_type, net, shift)
        t_max, t_min = time_of(torch.tensor([sigma_max, sigma_min], dtype=torch.float64, device=device)).tolist()
        if not t_max > t_min >= 0:
            raise SolverError(
                f"schedule {schedule_type} cannot go from sigma {sigma_max:g} to {sigma_min:g}: the model's times for "
                f"them are {t_max:g} and {t_min:g}; choose a range inside the model's own, or a smaller time shift"
            )
        sigmas = sigma_of(_lerp(t_max, t_min, num_steps, rho).to(device))

    sigmas = sigmas.to("cpu", torch.float64)
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # the formulas miss their own end points by a rounding error
    if not bool((sigmas.diff() < 0).all()):
        raise SolverError(
            f"schedule {schedule_type} with {num_steps} nodes, rho {rho:g} does not fall from sigma {sigma_max:g} to "
            f"{sigma_min:g}; use another schedule type or range"
        )
    return sigmas.to(device)


def explicit_schedule(sigmas: Sequence[float], device: torch.device | str | None = None) -> Tensor:
    """Nodes given one by one, as searched schedules are (GITS, arXiv 2405.11326): float64 `[len(sigmas)]` on `device`.

    They must be finite, fall strictly, and stay above 0, except that the last may be 0. Raises SolverError.
    """
    nodes = [float(sigma) for sigma in sigmas]
    if len(nodes) < 2:
        raise SolverError(f"a list of sigmas needs at least 2 nodes, got {len(nodes)}")
    for i, (t, u) in enumerate(pairwise(nodes)):
        if not math.inf > t > u >= 0:
            raise SolverError(
                f"sigmas must be finite and fall strictly towards 0, but node {i} is {t:g} and the next {u:g}"
            )
    return torch.tensor(nodes, dtype=torch.float64, device=device)


def check_schedule(
    schedule_type: str,
    num_steps: int,
    sigma_min: float | None,
    sigma_max: float | None,
    schedule_rho: float,
    shift: float | None = None,
    mu: float | None = None,
) -> None:
    """Raise SolverError for what no model could use; an end of the range that is None is the model's own."""
    check_schedule_type(schedule_type)
    _check_num_steps(num_steps)
    ends = {name: end for name, end in (("sigma_min", sigma_min), ("sigma_max", sigma_max)) if end is not None}
    values = list(ends.values())
    if not all(0 < end <= HIGHEST_SIGMA for end in values) or not all(a < b for a, b in pairwise(values)):
        given = " and ".join(f"{name} {float(end):g}" for name, end in ends.items())
        raise SolverError(f"need 0 < sigma_min < sigma_max <= {HIGHEST_SIGMA:g}, got {given}")
    if schedule_type == "flowmatch" and sigma_max is not None and sigma_max > 1:
        raise SolverError(f"schedule flowmatch needs sigma_max <= 1, got {float(sigma_max):g}")
    if not LOWEST_RHO <= schedule_rho <= HIGHEST_RHO:
        raise SolverError(f"schedule_rho must be {LOWEST_RHO:g} to {HIGHEST_RHO:g}, got {schedule_rho:g}")
    if (shift is not None or mu is not None) and schedule_type != "flowmatch":
        raise SolverError(f"shift and mu belong to schedule flowmatch, not to {schedule_type}")
    if shift is not None and mu is not None:
        raise SolverError(f"give shift {shift:g} or mu {mu:g}, not both: shift = exp(mu)")
    if shift is not None and not 0 < shift < math.inf:
        raise SolverError(f"shift must be positive, got {shift:g}")
    if mu is not None and not abs(mu) <= 100:
        raise SolverError(f"mu must be a number between -100 and 100, got {mu:g}")


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 2:
        raise SolverError(f"num_steps must be at least 2 (nodes, so one interval), got {num_steps}")
    if num_steps > HIGHEST_STEPS:
        raise SolverError(f"num_steps must be at most {HIGHEST_STEPS}, got {num_steps}")


def check_schedule_type(schedule_type: str) -> None:
    """Raise SolverError unless `schedule_type` is one of SCHEDULE_TYPES."""
    if schedule_type not in SCHEDULE_TYPES:
        raise SolverError(f"unknown schedule type '{schedule_type}'; use one of {', '.join(SCHEDULE_TYPES)}")


def _lerp(start: float, end: float, num_steps: int, rho: float) -> Tensor:
    """`num_steps` float64 values from start to end, equally spaced after the power 1/rho."""
    return torch.linspace(start ** (1 / rho), end ** (1 / rho), num_steps, dtype=torch.float64) ** rho


def _vp_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_min / VP_TIME_MIN - log_max) / (VP_TIME_MIN - 1)
    beta_min = log_max - beta_d / 2
    t = _lerp(1.0, VP_TIME_MIN, num_steps, rho)
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def _model_time(schedule_type: str, net, shift: float | None) -> tuple[Callable, Callable]:
    """(time of sigma, sigma of time) for the types that step through time."""
    if schedule_type == "discrete" and net is None:
        raise SolverError("schedule discrete steps through the model's own time; pass net, or use polynomial or logsnr")
    if schedule_type == "flowmatch" and net is not None and not net.is_flow:
        raise SolverError("schedule flowmatch is for flow models; use discrete or polynomial for this model")
    if net is not None and shift is None:
        return net.sigma_inv, net.sigma
    s = 1.0 if shift is None else shift
    return (lambda sigma: sigma / (s - (s - 1) * sigma)), (lambda t: s * t / (1 + (s - 1) * t))


# ----------------------------------------------------------------------------
# Options and nodes.


def check_options(solver: str, options: Mapping[str, Any]) -> None:
    """Raise SolverError for an unknown solver, an option that it does not take, or a value out of range."""
    if solver not in SOLVER_OPTIONS:
        raise SolverError(f"unknown solver '{solver}'; use one of {', '.join(SOLVER_OPTIONS)}")
    for name, value in options.items():
        if name not in SOLVER_OPTIONS[solver]:
            takers = [other for other, names in SOLVER_OPTIONS.items() if name in names]
            used_by = f"it belongs to {', '.join(takers)}" if takers else "no solver has it"
            raise SolverError(f"{solver} takes no option {name}; {used_by}")
        if isinstance(value, float) and not math.isfinite(value) and not (name == "s_max" and value > 0):
            raise SolverError(f"{name} must be a finite number, got {value}")
        if name == "max_rows" and value is None:
            continue
        if name in ("max_order", "inner_steps", "max_rows") and not isinstance(value, int):
            raise SolverError(f"{name} must be a whole number, got {value}")
        if name == "max_order" and value not in range(1, HIGHEST_ORDER[solver] + 1):
            raise SolverError(f"max_order of {solver} must be 1 to {HIGHEST_ORDER[solver]}, got {value}")
        if name == "variant" and value not in UNIPC_VARIANTS:
            raise SolverError(f"variant must be {' or '.join(UNIPC_VARIANTS)}, got {value}")
        if name == "inner_steps" and value < 1:
            raise SolverError(f"inner_steps must be at least 1, got {value}")
        if name == "max_rows" and value < 1:
            raise SolverError(f"max_rows must be at least 1, got {value}")
        if name in ("s_churn", "s_noise") and value < 0:
            raise SolverError(f"{name} must not be negative, got {value:g}")
    s_min, s_max = options.get("s_min", 0.0), options.get("s_max", math.inf)
    if s_min > s_max:
        raise SolverError(f"s_min {s_min:g} lies above s_max {s_max:g}")


def check_nodes(solver: str, sigmas: Tensor, is_flow: bool, afs: bool) -> list[float]:
    """The nodes as python floats, after checking that `solver` can walk them.

    `sigmas` is `[N]` on any device, N >= 2, strictly decreasing, above 0 but for a last node of 0 where the solver
    allows it, and at most 1 for a flow model. AFS takes x for white noise of variance 1 + sigma^2, which holds for
    variance-exploding models only.
    """
    if afs and is_flow:
        raise SolverError("afs (the analytical first step) does not exist for flow models; switch it off")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise SolverError(f"sigmas must be one row of at least 2 nodes, got shape {tuple(sigmas.shape)}")
    nodes = explicit_schedule(sigmas.tolist()).tolist()
    if is_flow and nodes[0] > 1:
        raise SolverError(f"sigmas of a flow model lie between 1 and 0, got {nodes[0]:g}")
    if nodes[-1] == 0 and solver not in SOLVERS_TO_ZERO:
        raise SolverError(f"{solver} cannot step to sigma 0; only {', '.join(SOLVERS_TO_ZERO)} can")
    return nodes


# ----------------------------------------------------------------------------
# Multistep coefficients. History is always newest first: index 0 is the node t that the interval starts from.


def adams_weights(nodes: Sequence[float], max_order: int, time: Callable[[Tensor], Tensor]) -> list[list[float]]:
    """Weights W_j of x_u = x_t + sum_j W_j d_j for every interval: the slope is a polynomial in `time(sigma)`.

    W_j is the integral over sigma, from t to u, of the Lagrange polynomial prod_{k != j} (time - time_k)/(time_j -
    time_k) through the last nodes, as many as there are up to `max_order` (DEIS, arXiv 2204.13902, Eq. 15). It is taken
    by Gauss-Legendre quadrature, exact when time is sigma. `time` maps float64 tensors of any shape, rising in sigma.
    """
    roots, shares = _gauss_legendre()
    sigmas = torch.tensor(nodes, dtype=torch.float64)
    t, u = sigmas[:-1, None], sigmas[1:, None]
    times = time(sigmas[:-1]).cpu().numpy()
    if not (np.diff(times) < 0).all():
        raise SolverError("the model's time does not fall with the sigmas; choose nodes inside the model's own range")
    inside = time((t + u) / 2 + (u - t) / 2 * torch.from_numpy(roots)).cpu().numpy()  # [N-1, Q]
    weights = []
    for i, tau in enumerate(inside):
        known = times[max(i + 1 - max_order, 0) : i + 1][::-1]
        row = []
        for own in known:
            others = known[known != own][:, None]
            lagrange = ((tau - others) / (own - others)).prod(0)
            row.append((nodes[i + 1] - nodes[i]) / 2 * float(shares @ lagrange))
        weights.append(row)
    return weights


@functools.cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(QUADRATURE_POINTS)


def half_logsnr(sigma: Tensor, is_flow: bool) -> Tensor:
    """lambda = log(alpha / sigma), alpha = 1 - sigma for a flow model and 1 otherwise; -inf or inf where one is 0."""
    return (torch.log1p(-sigma) if is_flow else 0) - torch.log(sigma)


def multistep_histories(lams: Sequence[float], max_order: int, lower_order_final: bool) -> list[list[float]]:
    """The nodes that the step of each interval uses, newest first, as half log SNR; their number is the step's order.

    The order is 1, 2, ... while the history fills, `max_order`, and down to 1 again with `lower_order_final`. A node at
    -inf (pure noise) gives the polynomials no support, and an interval that ends at inf (sigma 0) has no other limit
    than order 1.
    """
    intervals = len(lams) - 1
    first = int(math.isinf(lams[0]))
    histories = []
    for i in range(intervals):
        left = intervals - i if lower_order_final else max_order
        order = 1 if math.isinf(lams[i + 1]) else max(min(i + 1 - first, left, max_order), 1)
        histories.append(list(lams[i - order + 1 : i + 1][::-1]))
    return histories


def dpmpp_weights(lam_u: Tensor, lams: Sequence[float]) -> Tensor:
    """Weights w_j `[..., order]` of the multistep DPM-Solver++ of order len(lams), 1-3, newest first.

    The step is x_u = u/t x_t + (1 - u/t) sum_j w_j D_j, with D_j the data predictions at half log SNR `lams` (that of t
    first) and `lam_u`, of any shape, that of u. Order 2 is arXiv 2211.01095, Algorithm 2. Order 3 is
    `multistep_dpm_solver_third_update` of its authors' code, as in diffusers: it takes half the Taylor value of
    D'', so it gains accuracy over order 2 but not an order.
    """
    h = lam_u - lams[0]
    one, zero = torch.ones_like(h), torch.zeros_like(h)
    if len(lams) == 1:
        return one[..., None]
    r0 = (lams[0] - lams[1]) / h
    if len(lams) == 2:
        return torch.stack([1 + 0.5 / r0, -0.5 / r0], -1)
    r1 = (lams[1] - lams[2]) / h
    # Integrals over the interval of e^(lambda - lam_u) ((lambda - lam_t) / h)^n / n!: n = 1 and 2 over that of n = 0.
    phi = -torch.expm1(-h)
    first, second = (1 - phi / h) / phi, (0.5 - (1 - phi / h) / h) / phi
    newer = torch.stack([1 / r0, -1 / r0, zero], -1)  # divided differences of D, as weights of the D_j
    older = torch.stack([zero, 1 / r1, -1 / r1], -1)
    bend = (newer - older) / (r0 + r1)[..., None]  # h^2 D'' / 2, used where h^2 D'' belongs
    slope = newer + r0[..., None] * bend
    return torch.stack([one, zero, zero], -1) + first[..., None] * slope + second[..., None] * bend


def unipc_weights(lam_u: float, lams: Sequence[float], variant: str, corrector: bool = False) -> list[float]:
    """Weights w_j of UniPC's predictor UniP-p, p = len(lams), newest first; of its corrector UniC-p with `corrector`.

    The step is that of `dpmpp_weights`; the corrector's first weight belongs to the data prediction at u. arXiv
    2302.04867, Algorithms 1 and 2 for data prediction: B(h) = h (`bh1`) or e^h - 1 (`bh2`) with h = lam_t - lam_u. A
    single unknown takes the value 1/2 as in the authors' code. The corrector needs a finite h.
    """
    h = lams[0] - lam_u
    b_h = h if variant == "bh1" else math.expm1(h)
    ratios = [(lam - lams[0]) / -h for lam in lams[1:]] + [1.0] * corrector  # r_m
    phi, factorial, targets = math.expm1(h) / h - 1, 1, []
    for k in range(1, len(ratios) + 1):
        targets.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    a = [0.5] * len(ratios)
    if len(ratios) > 1:
        matrix = torch.tensor([[r**k for r in ratios] for k in range(len(ratios))], dtype=torch.float64)
        a = torch.linalg.solve(matrix, torch.tensor(targets, dtype=torch.float64)).tolist()
    gains = [b_h / math.expm1(h) * a_m / r for a_m, r in zip(a, ratios, strict=True)]  # of D_m - D_t
    new = [gains.pop()] if corrector else []
    return [*new, 1 - sum(gains) - sum(new), *gains]


def unipc_plan(
    lams: Sequence[float], max_order: int, variant: str, lower_order_final: bool
) -> tuple[list[list[float]], list[list[float] | None]]:
    """`unipc_weights` of every interval between nodes of half log SNR `lams`: (predictors, correctors).

    An interval has no corrector (None) if it starts from pure noise, where h is infinite, or is the last one, whose end
    is never evaluated.
    """
    predict, correct = [], []
    for i, known in enumerate(multistep_histories(lams, max_order, lower_order_final)):
        can_correct = i + 2 < len(lams) and math.isfinite(lams[i])
        predict.append(unipc_weights(lams[i + 1], known, variant))
        correct.append(unipc_weights(lams[i + 1], known, variant, corrector=True) if can_correct else None)
    return predict, correct


# ----------------------------------------------------------------------------
# Counting.


@dataclass(frozen=True)
class NFE:
    """The cost of one image, in three numbers that are never mixed.

    nfe: network evaluations of one guidance branch. parallel_nfe: sequential network calls, the points of an EPD
    interval being one, also where `max_rows` makes several calls of it. forwards: rows through the network, both
    guidance branches counted.
    """

    nfe: int
    parallel_nfe: int
    forwards: int


def count_nfe(
    solver: str,
    num_steps: int,
    num_points: int = 1,
    guided: bool = True,
    afs: bool = False,
    *,
    to_zero: bool = False,
    **options,
) -> NFE:
    """What `solver` spends on one image over a schedule of `num_steps` nodes.

    num_points: points K of an EPD table; solvers without a table ignore it. guided: classifier-free guidance runs two
    rows per evaluation. afs: the first evaluation is saved. to_zero: a node 0 follows the schedule, and the interval
    that leads to it costs one evaluation. options: as given to the solver (`inner_steps` matters).
    Raises SolverError as the solver would.
    """
    check_options(solver, options)
    _check_num_steps(num_steps)
    if num_points < 1:
        raise SolverError(f"num_points must be at least 1, got {num_points}")
    if to_zero and solver not in SOLVERS_TO_ZERO:
        raise SolverError(f"{solver} cannot step to sigma 0; only {', '.join(SOLVERS_TO_ZERO)} can")
    if "table" in SOLVER_OPTIONS[solver]:
        nfe, parallel_nfe = 1 + num_points, 2
    else:
        stages = 1 if solver in ONE_EVALUATION else 2
        nfe = parallel_nfe = stages * options.get("inner_steps", 1)
    extra = int(to_zero) - int(afs)
    nfe, parallel_nfe = nfe * (num_steps - 1) + extra, parallel_nfe * (num_steps - 1) + extra
    return NFE(nfe=nfe, parallel_nfe=parallel_nfe, forwards=nfe * (2 if guided else 1))
