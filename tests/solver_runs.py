"""What the solver tests share: tables without validation, one call for every solver, and every option of each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from benchmarks.closed_form import MixtureDenoiser
from solver_utils import HIGHEST_ORDER, SOLVER_OPTIONS, UNIPC_VARIANTS
from solvers import SOLVERS

SIGMA0, SIGMA1 = 10.0, 0.05
F64 = torch.float64
TABLE_SOLVERS = [name for name in SOLVERS if "table" in SOLVER_OPTIONS[name]]


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


def variants(names: Iterable[str] = SOLVERS) -> list:
    """A list of pytest.param(name, options): every combination of the options that choose a formula."""
    found = []
    for name in names:
        values = {
            "inner_steps": (1, 3),
            "max_order": range(1, HIGHEST_ORDER.get(name, 0) + 1),
            "lower_order_final": (True, False),
            "variant": UNIPC_VARIANTS,
        }
        keys = [key for key in values if key in SOLVER_OPTIONS[name]]
        for chosen in product(*(values[key] for key in keys)):
            options = dict(zip(keys, chosen, strict=True))
            found.append(pytest.param(name, options, id=" ".join([name, *(f"{k}={v}" for k, v in options.items())])))
    return found


class PowerNet:
    """A slope that depends on sigma alone, time(sigma)^power: multistep rules are then plain quadrature."""

    is_flow = False

    def __init__(self, power, sigma_inv=lambda sigma: sigma):
        self.power, self.sigma_inv = power, sigma_inv

    def slope(self, x, sigma, cond=None):
        return torch.ones_like(x) * self.sigma_inv(sigma) ** self.power


class LogTimeNet(MixtureDenoiser):
    """The mixture with log sigma for its time, the variable in which diffusers' DEIS has its polynomials."""

    def sigma_inv(self, sigma):
        return sigma.log()
