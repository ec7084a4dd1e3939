"""Solvers of the probability-flow ODE dx/dsigma = slope(x, sigma), one function each.

All share one call: `name_sampler(net, x, sigmas, cond=None, *, <options>, afs=False, callback=None) -> x`.

* `net`: a Denoiser; only `net.slope(x, sigma, cond)` and `net.is_flow` are used.
* `x`: the state `[B,C,H,W]` at `sigmas[0]`. float64 stays float64, everything else becomes float32.
* `sigmas`: nodes `[N]` that fall strictly (see `solver_utils.get_schedule`); float64 keeps them exact.
* `cond`: None, or a condition of B rows with `.repeat_interleave(k)`.
* `afs`: take x / sqrt(1 + sigma_0^2) for the very first slope and save that call (GENIE, arXiv 2210.05475, Sec. 3).
* `callback(i, x, sigma)`: called at every node, the first included.

The result is always the final state. The network gets float64 sigmas on x.device, 0-dim or one per row. Noise levels
and table entries are put on x.device before the loop and every decision is taken there, so the loop never waits for
the device. What a user can get wrong raises SolverError before the first evaluation. In the code t = sigma_i and
u = sigma_{i+1}.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from solver_utils import SolverError, adams_bashforth, check_nodes, check_options, get_schedule

Callback = Callable[[int, Tensor, Tensor], None]


def ddim_sampler(net, x: Tensor, sigmas: Tensor, cond=None, *, afs=False, callback: Callback | None = None) -> Tensor:
    """DDIM, the Euler step in sigma (arXiv 2010.02502, Eq. 13 with its ODE, Eq. 14). Order 1, one evaluation."""
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
    """DPM-Solver-2, once per interval: `dpm_sampler` with one inner step. Order 2, two evaluations."""
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
    check_options("edm", {"s_churn": s_churn})
    nodes = check_nodes("edm", sigmas, net.is_flow, afs)
    gamma = min(s_churn / (len(nodes) - 1), math.sqrt(2) - 1)
    if s_churn > 0 and (randn_like is None or net.is_flow):
        raise SolverError(f"s_churn {s_churn:g} needs randn_like to draw its noise, and a model that is no flow model")
    churned = [gamma > 0 and s_min <= t <= s_max for t in nodes[:-1]]

    def step(i, x, t, u):
        t_hat = t
        if churned[i]:
            t_hat = (1 + gamma) * t
            x = x + (t_hat**2 - t**2).sqrt() * s_noise * randn_like(x)
        d = _node_slope(net, x, t_hat, cond, afs and i == 0)
        x_euler = x + (u - t_hat) * d
        if nodes[i + 1] == 0:
            return x_euler
        return x + (u - t_hat) * (d + net.slope(x_euler, u, cond)) / 2

    return _walk(step, x, sigmas, callback)


def ipndm_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, max_order: int = 4, afs=False, callback: Callback | None = None
) -> Tensor:
    """iPNDM: Adams-Bashforth of order `max_order` 1-4 (PNDM, arXiv 2202.09778, Eq. 12; DEIS, arXiv 2204.13902).

    The weights are those of equal steps on every schedule and the first intervals use the lower orders: for every
    `max_order` above 1 the error falls like h^2 in the end, with a smaller constant. One evaluation.
    """
    check_options("ipndm", {"max_order": max_order})
    check_nodes("ipndm", sigmas, net.is_flow, afs)
    history = deque(maxlen=max_order)

    def step(i, x, t, u):
        history.appendleft(_node_slope(net, x, t, cond, afs and i == 0))
        return x + (u - t) * adams_bashforth(history)

    return _walk(step, x, sigmas, callback)


def epd_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, table, afs=False, callback: Callback | None = None
) -> Tensor:
    """EPD-Solver (arXiv 2507.14797, Sec. 3; 2512.22796, Sec. III): K slopes in parallel, then their weighted mean.

    `table` is a SolverTable of `[N-1,K]` rows, or `[B,N-1,K]` for one table per sample. One interval costs 1 + K
    evaluations in two calls, the second of B*K rows.
    """
    check_nodes("epd", sigmas, net.is_flow, afs)
    ensemble_slope = _ensemble(net, x, sigmas, cond, table)

    def step(i, x, t, u):
        d = _node_slope(net, x, t, cond, afs and i == 0)
        return x + (u - t) * ensemble_slope(i, x, d)

    return _walk(step, x, sigmas, callback)


def epd_ipndm_sampler(
    net, x: Tensor, sigmas: Tensor, cond=None, *, table, max_order: int = 4, afs=False, callback: Callback | None = None
) -> Tensor:
    """EPD as a plug-in for iPNDM (arXiv 2507.14797, "EPD-Plugin", as its published `ipndm_sampler` computes it).

    The Adams-Bashforth direction of the node slopes, not the last slope alone, leads to the intermediate points; the
    ensemble of the slopes there makes the step. `max_order` 1 is `epd_sampler`. Table and cost as there.
    """
    check_options("epd_ipndm", {"max_order": max_order})
    check_nodes("epd_ipndm", sigmas, net.is_flow, afs)
    ensemble_slope = _ensemble(net, x, sigmas, cond, table)
    history = deque(maxlen=max_order)

    def step(i, x, t, u):
        history.appendleft(_node_slope(net, x, t, cond, afs and i == 0))
        return x + (u - t) * ensemble_slope(i, x, adams_bashforth(history))

    return _walk(step, x, sigmas, callback)


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim_sampler,
    "dpm": dpm_sampler,
    "dpm2": dpm2_sampler,
    "heun": heun_sampler,
    "edm": edm_sampler,
    "ipndm": ipndm_sampler,
    "epd": epd_sampler,
    "epd_ipndm": epd_ipndm_sampler,
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
    return x / (1 + t**2).sqrt() if analytical else net.slope(x, t, cond)


def _ensemble(net, x: Tensor, sigmas: Tensor, cond, table) -> Callable[[int, Tensor, Tensor], Tensor]:
    """`ensemble_slope(i, x, d)` = sum_k w_k c_k d_k `[B,C,H,W]` of interval i, its points reached along d.

    tau_k = u^r_k t^(1-r_k), x_k = x + (tau_k - t) d, d_k = a_k slope(x_k, a_k tau_k): r, w, a, c are the table's
    positions, weights, scale_time and scale_dir. One call of B*K rows, sample-major (row b*K + k).
    """
    batch, shape = len(x), tuple(table.positions.shape)
    if shape[:-1] not in ((len(sigmas) - 1,), (batch, len(sigmas) - 1)):
        raise SolverError(
            f"table of shape {shape} does not fit: {len(sigmas)} sigmas and {batch} samples need "
            f"({len(sigmas) - 1}, K) or ({batch}, {len(sigmas) - 1}, K)"
        )
    num_points = shape[-1]
    r, w, a, c = (
        part.to("cpu", torch.float64).expand(batch, -1, -1).transpose(0, 1)  # [N-1, B, K]
        for part in (table.positions, table.weights, table.scale_time, table.scale_dir)
    )
    nodes = sigmas.to("cpu", torch.float64)[:, None, None]
    t, u = nodes[:-1], nodes[1:]
    tau = u**r * t ** (1 - r)
    times = (a * tau).flatten(1).to(x.device)  # [N-1, B*K]
    reach, gain = (
        part[..., None, None, None].to(x.device, _state(x).dtype)  # [N-1, B, K, 1, 1, 1]
        for part in (tau - t, w * c * a)
    )
    cond_rows = None if cond is None else cond.repeat_interleave(num_points)

    def ensemble_slope(i, x, d):
        points = x[:, None] + reach[i] * d[:, None]  # [B, K, C, H, W]
        slopes = net.slope(points.flatten(0, 1), times[i], cond_rows).unflatten(0, (batch, num_points))
        return (gain[i] * slopes).sum(1)

    return ensemble_slope
