"""The solvers against the schedulers of diffusers, on the same float64 nodes.

A variance-exploding state x is diffusers' variance-preserving x / sqrt(1 + sigma^2). Where a scheduler casts the state
to float32 in every step (DPMSolverMultistep, FlowMatchEuler) or keeps its nodes in float32 (Heun) only 1e-6 of the
state is comparable; everything else agrees to rounding.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from solver_runs import SIGMA0, SIGMA1, LogTimeNet, make_table, run

from benchmarks.closed_form import MixtureDenoiser
from solver_utils import get_schedule, half_logsnr

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

EXACT, CAST = 1e-12, 1e-6
# diffusers lowers the last orders of DPMSolverMultistep below 15 intervals only; 3 intervals are all start and end.
INTERVALS = [3, 8]
SIGMA_FLOW = 0.999  # some schedulers cannot start at 1, where the half log SNR is -inf
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def arm(scheduler, sigmas):
    """Put the scheduler at the first of `sigmas`, the last of which is the end."""
    intervals = len(sigmas) - 1
    scheduler.set_timesteps(intervals)
    scheduler.sigmas = sigmas
    scheduler.timesteps = torch.arange(intervals, 0, -1).float()  # labels only
    scheduler.num_inference_steps = intervals
    scheduler.set_begin_index(0)


def walk(scheduler, sigmas, slope, x, **options):
    arm(scheduler, sigmas)
    for sigma, label in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(slope(x, sigma), label, x, **options, return_dict=False)[0]
    return x


def walk_vp(scheduler, sigmas, slope, x):
    def scaled(z, sigma):
        return slope(z * (1 + sigma**2).sqrt(), sigma)

    z = walk(scheduler, sigmas, scaled, x / (1 + sigmas[0] ** 2).sqrt())
    return z * (1 + sigmas[-1] ** 2).sqrt()


def relative(result, expected):
    return ((result - expected).abs().max() / expected.abs().max()).item()


def ve_problem(intervals, net=None):
    net = net or MixtureDenoiser()
    return net, net.start(2, SIGMA0), get_schedule(intervals + 1, SIGMA1, SIGMA0)


def flow_problem(intervals):
    net = MixtureDenoiser(is_flow=True)
    sigmas = get_schedule(intervals + 1, 0.02, SIGMA_FLOW, schedule_type="flowmatch", schedule_rho=1, net=net)
    return net, net.start(2, SIGMA_FLOW), sigmas


# ----------------------------------------------------------------------------
# Models that are no flow models.


def test_ddim():
    """DDIMScheduler steps through its own table of noise levels."""
    net = MixtureDenoiser()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
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


def test_edm_is_heun():
    """HeunDiscreteScheduler ends at sigma 0 and keeps its sigmas in float32."""
    net = MixtureDenoiser()
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    x = sample = net.start(2, scheduler.sigmas[0].item())
    for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        scheduler.scale_model_input(sample, t)  # moves the scheduler's step counter
        sample = scheduler.step(net.slope(sample, sigma.double()), t, sample).prev_sample
    sigmas = scheduler.sigmas.unique().flip(0).double()
    assert torch.allclose(run("edm", net, x, sigmas), sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("intervals", INTERVALS)
def test_dpm2_is_kdpm2(intervals):
    """KDPM2 keeps every node twice, and the midpoints of the intervals beside them."""
    net, x, sigmas = ve_problem(intervals)
    scheduler = diffusers.KDPM2DiscreteScheduler()
    scheduler.set_timesteps(intervals)
    middles = sigmas.log().lerp(sigmas.roll(1).log(), 0.5).exp()
    for name, nodes in (("sigmas", sigmas), ("sigmas_interpol", middles)):
        setattr(scheduler, name, torch.cat([nodes[:1], nodes[1:].repeat_interleave(2), nodes[-1:]]))
    scheduler.timesteps = torch.arange(2 * intervals, 0, -1).float()
    scheduler.set_begin_index(0)
    sample = x
    for i, label in enumerate(scheduler.timesteps):
        sigma = (scheduler.sigmas if scheduler.state_in_first_order else scheduler.sigmas_interpol)[i]
        sample = scheduler.step(net.slope(sample, sigma), label, sample, return_dict=False)[0]
    assert relative(run("dpm2", net, x, sigmas), sample) < EXACT


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_ipndm_v_is_lms(max_order, intervals):
    """LMSDiscreteScheduler integrates the same polynomials in sigma numerically, by scipy."""
    net, x, sigmas = ve_problem(intervals)
    scheduler = diffusers.LMSDiscreteScheduler()
    scheduler.is_scale_input_called = True
    expected = walk(scheduler, sigmas, net.slope, x, order=max_order)
    assert relative(run("ipndm_v", net, x, sigmas, max_order=max_order), expected) < EXACT


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_deis(max_order, intervals):
    """DEISMultistepScheduler has its polynomials in log sigma, and lowers no order here as ours never does."""
    net, x, sigmas = ve_problem(intervals, LogTimeNet())
    scheduler = diffusers.DEISMultistepScheduler(solver_order=max_order, lower_order_final=False)
    assert relative(run("deis", net, x, sigmas, max_order=max_order), walk_vp(scheduler, sigmas, net.slope, x)) < EXACT


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_dpmpp(max_order, lower_order_final, intervals):
    net, x, sigmas = ve_problem(intervals)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=max_order, lower_order_final=lower_order_final, final_sigmas_type="sigma_min"
    )
    result = run("dpmpp", net, x, sigmas, max_order=max_order, lower_order_final=lower_order_final)
    assert relative(result, walk_vp(scheduler, sigmas, net.slope, x)) < CAST


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_unipc(max_order, lower_order_final, variant, intervals):
    net, x, sigmas = ve_problem(intervals)
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=max_order, lower_order_final=lower_order_final, solver_type=variant
    )
    options = {"max_order": max_order, "lower_order_final": lower_order_final, "variant": variant}
    assert relative(run("unipc", net, x, sigmas, **options), walk_vp(scheduler, sigmas, net.slope, x)) < EXACT


# ----------------------------------------------------------------------------
# DPM-Solver++(2S): the EPD plug-in with one point.


def halfway(sigmas, is_flow):
    """The one-point table with every point half way in half log SNR, and the nodes with these points between them."""
    lams = half_logsnr(sigmas, is_flow)
    middle = (lams[:-1] + lams[1:]) / 2
    tau = torch.sigmoid(-middle) if is_flow else torch.exp(-middle)
    positions = (tau / sigmas[:-1]).log() / (sigmas[1:] / sigmas[:-1]).log()
    nodes = torch.cat([torch.stack([sigmas[:-1], tau], 1).flatten(), sigmas[-1:]])
    return make_table(positions[:, None], torch.ones_like(positions)[:, None]), nodes


def single_step(**options):
    """Orders 1, 2, 1, 2, ...: every node starts afresh, and its point makes the step."""
    return diffusers.DPMSolverSinglestepScheduler(
        solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min", **options
    )


@pytest.mark.parametrize("intervals", INTERVALS)
def test_epd_dpmpp_with_one_point_is_2s(intervals):
    net, x, sigmas = ve_problem(intervals)
    table, nodes = halfway(sigmas, is_flow=False)
    assert (table.positions - 0.5).abs().max() < 1e-14
    expected = walk_vp(single_step(), nodes, net.slope, x)
    assert relative(run("epd_dpmpp", net, x, sigmas, table=table, max_order=1), expected) < EXACT


# ----------------------------------------------------------------------------
# Flow models.


@pytest.mark.parametrize("intervals", INTERVALS)
def test_flow_ddim_is_euler(intervals):
    net, x, sigmas = flow_problem(intervals)
    expected = walk(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas, net.slope, x)
    assert relative(run("ddim", net, x, sigmas), expected) < CAST


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_flow_dpmpp(max_order, lower_order_final, intervals):
    net, x, sigmas = flow_problem(intervals)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=max_order, lower_order_final=lower_order_final, final_sigmas_type="sigma_min", **FLOW
    )
    result = run("dpmpp", net, x, sigmas, max_order=max_order, lower_order_final=lower_order_final)
    assert relative(result, walk(scheduler, sigmas, net.slope, x)) < CAST


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("max_order", [1, 2, 3])
def test_flow_unipc(max_order, lower_order_final, variant, intervals):
    net, x, sigmas = flow_problem(intervals)
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=max_order, lower_order_final=lower_order_final, solver_type=variant, **FLOW
    )
    options = {"max_order": max_order, "lower_order_final": lower_order_final, "variant": variant}
    assert relative(run("unipc", net, x, sigmas, **options), walk(scheduler, sigmas, net.slope, x)) < EXACT


@pytest.mark.parametrize("intervals", INTERVALS)
def test_flow_epd_dpmpp_with_one_point_is_2s(intervals):
    net, x, sigmas = flow_problem(intervals)
    table, nodes = halfway(sigmas, is_flow=True)
    expected = walk(single_step(**FLOW), nodes, net.slope, x)
    assert relative(run("epd_dpmpp", net, x, sigmas, table=table, max_order=1), expected) < EXACT


def test_long_schedules_differ_in_the_last_orders_only():
    """From 15 intervals on, diffusers lowers no order of DPMSolverMultistep; ours does as asked at any number."""
    net, x, sigmas = ve_problem(15)
    scheduler = diffusers.DPMSolverMultistepScheduler(lower_order_final=True, final_sigmas_type="sigma_min")
    expected = walk_vp(scheduler, sigmas, net.slope, x)
    assert relative(run("dpmpp", net, x, sigmas, lower_order_final=False), expected) < CAST
    assert relative(run("dpmpp", net, x, sigmas, lower_order_final=True), expected) > 100 * CAST
