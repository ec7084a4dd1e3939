"""The counting formula against networks that count."""

from __future__ import annotations

import pytest
import torch
from solver_runs import SIGMA0, SIGMA1, TABLE_SOLVERS, constant_table, run, variants

from benchmarks.closed_form import MixtureDenoiser
from solver_utils import NFE, SOLVERS_TO_ZERO, SolverError, count_nfe, get_schedule

BATCH = 3


def run_and_count(name, num_steps, num_points, afs, to_zero, options):
    """(evaluations per image, sequential calls) that the solver really makes."""
    net = MixtureDenoiser()
    sigmas = get_schedule(num_steps, SIGMA1, SIGMA0)
    if to_zero:
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    positions = [k / (num_points + 1) for k in range(1, num_points + 1)]
    table = constant_table(num_steps - 1, positions, [1 / num_points] * num_points)  # for those that take one
    run(name, net, net.start(BATCH, SIGMA0, torch.float32), sigmas, table=table, afs=afs, **options)
    return net.rows / BATCH, net.calls


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("num_steps", [2, 6])
@pytest.mark.parametrize(("name", "options"), variants())
def test_formula_matches_the_network(name, options, num_steps, to_zero, afs):
    if to_zero and name not in SOLVERS_TO_ZERO:
        with pytest.raises(SolverError, match=f"{name} cannot step to sigma 0"):
            count_nfe(name, num_steps, afs=afs, to_zero=True, **options)
        return
    for num_points in (1, 3, 8) if name in TABLE_SOLVERS else (2,):
        counted = run_and_count(name, num_steps, num_points, afs, to_zero, options)
        cost = count_nfe(name, num_steps, num_points, afs=afs, to_zero=to_zero, **options)
        assert (cost.nfe, cost.parallel_nfe) == counted
        assert cost.forwards == 2 * cost.nfe
        assert count_nfe(name, num_steps, num_points, False, afs, to_zero=to_zero, **options).forwards == cost.nfe


@pytest.mark.parametrize("name", TABLE_SOLVERS)
def test_a_split_call_counts_once(name):
    """parallel_nfe is the depth of the computation: `max_rows` serves small memory and does not make it deeper."""
    whole, split = count_nfe(name, 6, 3), count_nfe(name, 6, 3, max_rows=1)
    assert whole == split
    nfe, calls = run_and_count(name, 6, 3, False, False, {"max_rows": 1})
    assert nfe == split.nfe
    assert calls == BATCH * split.nfe > split.parallel_nfe


def test_known_costs():
    """Figures from the papers and from the project's own promises."""
    assert count_nfe("edm", 18, to_zero=True).nfe == 35  # EDM, CIFAR-10
    assert count_nfe("ddim", 37).nfe == 36  # the DDIM baseline that is called nfe36
    assert count_nfe("epd", 11, 2) == NFE(nfe=30, parallel_nfe=20, forwards=60)  # "20 steps", paper's (Para.) NFE
    assert count_nfe("epd", 11, 2, afs=True) == NFE(nfe=29, parallel_nfe=19, forwards=58)
    assert count_nfe("epd_dpmpp", 11, 2) == count_nfe("epd_ipndm", 11, 2) == count_nfe("epd", 11, 2)
    for name in ("ipndm_v", "deis", "dpmpp", "unipc"):
        assert count_nfe(name, 11) == NFE(nfe=10, parallel_nfe=10, forwards=20)  # a multistep solver's N intervals
    assert count_nfe("dpm2", 11, guided=False) == NFE(nfe=20, parallel_nfe=20, forwards=20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"solver": "ddim", "max_order": 3}, "ddim takes no option max_order"),
        ({"solver": "dpm", "inner_steps": 0}, "inner_steps must be at least 1"),
        ({"solver": "ddim", "num_steps": 1}, "num_steps must be at least 2"),
        ({"solver": "epd", "num_points": 0}, "num_points must be at least 1"),
        ({"solver": "dpmpp", "max_order": 4}, "max_order of dpmpp must be"),
        ({"solver": "unipc", "variant": "bh3"}, "variant must be"),
        ({"solver": "epd", "max_rows": 0}, "max_rows must be at least 1"),
        ({"solver": "heun", "to_zero": True}, "heun cannot step to sigma 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(SolverError, match=message):
        count_nfe(**{"num_steps": 11, **arguments})
