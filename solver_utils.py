"""What the solvers share: noise schedules, multistep coefficients, the options of each solver, and evaluation counts.

Everything here works in float64 and needs torch only. `num_steps` is always the number of nodes N, so a schedule has
N - 1 intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torch_utils.errors import UserError

# Options of each solver with their defaults, beside `afs` and `callback` which all of them take (None: no default).
SOLVER_OPTIONS: dict[str, dict[str, object]] = {
    "ddim": {},
    "dpm": {"inner_steps": 1},
    "dpm2": {},
    "heun": {},
    "edm": {"s_churn": 0.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.0, "randn_like": None},
    "ipndm": {"max_order": 4},
    "epd": {"table": None},
    "epd_ipndm": {"table": None, "max_order": 4},
}
# The last node may be sigma 0 for these only: the others evaluate the slope at, or between, both ends of an interval.
SOLVERS_TO_ZERO = ("ddim", "edm", "ipndm")

# Adams-Bashforth weights for equal steps, newest slope first, by order (PNDM, arXiv 2202.09778, Eq. 12 has order 4).
ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

SCHEDULE_TYPES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
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
) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, both included exactly: float64 `[num_steps]` on `device`.

    Types, with i = 0 ... N-1 and lerp(a, b)_i = (a^(1/rho) + i/(N-1) (b^(1/rho) - a^(1/rho)))^rho:

    * `polynomial`: lerp of sigma itself (EDM, arXiv 2206.00364, Eq. 5).
    * `logsnr`: equal steps in log sigma; rho is not used (DPM-Solver, arXiv 2206.00927, Sec. 3.4).
    * `time_uniform`: lerp of the VP time from 1 to 1e-3, sigma(t)^2 = exp(beta_d t^2/2 + beta_min t) - 1, where beta_d
      and beta_min make sigma(1) = sigma_max and sigma(1e-3) = sigma_min (EDM, Table 1, VP column).
    * `discrete`: lerp of the model's time `net.sigma_inv(sigma)`, mapped back by `net.sigma(t)`.
    * `flowmatch`: the same with the time shift of a flow model; without `net` time is sigma itself. sigma_max <= 1.

    `net` is needed by `discrete` only; its `sigma` and `sigma_inv` get float64 tensors on `device`.
    Raises SolverError for an unknown type, fewer than two nodes, a sigma range or rho that does not fit.
    """
    check_schedule(schedule_type, num_steps, sigma_min, sigma_max, schedule_rho)
    sigma_min, sigma_max, rho = float(sigma_min), float(sigma_max), float(schedule_rho)

    if schedule_type == "polynomial":
        sigmas = _lerp(sigma_max, sigma_min, num_steps, rho)
    elif schedule_type == "logsnr":
        sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_steps, dtype=torch.float64).exp()
    elif schedule_type == "time_uniform":
        sigmas = _vp_sigmas(num_steps, sigma_min, sigma_max, rho)
    else:
        sigmas = _model_time_sigmas(schedule_type, num_steps, sigma_min, sigma_max, rho, net, device)

    sigmas = sigmas.to("cpu", torch.float64)
    sigmas[0], sigmas[-1] = sigma_max, sigma_min  # the formulas miss their own end points by a rounding error
    if not bool((sigmas.diff() < 0).all()):
        raise SolverError(
            f"schedule {schedule_type} with {num_steps} nodes, rho {rho:g} does not fall from sigma {sigma_max:g} to "
            f"{sigma_min:g}; use another schedule type or range"
        )
    return sigmas.to(device)


def check_schedule(
    schedule_type: str, num_steps: int, sigma_min: float | None, sigma_max: float | None, schedule_rho: float
) -> None:
    """Raise SolverError for what no model could use; an end of the range that is None is the model's own."""
    check_schedule_type(schedule_type)
    _check_num_steps(num_steps)
    low = 0.0 if sigma_min is None else float(sigma_min)
    high = math.inf if sigma_max is None else float(sigma_max)
    known = [end for end in (sigma_min, sigma_max) if end is not None]
    if not low < high or not all(0 < end < math.inf for end in known):
        raise SolverError(f"need 0 < sigma_min < sigma_max, got sigma_min {low:g} and sigma_max {high:g}")
    if not 0 < schedule_rho < math.inf:
        raise SolverError(f"schedule_rho must be positive, got {schedule_rho:g}")


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 2:
        raise SolverError(f"num_steps must be at least 2 (nodes, so one interval), got {num_steps}")


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


