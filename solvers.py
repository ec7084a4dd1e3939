"""Solvers of the probability-flow ODE dx/dsigma = slope(x, sigma), one function each.

All share one call: `name_sampler(net, x, sigmas, cond=None, *, <options>, afs=False, callback=None) -> x`.

* `net`: a Denoiser; only `net.slope(x, sigma, cond)` and `net.is_flow` are used, and `net.sigma_inv` by deis.
* `x`: the state `[B,C,H,W]` at `sigmas[0]`. float64 stays float64, everything else becomes float32.
* `sigmas`: nodes `[N]` that fall strictly (see `solver_utils.get_schedule`); float64 keeps them exact.
* `cond`: None, or a condition of B rows with `.repeat_interleave(k)`, and with `cond[rows]` where `max_rows` is given.
* `afs`: take x / sqrt(1 + sigma_0^2) for the very first slope and save that call (GENIE, arXiv 2210.05475, Sec. 3).
* `callback(i, x, sigma)`: called at every node, the first included.

The result is always the final state. The network gets float64 sigmas on x.device, 0-dim or one per row. Noise levels
and table entries are put on x.device before the loop and every decision is taken there, so the loop never waits for
the device. What a user can get wrong raises SolverError before the first evaluation. In the code t = sigma_i and
u = sigma_{i+1}; the data prediction of a slope d at (x, t) is x - t d, for flow models too.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from solver_utils import (
    ADAMS_BASHFORTH,
    SolverError,
    adams_weights,
    check_nodes,
    check_options,
    dpmpp_weights,
    get_schedule,
    half_logsnr,
    multistep_histories,
    unipc_plan,
)

Callback = Callable[[int, Tensor, Tensor], None]


def ddim_sampler(net, x: Tensor, sigmas: Tensor, cond=None, *, afs=False, callback: Callback | None = None) -> Tensor:
    """DDIM, the Euler step in sigma (arXiv 2010.02502, Eq. 12 with no noise added). Order 1, one evaluation."""
    check_nodes("ddim", sigmas, net.is_flow, afs)

    def step(i, x, t, u):
        d = _node_slope(net, x, t, cond, afs and i == 0)
        return x + (u - t) * d

    return _walk(step, x, sigmas, callback)


def dpm_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, inner_steps: int = 1, afs=False, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver-2, `inner_steps` >= 1 times per interval (arXiv 2206.00927, Algorithm 1).

    With alpha = 1 the exponential integrator is the midpoint rule whose midpoint lies half way in log sigma. The inner
    nodes follow the polynomial schedule, rho 7. Order 2, two evaluations per inner step.
    """
    check_options("dpm", {"inner_steps": inner_steps})
    nodes = check_nodes("dpm", sigmas, net.is_flow, afs)
    inner = torch.stack([get_schedule(inner_steps + 1, u, t) for t, u in pairwise(nodes)])  # [N-1, inner_steps + 1]
    middle = (inner[:, :-1] * inner[:, 1:]).sqrt().to(x.device)  # [N-1, inner_steps]
    inner = inner.to(x.device)

    def step(i, x, t, u):
        for j, (s, v) in enumerate(pairwise(inner[i])):
            m = middle[i, j]
            d = _node_slope(net, x, s, cond, afs and i == j == 0)
            x = x + (v - s) * net.slope(x + (m - s) * d, m, cond)
        return x

    return _walk(step, x, sigmas, callback)


def dpm2_sampler(net, x: Tensor, sigmas: Tensor, cond=None, *, afs=False, callback: Callback | None = None) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927, Algorithm 1): `dpm_sampler` with one inner step. Order 2, two evaluations."""
    check_nodes("dpm2", sigmas, net.is_flow, afs)
    return dpm_sampler(net, x, sigmas, cond, inner_steps=1, afs=afs, callback=callback)


def heun_sampler(net, x: Tensor, sigmas: Tensor, cond=None, *, afs=False, callback: Callback | None = None) -> Tensor:
    """Heun's rule, Euler and trapezoid (EDM, arXiv 2206.00364, Algorithm 1 lines 4-8). Order 2, two evaluations."""
    check_nodes("heun", sigmas, net.is_flow, afs)

    def step(i, x, t, u):
        d = _node_slope(net, x, t, cond, afs and i == 0)
        d_prime = net.slope(x + (u - t) * d, u, cond)
        return x + (u - t) * (d + d_prime) / 2

    return _walk(step, x, sigmas, callback)


