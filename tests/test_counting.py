"""The counting formula against networks that count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from closed_form import MixtureDenoiser

from solver_utils import NFE, SOLVER_OPTIONS, SOLVERS_TO_ZERO, SolverError, count_nfe, get_schedule
from solvers import SOLVERS

BATCH = 3
CASES = [*((name, False) for name in SOLVERS), *((name, True) for name in SOLVERS_TO_ZERO)]


def run_and_count(name, num_steps, num_points, afs, to_zero, options):
    """(evaluations per image, sequential calls) that the solver really makes."""
    net = MixtureDenoiser()
    sigmas = get_schedule(num_steps, 0.05, 10.0)
    if to_zero:
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    if "table" in SOLVER_OPTIONS[name]:
        positions = torch.arange(1, num_points + 1, dtype=torch.float64).repeat(num_steps - 1, 1) / (num_points + 1)
        ones = torch.ones_like(positions)
        table = SimpleNamespace(positions=positions, weights=ones / num_points, scale_time=ones, scale_dir=ones)
        options = {**options, "table": table}
    SOLVERS[name](net, net.start(BATCH, 10.0, torch.float32), sigmas, afs=afs, **options)
    return net.rows / BATCH, net.calls


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("num_points", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [2, 6])
@pytest.mark.parametrize(("name", "to_zero"), CASES)
def test_formula_matches_the_network(name, num_steps, num_points, afs, to_zero):
    variants = {"dpm": [{}, {"inner_steps": 1}, {"inner_steps": 3}], "ipndm": [{}, {"max_order": 2}]}
    for options in variants.get(name, [{}]):
        counted = run_and_count(name, num_steps, num_points, afs, to_zero, options)
        cost = count_nfe(name, num_steps, num_points, afs=afs, to_zero=to_zero, **options)
        assert (cost.nfe, cost.parallel_nfe) == counted
        assert cost.forwards == 2 * cost.nfe
        assert count_nfe(name, num_steps, num_points, False, afs, to_zero=to_zero, **options).forwards == cost.nfe


def test_known_costs():
    """Figures from the papers and from the project's own promises."""
    assert count_nfe("edm", 18, to_zero=True).nfe == 35  # EDM, CIFAR-10
    assert count_nfe("ddim", 37).nfe == 36  # the DDIM baseline that is called nfe36
    assert count_nfe("epd", 11, 2) == NFE(nfe=30, parallel_nfe=20, forwards=60)  # "20 steps", paper's (Para.) NFE
    assert count_nfe("epd", 11, 2, afs=True) == NFE(nfe=29, parallel_nfe=19, forwards=58)
    assert count_nfe("dpm2", 11, guided=False) == NFE(nfe=20, parallel_nfe=20, forwards=20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"solver": "ddim", "max_order": 3}, "ddim takes no option max_order"),
        ({"solver": "dpm", "inner_steps": 0}, "inner_steps must be at least 1"),
        ({"solver": "ddim", "num_steps": 1}, "num_steps must be at least 2"),
        ({"solver": "epd", "num_points": 0}, "num_points must be at least 1"),
        ({"solver": "heun", "to_zero": True}, "heun cannot step to sigma 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(SolverError, match=message):
        count_nfe(**{"num_steps": 11, **arguments})