def _model_time_sigmas(
    schedule_type: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float, net, device
) -> Tensor:
    if schedule_type == "discrete" and net is None:
        raise SolverError("schedule discrete steps through the model's own time; pass net, or use polynomial or logsnr")
    if schedule_type == "flowmatch" and net is not None and not net.is_flow:
        raise SolverError("schedule flowmatch is for flow models; use discrete or polynomial for this model")
    if schedule_type == "flowmatch" and sigma_max > 1:
        raise SolverError(f"schedule flowmatch needs sigma_max <= 1, got {sigma_max:g}")
    if net is None:
        return _lerp(sigma_max, sigma_min, num_steps, rho)
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64, device=device)
    t_max, t_min = net.sigma_inv(ends).tolist()
    return net.sigma(_lerp(t_max, t_min, num_steps, rho).to(device))


# ----------------------------------------------------------------------------
# Options, nodes, slopes.


def check_options(solver: str, options: Mapping[str, object]) -> None:
    """Raise SolverError for an unknown solver, an option that it does not take, or a value out of range."""
    if solver not in SOLVER_OPTIONS:
        raise SolverError(f"unknown solver '{solver}'; use one of {', '.join(SOLVER_OPTIONS)}")
    for name, value in options.items():
        if name not in SOLVER_OPTIONS[solver]:
            takers = [other for other, names in SOLVER_OPTIONS.items() if name in names]
            used_by = f"it belongs to {', '.join(takers)}" if takers else "no solver has it"
            raise SolverError(f"{solver} takes no option {name}; {used_by}")
        if isinstance(value, float) and not math.isfinite(value) and name != "s_max":
            raise SolverError(f"{name} must be a finite number, got {value}")
        if name == "max_order" and value not in ADAMS_BASHFORTH:
            raise SolverError(f"max_order must be 1, 2, 3 or 4, got {value}")
        if name == "inner_steps" and value < 1:
            raise SolverError(f"inner_steps must be at least 1, got {value}")
        if name == "s_churn" and value < 0:
            raise SolverError(f"s_churn must not be negative, got {value:g}")


def check_nodes(solver: str, sigmas: Tensor, is_flow: bool, afs: bool) -> list[float]:
    """The nodes as python floats, after checking that `solver` can walk them.

    `sigmas` is `[N]` on any device, N >= 2, strictly decreasing, above 0 but for a last node of 0 where the solver
    allows it. AFS takes x for white noise of variance 1 + sigma^2, which holds for variance-exploding models only.
    """
    if afs and is_flow:
        raise SolverError("afs (the analytical first step) does not exist for flow models; switch it off")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise SolverError(f"sigmas must be one row of at least 2 nodes, got shape {tuple(sigmas.shape)}")
    nodes = [float(sigma) for sigma in sigmas.tolist()]
    if not all(t > u for t, u in pairwise(nodes)) or not nodes[0] < math.inf or nodes[-1] < 0:
        raise SolverError("sigmas must be finite and fall strictly towards 0")
    if nodes[-1] == 0 and solver not in SOLVERS_TO_ZERO:
        raise SolverError(f"{solver} cannot step to sigma 0; only {', '.join(SOLVERS_TO_ZERO)} can")
    return nodes


def adams_bashforth(slopes: Sequence[Tensor]) -> Tensor:
    """Adams-Bashforth direction from 1 to 4 slopes `[B,C,H,W]`, newest first; the order is their number."""
    return sum(weight * d for weight, d in zip(ADAMS_BASHFORTH[len(slopes)], slopes, strict=True))


# ----------------------------------------------------------------------------
# Counting.


@dataclass(frozen=True)
class NFE:
    """The cost of one image, in three numbers that are never mixed.

    nfe: network evaluations of one guidance branch. parallel_nfe: sequential network calls, the points of an EPD
    interval being one. forwards: rows through the network, both guidance branches counted.
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
    rows per evaluation. afs: the first evaluation is saved. to_zero: a node 0 follows the schedule, as the command line
    does for `edm`; that last interval is one Euler step. options: as given to the solver (`inner_steps` matters).
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
        stages = 1 if solver in ("ddim", "ipndm") else 2
        nfe = parallel_nfe = stages * options.get("inner_steps", 1)
    extra = int(to_zero) - int(afs)
    nfe, parallel_nfe = nfe * (num_steps - 1) + extra, parallel_nfe * (num_steps - 1) + extra
    return NFE(nfe=nfe, parallel_nfe=parallel_nfe, forwards=nfe * (2 if guided else 1))