def edm_sampler(
    net,
    x: Tensor,
    sigmas: Tensor,
    cond=None,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    afs=False,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's stochastic sampler (arXiv 2206.00364, Algorithm 2; without churn its deterministic part, Algorithm 1).

    Heun on every interval, Euler on a last one that ends at sigma 0. Churn raises t to t_hat = (1 + gamma) t wherever
    s_min <= t <= s_max, with gamma = min(s_churn / intervals, sqrt(2) - 1), and adds s_noise sqrt(t_hat^2 - t^2) times
    `randn_like(x)`, which must be given then. Order 2 without churn.
    """
    check_options("edm", {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise})
    nodes = check_nodes("edm", sigmas, net.is_flow, afs)
    gamma = min(s_churn / (len(nodes) - 1), math.sqrt(2) - 1)
    if s_churn > 0 and (randn_like is None or net.is_flow):
        raise SolverError(f"s_churn {s_churn:g} needs randn_like to draw its noise, and a model that is no flow model")
    churned = [gamma > 0 and s_min <= t <= s_max for t in nodes[:-1]]

    def step(i, x, t, u):
        t_hat = t
        if randn_like is not None and churned[i]:
            t_hat = (1 + gamma) * t
            x = x + (t_hat**2 - t**2).sqrt() * s_noise * randn_like(x)
        d = _node_slope(net, x, t_hat, cond, afs and i == 0)
        x_euler = x + (u - t_hat) * d
        if nodes[i + 1] == 0:
            return x_euler
        return x + (u - t_hat) * (d + net.slope(x_euler, u, cond)) / 2

    return _walk(step, x, sigmas, callback)


def ipndm_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, max_order: int = 2, afs=False, callback: Callback | None = None
) -> Tensor:
    """iPNDM: Adams-Bashforth of order `max_order` 1-4 (PNDM, arXiv 2202.09778, Eq. 12; DEIS, arXiv 2204.13902).

    The weights are those of equal steps on every schedule and the first intervals use the lower orders: for every
    `max_order` above 1 the error falls like h^2 in the end, with a smaller constant. One evaluation.
    """
    check_options("ipndm", {"max_order": max_order})
    nodes = check_nodes("ipndm", sigmas, net.is_flow, afs)
    orders = [min(i + 1, max_order) for i in range(len(nodes) - 1)]
    weights = [[(u - t) * b for b in ADAMS_BASHFORTH[k]] for (t, u), k in zip(pairwise(nodes), orders, strict=True)]
    return _multistep(net, x, sigmas, cond, weights, afs, callback)


def ipndm_v_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, max_order: int = 2, afs=False, callback: Callback | None = None
) -> Tensor:
    """iPNDM with the weights of the real, unequal steps: variable-step Adams-Bashforth in sigma, order 1-4.

    The same as rhoAB-DEIS (arXiv 2204.13902, Eq. 15 with the polynomial in rho = sigma). The low-order start holds the
    order at 2 in the end for every `max_order` above 1. One evaluation.
    """
    check_options("ipndm_v", {"max_order": max_order})
    nodes = check_nodes("ipndm_v", sigmas, net.is_flow, afs)
    weights = adams_weights(nodes, max_order, lambda sigma: sigma)
    return _multistep(net, x, sigmas, cond, weights, afs, callback)


def deis_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, max_order: int = 2, afs=False, callback: Callback | None = None
) -> Tensor:
    """tAB-DEIS: the slope as a polynomial in the model's own time `net.sigma_inv(sigma)` (arXiv 2204.13902, Eq. 15).

    `max_order` 1-4 counts slopes; the paper counts the polynomial's degree, so that 2, 3, 4 are its tAB1, tAB2, tAB3.
    The low-order start holds the order at 2 in the end for every `max_order` above 1. One evaluation.
    """
    check_options("deis", {"max_order": max_order})
    nodes = check_nodes("deis", sigmas, net.is_flow, afs)
    return _multistep(net, x, sigmas, cond, adams_weights(nodes, max_order, net.sigma_inv), afs, callback)


def dpmpp_sampler(
    net,
    x: Tensor,
    sigmas: Tensor,
    cond=None,
    *,
    max_order: int = 2,
    lower_order_final: bool = True,
    afs=False,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ multistep, data prediction (arXiv 2211.01095, Algorithm 2 for order 2; see `dpmpp_weights`).

    `max_order` 1-3, less while the history fills and, with `lower_order_final`, in the last intervals. That start, and
    the published weights of order 3, hold the observed order at 2 for `max_order` 3. One evaluation.
    """
    check_options("dpmpp", {"max_order": max_order})
    nodes = check_nodes("dpmpp", sigmas, net.is_flow, afs)
    lams = half_logsnr(torch.tensor(nodes, dtype=torch.float64), net.is_flow)
    histories = multistep_histories(lams.tolist(), max_order, lower_order_final)
    weights = [dpmpp_weights(lam_u, known).tolist() for lam_u, known in zip(lams[1:], histories, strict=True)]
    data: deque[Tensor] = deque(maxlen=max_order)

    def step(i, x, t, u):
        data.appendleft(x - t * _node_slope(net, x, t, cond, afs and i == 0))
        return u / t * x + (1 - u / t) * _weighted_sum(weights[i], data)

    return _walk(step, x, sigmas, callback)


def unipc_sampler(
    net,
    x: Tensor,
    sigmas: Tensor,
    cond=None,
    *,
    max_order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    afs=False,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC (arXiv 2302.04867, Algorithms 1 and 2 for data prediction; `variant` is B(h), see `unipc_plan`).

    The slope at a predicted node first corrects that node (UniC), then predicts the next one (UniP): correcting is
    free. `max_order` 1-3 as in `dpmpp_sampler`; the callback sees predicted states. The corrector adds one to the
    order: 2, 3, and 4 until the start's 3 shows; with `lower_order_final` the last step holds it at 2. One evaluation.
    """
    check_options("unipc", {"max_order": max_order, "variant": variant})
    nodes = check_nodes("unipc", sigmas, net.is_flow, afs)
    lams = half_logsnr(torch.tensor(nodes, dtype=torch.float64), net.is_flow).tolist()
    predict, correct = unipc_plan(lams, max_order, variant, lower_order_final)
    data: deque[Tensor] = deque(maxlen=max_order)
    last: list[Tensor] = []  # node and corrected state there

    def step(i, x, t, u):
        new = x - t * _node_slope(net, x, t, cond, afs and i == 0)
        if i > 0 and correct[i - 1] is not None:
            s, x_s = last
            x = t / s * x_s + (1 - t / s) * _weighted_sum(correct[i - 1], [new, *data])
        data.appendleft(new)
        last[:] = t, x
        return u / t * x + (1 - u / t) * _weighted_sum(predict[i], data)

    return _walk(step, x, sigmas, callback)


def epd_sampler(
    net,
    x: Tensor,
    sigmas: Tensor,
    cond=None,
    *,
    table,
    max_rows: int | None = None,
    afs=False,
    callback: Callback | None = None,
) -> Tensor:
    """EPD-Solver (arXiv 2507.14797, Sec. 3; 2512.22796, Sec. III): K slopes in parallel, then their weighted mean.

    `table` is a SolverTable of `[N-1,K]` rows, or `[B,N-1,K]` for one table per sample. One interval costs 1 + K
    evaluations in two calls, the second of B*K rows; `max_rows` splits a call that would not fit, for the same result.
    """
    steps = EPDSteps(x, sigmas, table, is_flow=net.is_flow, afs=afs, max_rows=max_rows)
    return _walk(lambda i, x, t, u: steps.step(net, i, x, cond), x, sigmas, callback)


def epd_slopes(net, x: Tensor, sigmas: Tensor, cond=None, *, table, max_rows: int | None = None, afs=False) -> Tensor:
    """The slopes c_k d_k `[B,K,C,H,W]` whose weighted mean is the step of `epd_sampler` over one interval.

    `sigmas` are the two nodes of the interval and `table` has one row `[1,K]`, or `[B,1,K]`; its weights do not matter.
    What K rows of network calls hold is in memory at once: `max_rows` splits the calls, not the result.
    """
    steps = EPDSteps(x, sigmas, table, is_flow=net.is_flow, afs=afs, max_rows=max_rows)
    if len(sigmas) != 2:
        raise SolverError(f"epd_slopes takes the two nodes of one interval, got {len(sigmas)}")
    slopes = steps.slopes(net, 0, steps.reach(0, _state(x), steps.node_slope(net, 0, _state(x), cond)), cond)
    return steps.points.gain[0] / steps.points.weights[0] * slopes


def epd_ipndm_sampler(
    net,
    x: Tensor,
    sigmas: Tensor,
    cond=None,
    *,
    table,
    max_order: int = 2,
    max_rows: int | None = None,
    afs=False,
    callback: Callback | None = None,
) -> Tensor:
    """EPD as a plug-in for iPNDM (arXiv 2507.14797, "EPD-Plugin", as its published `ipndm_sampler` computes it).

    The Adams-Bashforth direction of the node slopes, not the last slope alone, leads to the intermediate points; the
    ensemble of the slopes there makes the step. `max_order` 1 is `epd_sampler`. Table, cost, `max_rows` as there.
    """
    steps = EPDIpndmSteps(x, sigmas, table, max_order=max_order, is_flow=net.is_flow, afs=afs, max_rows=max_rows)
    return _walk(lambda i, x, t, u: steps.step(net, i, x, cond), x, sigmas, callback)


def epd_dpmpp_sampler(
    net,
    x: Tensor,
    sigmas: Tensor,
    cond=None,
    *,
    table,
    max_order: int = 2,
    lower_order_final: bool = True,
    max_rows: int | None = None,
    afs=False,
    callback: Callback | None = None,
) -> Tensor:
    """EPD as a plug-in for DPM-Solver++ ("EPD-Plugin" of arXiv 2507.14797 carried over to 2211.01095, Algorithms 1-2).

    Multistep DPM-Solver++ from the node to each tau_k leads to the points, and the ensemble of their data predictions,
    sum_k w_k (x_k - tau_k c_k d_k), takes its place in the exponential step. With `max_order` 1 and one point half way
    in log SNR this is DPM-Solver++(2S). Order 2 for points with mean 1/2. Table, cost, `max_rows` as in `epd_sampler`.
    """
    steps = EPDDpmppSteps(
        x,
        sigmas,
        table,
        max_order=max_order,
        lower_order_final=lower_order_final,
        is_flow=net.is_flow,
        afs=afs,
        max_rows=max_rows,
    )
    return _walk(lambda i, x, t, u: steps.step(net, i, x, cond), x, sigmas, callback)


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim_sampler,
    "dpm": dpm_sampler,
    "dpm2": dpm2_sampler,
    "heun": heun_sampler,
    "edm": edm_sampler,
    "ipndm": ipndm_sampler,
    "ipndm_v": ipndm_v_sampler,
    "deis": deis_sampler,
    "dpmpp": dpmpp_sampler,
    "unipc": unipc_sampler,
    "epd": epd_sampler,
    "epd_ipndm": epd_ipndm_sampler,
    "epd_dpmpp": epd_dpmpp_sampler,
}


# ----------------------------------------------------------------------------
# Shared parts.


def _walk(step: Callable, x: Tensor, sigmas: Tensor, callback: Callback | None) -> Tensor:
    """Carry x along the nodes by `x = step(i, x, t, u)`, showing every node to the callback."""
    x = _state(x)
    nodes = sigmas.to(x.device, torch.float64).unbind()
    if callback is not None:
        callback(0, x, nodes[0])
    for i, (t, u) in enumerate(pairwise(nodes)):
        x = step(i, x, t, u)
        if callback is not None:
            callback(i + 1, x, u)
    return x


def _state(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _node_slope(net, x: Tensor, t: Tensor, cond, analytical: bool) -> Tensor:
    """The slope at a node; `analytical` (AFS) takes the data as white noise of variance 1 instead of asking the net."""
    return analytical_slope(x, t) if analytical else net.slope(x, t, cond)


def analytical_slope(x: Tensor, t: Tensor) -> Tensor:
    """The slope at (x, t) of data that is white noise of variance 1 (AFS; GENIE, arXiv 2210.05475, Sec. 3)."""
    return x / (1 + t**2).sqrt()


def _multistep(
    net, x: Tensor, sigmas: Tensor, cond, weights: Sequence[Sequence[float]], afs: bool, callback: Callback | None
) -> Tensor:
    """x_u = x_t + sum_j weights[i][j] d_j over the last slopes, newest first."""
    history: deque[Tensor] = deque(maxlen=max(len(row) for row in weights))

    def step(i, x, t, u):
        history.appendleft(_node_slope(net, x, t, cond, afs and i == 0))
        return x + _weighted_sum(weights[i], history)

    return _walk(step, x, sigmas, callback)


def _weighted_sum(weights: Sequence[float | Tensor], history: Iterable[Tensor]) -> Tensor:
    """Of the newest entries, as many as there are weights."""
    return functools.reduce(operator.add, (weight * part for weight, part in zip(weights, history, strict=False)))


def _per_point(part: Tensor, x: Tensor) -> Tensor:
    """`[...]` => `[..., 1, 1, 1]` in the state's dtype on its device."""
    return part[..., None, None, None].to(x.device, _state(x).dtype)


class _InParts:
    """`net` asked for at most `max_rows` rows at a time (None: no limit)."""

    def __init__(self, net, max_rows: int | None):
        self.net, self.max_rows, self.is_flow = net, max_rows, net.is_flow

    def slope(self, x: Tensor, sigma: Tensor, cond) -> Tensor:
        if self.max_rows is None or len(x) <= self.max_rows:
            return self.net.slope(x, sigma, cond)
        sigma = sigma.expand(len(x))
        parts = [slice(first, first + self.max_rows) for first in range(0, len(x), self.max_rows)]
        return torch.cat([self.net.slope(x[rows], sigma[rows], None if cond is None else cond[rows]) for rows in parts])


@dataclass(frozen=True)
class _Points:
    """The K points of every interval, and what is made of the slopes there: d_k = a_k slope(x_k, a_k tau_k).

    tau_k = u^r_k t^(1-r_k); r, w, a, c are the table's positions, weights, scale_time and scale_dir. All points of an
    interval are one call of B*K rows, sample-major (row b*K + k).
    """

    t: Tensor  # [N-1, 1, 1] float64, on the CPU like tau
    tau: Tensor  # [N-1, B, K]
    times: Tensor  # [N-1, B*K] float64: a_k tau_k, on the state's device like all that follow
    reach: Tensor  # [N-1, B, K, 1, 1, 1]: tau_k - t
    gain: Tensor  # w_k c_k a_k
    gain_tau: Tensor  # w_k c_k a_k tau_k
    weights: Tensor  # w_k

    @classmethod
    def of_table(cls, x: Tensor, sigmas: Tensor, table) -> _Points:
        batch, shape = len(x), tuple(table.positions.shape)
        if shape[:-1] not in ((len(sigmas) - 1,), (batch, len(sigmas) - 1)):
            raise SolverError(
                f"table of shape {shape} does not fit: {len(sigmas)} sigmas and {batch} samples need "
                f"({len(sigmas) - 1}, K) or ({batch}, {len(sigmas) - 1}, K)"
            )
        r, w, a, c = (
            part.to("cpu", torch.float64).expand(batch, -1, -1).transpose(0, 1)  # [N-1, B, K]
            for part in (table.positions, table.weights, table.scale_time, table.scale_dir)
        )
        nodes = sigmas.to("cpu", torch.float64)[:, None, None]
        t, u = nodes[:-1], nodes[1:]
        tau = u**r * t ** (1 - r)
        return cls(
            t=t,
            tau=tau,
            times=(a * tau).flatten(1).to(x.device),
            reach=_per_point(tau - t, x),
            gain=_per_point(w * c * a, x),
            gain_tau=_per_point(w * c * a * tau, x),
            weights=_per_point(w, x),
        )


class EPDSteps:
    """The intervals of `epd_sampler` one by one, for callers with a loop, or with network calls, of their own.

    Made for states of the shape, device and dtype of `x [B,C,H,W]`; nodes, table, options and errors as there. `step`
    is an interval at once. Its parts, from x at node i: `d = node_slope(...)`, the points `x_k = reach(i, x, d)`, the
    `slopes` there, at noise levels `points.times[i]`, and `arrive(i, x, x_k, slopes)`, the state at node i + 1. The
    subclasses remember what `reach` was given: it is called once for each interval, the first one first.
    """

    solver = "epd"

    def __init__(self, x: Tensor, sigmas: Tensor, table, *, is_flow=False, afs=False, max_rows: int | None = None):
        check_options(self.solver, {"max_rows": max_rows})
        check_nodes(self.solver, sigmas, is_flow, afs)
        self.nodes = sigmas.to(x.device, torch.float64).unbind()
        self.points = _Points.of_table(x, sigmas, table)
        self.afs, self.max_rows = afs, max_rows

    def step(self, net, i: int, x: Tensor, cond=None) -> Tensor:
        """`x` at node i => the state at node i + 1."""
        x = _state(x)
        x_k = self.reach(i, x, self.node_slope(net, i, x, cond))
        return self.arrive(i, x, x_k, self.slopes(net, i, x_k, cond))

    def node_slope(self, net, i: int, x: Tensor, cond=None) -> Tensor:
        """The slope `[B,C,H,W]` at node i, asked of `net` unless AFS saves the first one."""
        return _node_slope(_InParts(net, self.max_rows), x, self.nodes[i], cond, self.afs and i == 0)

    def reach(self, i: int, x: Tensor, d: Tensor) -> Tensor:
        """The points x_k = x + (tau_k - t) d `[B,K,C,H,W]` of interval i; `d` is the slope at its node."""
        return x[:, None] + self.points.reach[i] * d[:, None]

    def slopes(self, net, i: int, x_k: Tensor, cond=None) -> Tensor:
        """slope(x_k, a_k tau_k) `[B,K,C,H,W]`, in one call of B*K rows."""
        cond = None if cond is None else cond.repeat_interleave(x_k.shape[1])
        rows = _InParts(net, self.max_rows).slope(x_k.flatten(0, 1), self.points.times[i], cond)
        return rows.unflatten(0, x_k.shape[:2])

    def arrive(self, i: int, x: Tensor, x_k: Tensor, slopes: Tensor) -> Tensor:
        """The state at node i + 1: x + (u - t) sum_k w_k c_k d_k."""
        return x + (self.nodes[i + 1] - self.nodes[i]) * (self.points.gain[i] * slopes).sum(1)


class EPDIpndmSteps(EPDSteps):
    """The intervals of `epd_ipndm_sampler`; see EPDSteps."""

    solver = "epd_ipndm"

    def __init__(
        self,
        x: Tensor,
        sigmas: Tensor,
        table,
        *,
        max_order: int = 2,
        is_flow=False,
        afs=False,
        max_rows: int | None = None,
    ):
        check_options(self.solver, {"max_order": max_order})
        super().__init__(x, sigmas, table, is_flow=is_flow, afs=afs, max_rows=max_rows)
        self.history: deque[Tensor] = deque(maxlen=max_order)

    def reach(self, i: int, x: Tensor, d: Tensor) -> Tensor:
        self.history.appendleft(d)
        return super().reach(i, x, _weighted_sum(ADAMS_BASHFORTH[len(self.history)], self.history))


class EPDDpmppSteps(EPDSteps):
    """The intervals of `epd_dpmpp_sampler`; see EPDSteps."""

    solver = "epd_dpmpp"

    def __init__(
        self,
        x: Tensor,
        sigmas: Tensor,
        table,
        *,
        max_order: int = 2,
        lower_order_final: bool = True,
        is_flow=False,
        afs=False,
        max_rows: int | None = None,
    ):
        check_options(self.solver, {"max_order": max_order})
        super().__init__(x, sigmas, table, is_flow=is_flow, afs=afs, max_rows=max_rows)
        lams = half_logsnr(sigmas.to("cpu", torch.float64), is_flow).tolist()
        lam_points = half_logsnr(self.points.tau, is_flow)  # [N-1, B, K]
        self.weights = []  # of each interval: order times [B, K, 1, 1, 1]
        for lam_u, known in zip(lam_points, multistep_histories(lams, max_order, lower_order_final), strict=True):
            self.weights.append(_per_point(dpmpp_weights(lam_u, known), x).unbind(2))
        self.share = _per_point(self.points.tau / self.points.t, x)
        self.data: deque[Tensor] = deque(maxlen=max_order)

    def reach(self, i: int, x: Tensor, d: Tensor) -> Tensor:
        self.data.appendleft(x - self.nodes[i] * d)
        predicted = _weighted_sum(self.weights[i], [part[:, None] for part in self.data])
        return self.share[i] * x[:, None] + (1 - self.share[i]) * predicted

    def arrive(self, i: int, x: Tensor, x_k: Tensor, slopes: Tensor) -> Tensor:
        """u/t x + (1 - u/t) sum_k w_k (x_k - tau_k c_k d_k)."""
        share = self.nodes[i + 1] / self.nodes[i]
        data = (self.points.weights[i] * x_k - self.points.gain_tau[i] * slopes).sum(1)
        return share * x + (1 - share) * data


# By the solver's name in SOLVERS.
TABLE_STEPS: dict[str, type[EPDSteps]] = {steps.solver: steps for steps in (EPDSteps, EPDIpndmSteps, EPDDpmppSteps)}
