"""Noise schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import BETA_D, BETA_MIN, MixtureDenoiser

from solver_utils import SCHEDULE_TYPES, SolverError, default_rho, get_schedule

VE_TYPES = [name for name in SCHEDULE_TYPES if name != "flowmatch"]


def vp_sigma(t):
    return math.sqrt(math.exp(BETA_D * t**2 / 2 + BETA_MIN * t) - 1)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [2, 3, 11])
@pytest.mark.parametrize("schedule_type", VE_TYPES)
def test_shape_dtype_ends_and_direction(schedule_type, num_steps, rho):
    net = MixtureDenoiser() if schedule_type == "discrete" else None
    sigmas = get_schedule(num_steps, 0.03, 14.6, schedule_type=schedule_type, schedule_rho=rho, net=net)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps,) and sigmas.device.type == "cpu"
    assert sigmas[0].item() == 14.6 and sigmas[-1].item() == 0.03  # to the last bit
    assert (sigmas.diff() < 0).all()


def test_polynomial():
    sigmas = get_schedule(18, 0.002, 80)  # the defaults are EDM's
    for i, sigma in enumerate(sigmas.tolist()):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigma == pytest.approx(expected, rel=1e-12)
    # Published values of EDM's 18-node schedule, to the digits printed there.
    assert [round(s, 2) for s in sigmas.tolist()[1:5]] == [57.59, 40.79, 28.37, 19.35]


def test_logsnr_has_a_constant_ratio():
    sigmas = get_schedule(9, 0.02, 50, schedule_type="logsnr")
    ratio = sigmas[1:] / sigmas[:-1]
    assert torch.allclose(ratio, torch.full_like(ratio, (0.02 / 50) ** (1 / 8)), rtol=1e-12)
    assert torch.equal(sigmas, get_schedule(9, 0.02, 50, schedule_type="logsnr", schedule_rho=1))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_time_uniform(rho):
    """With the ends of a known VP process the fitted beta_d and beta_min must be that process's own."""
    sigma_min, sigma_max = vp_sigma(1e-3), vp_sigma(1.0)
    sigmas = get_schedule(12, sigma_min, sigma_max, schedule_type="time_uniform", schedule_rho=rho)
    for i, sigma in enumerate(sigmas.tolist()):
        t = (1 + i / 11 * (1e-3 ** (1 / rho) - 1)) ** rho
        assert sigma == pytest.approx(vp_sigma(t), rel=1e-9)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_discrete(rho):
    net = MixtureDenoiser()
    sigma_min, sigma_max = vp_sigma(0.01), vp_sigma(0.9)
    sigmas = get_schedule(12, sigma_min, sigma_max, schedule_type="discrete", schedule_rho=rho, net=net)
    for i, sigma in enumerate(sigmas.tolist()):
        t = (0.9 ** (1 / rho) + i / 11 * (0.01 ** (1 / rho) - 0.9 ** (1 / rho))) ** rho
        assert sigma == pytest.approx(vp_sigma(t), rel=1e-9)


def test_flowmatch_without_a_model_is_linear():
    sigmas = get_schedule(5, 0.2, 1.0, schedule_type="flowmatch", schedule_rho=1)
    assert sigmas.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], rel=1e-12)


def test_flowmatch_against_diffusers():
    """The first nodes of FlowMatchEulerDiscreteScheduler (shift 3, float32) are ours between the same ends."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    expected = scheduler.sigmas[:-1].double()  # without the appended 0
    net = MixtureDenoiser(is_flow=True, flow_shift=3.0)
    sigmas = get_schedule(10, expected[-1], 1.0, schedule_type="flowmatch", schedule_rho=1, net=net)
    assert torch.allclose(sigmas, expected, rtol=1e-5)


def test_device():
    assert get_schedule(4, 0.1, 1, device="meta").device.type == "meta"
    assert get_schedule(4, 0.1, 1, device=torch.device("cpu")).device.type == "cpu"


def test_default_rho():
    assert {name: default_rho(name) for name in SCHEDULE_TYPES} == {
        "polynomial": 7,
        "logsnr": 1,
        "time_uniform": 1,
        "discrete": 1,
        "flowmatch": 1,
    }
    with pytest.raises(SolverError, match="unknown schedule type 'karras'"):
        default_rho("karras")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule_type": "karras"}, "'karras'; use one of polynomial, logsnr, time_uniform, discrete, flowmatch"),
        ({"num_steps": 1}, "num_steps must be at least 2 .*, got 1"),
        ({"sigma_min": 80.0}, "sigma_min 80 and sigma_max 10"),
        ({"sigma_min": 10.0}, "sigma_min < sigma_max"),
        ({"sigma_min": 0.0}, "0 < sigma_min"),
        ({"sigma_min": -0.1}, "0 < sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max inf"),
        ({"sigma_min": math.nan}, "sigma_min nan"),
        ({"schedule_rho": 0}, "schedule_rho must be positive, got 0"),
        ({"schedule_type": "discrete"}, "pass net"),
        ({"schedule_type": "flowmatch"}, "needs sigma_max <= 1, got 10"),
        ({"schedule_type": "flowmatch", "net": MixtureDenoiser()}, "flow models"),
        # log(1 + sigma_min^2) is too large for the VP process to reach it at t = 1e-3.
        ({"schedule_type": "time_uniform", "sigma_min": 5.0}, "time_uniform .* does not fall"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(SolverError, match=message) as error:
        get_schedule(**{"num_steps": 11, "sigma_min": 0.1, "sigma_max": 10.0, **arguments})
    assert "\n" not in str(error.value)
