"""Noise schedules against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from solver_runs import LogTimeNet

from benchmarks.closed_form import BETA_D, BETA_MIN, MixtureDenoiser
from solver_utils import (
    SCHEDULE_TYPES,
    SolverError,
    check_schedule,
    default_rho,
    explicit_schedule,
    get_schedule,
)
from training.denoisers.stable_diffusion import NoiseTable

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


class StableDiffusionTime:
    """The noise table of Stable Diffusion 1.x as the net that a schedule asks."""

    is_flow = False

    def __init__(self):
        table = NoiseTable(0.00085, 0.012, 1000)
        self.sigma, self.sigma_inv = table.sigma, table.sigma_inv


class TableByNumpy:
    """The same time computed by numpy alone: log alpha interpolated between t_n = (n+1)/1000."""

    times = np.arange(1, 1001) / 1000
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    log_alpha = 0.5 * np.log(np.cumprod(1 - betas))

    def sigma(self, t):
        return np.sqrt(np.exp(-2 * np.interp(t, self.times, self.log_alpha)) - 1)

    def sigma_inv(self, sigma):
        log_alpha = -0.5 * np.log(1 + np.square(sigma))
        return np.interp(-log_alpha, -self.log_alpha, self.times)


@pytest.mark.parametrize("num_steps", [2, 7, 40])
@pytest.mark.parametrize("ends", [(0.1, 14.6), (0.03, 1.0), (0.5, 0.6), (2.0, 14.0)])
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_discrete_on_parts_of_the_stable_diffusion_table(rho, ends, num_steps):
    """Nodes between any two levels are equally spaced in the model's time^(1/rho), not in a part of a longer grid."""
    table = TableByNumpy()
    t_min, t_max = (table.sigma_inv(end) ** (1 / rho) for end in ends)
    expected = table.sigma((t_max + np.arange(num_steps) / (num_steps - 1) * (t_min - t_max)) ** rho)
    sigmas = get_schedule(num_steps, *ends, schedule_type="discrete", schedule_rho=rho, net=StableDiffusionTime())
    assert sigmas.numpy() == pytest.approx(expected, rel=1e-9)
    assert (sigmas.diff() < 0).all()
    assert (sigmas[-1].item(), sigmas[0].item()) == ends


def test_discrete_refuses_levels_before_the_start_of_time():
    """Below sigma 1 the time of this net, log sigma, is negative."""
    net = LogTimeNet()
    message = "discrete cannot go from sigma 10 to 0.5: the model's times for them are 2.30259 and -0.693147"
    with pytest.raises(SolverError, match=message):
        get_schedule(5, 0.5, 10.0, schedule_type="discrete", net=net)


def test_discrete_refuses_levels_without_a_time():
    class NoTime(MixtureDenoiser):
        def sigma_inv(self, sigma):
            return sigma * math.nan

    with pytest.raises(SolverError, match="the model's times for them are nan and nan"):
        get_schedule(5, 0.5, 10.0, schedule_type="discrete", net=NoTime())


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


TIMES = np.linspace(1.0, 0.05, 9)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.5])
def test_static_shift_against_diffusers(shift):
    """Times 1 ... 0.05 in equal steps go through the scheduler's shift; the same ends and shift here give its sigmas,
    whatever the model's own shift is."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=TIMES.tolist())
    expected = scheduler.sigmas[:-1].double()  # without the appended 0
    end = shift * 0.05 / (1 + (shift - 1) * 0.05)
    for net in (None, MixtureDenoiser(is_flow=True, flow_shift=1.7)):
        sigmas = get_schedule(9, end, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net, shift=shift)
        assert torch.allclose(sigmas, expected, rtol=1e-6)
        assert sigmas[0].item() == 1.0 and sigmas[-1].item() == end


@pytest.mark.parametrize("mu", [-0.7, 0.0, 0.5, 1.15])
def test_dynamic_shift_against_diffusers(mu):
    """0.5 and 1.15 are the mu of FLUX for its smallest and largest images."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=TIMES.tolist(), mu=mu)
    expected = scheduler.sigmas[:-1].double()
    end = expected[-1].item()
    arguments = {"schedule_type": "flowmatch", "schedule_rho": 1}
    sigmas = get_schedule(9, end, 1.0, **arguments, mu=mu)
    assert torch.allclose(sigmas, expected, rtol=1e-6)
    assert torch.equal(sigmas, get_schedule(9, end, 1.0, **arguments, shift=math.exp(mu)))


@pytest.mark.parametrize("rho", [1.0, 2.0, 7.0])
def test_shift_on_part_of_the_range(rho):
    """Time runs between the times of the two ends, with rho, exactly at both ends."""
    shift, high, low = 3.0, 0.8, 0.1
    t_max, t_min = (sigma / (shift - (shift - 1) * sigma) for sigma in (high, low))
    sigmas = get_schedule(6, low, high, schedule_type="flowmatch", schedule_rho=rho, shift=shift)
    for i, sigma in enumerate(sigmas.tolist()):
        t = (t_max ** (1 / rho) + i / 5 * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho
        assert sigma == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-12)
    assert (sigmas[0].item(), sigmas[-1].item()) == (high, low)


def test_shift_of_the_model_is_the_default():
    net = MixtureDenoiser(is_flow=True, flow_shift=3.0)
    own = get_schedule(6, 0.1, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net)
    given = get_schedule(6, 0.1, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net, shift=3.0)
    other = get_schedule(6, 0.1, 1.0, schedule_type="flowmatch", schedule_rho=1, net=net, shift=1.0)
    assert torch.allclose(own, given, rtol=1e-14) and not torch.allclose(own, other, rtol=0.1)
    assert torch.allclose(other, torch.linspace(1.0, 0.1, 6, dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("nodes", [[2.0, 1.0], [14.6, 3.1, 0.7, 0.1], [1, 0.5, 0], (80.0, 0.002), [3.0, 1.0, 0.0]])
def test_explicit_schedule_keeps_every_node(nodes):
    sigmas = explicit_schedule(nodes)
    assert sigmas.tolist() == list(nodes) and sigmas.dtype == torch.float64 and sigmas.device.type == "cpu"


def test_explicit_schedule_of_another_schedule_and_device():
    sigmas = get_schedule(6, 0.02, 50)
    assert torch.equal(explicit_schedule(sigmas.tolist()), sigmas)
    assert explicit_schedule([2.0, 1.0], device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "at least 2 nodes, got 0"),
        ([1.0], "at least 2 nodes, got 1"),
        ([1.0, 1.0], "node 0 is 1 and the next 1"),
        ([3.0, 1.0, 2.0], "node 1 is 1 and the next 2"),
        ([0.1, 1.0], "node 0 is 0.1 and the next 1"),
        ([1.0, -0.1], "node 0 is 1 and the next -0.1"),
        ([1.0, 0.0, -1.0], "node 1 is 0 and the next -1"),
        ([1.0, 0.0, 0.0], "node 1 is 0 and the next 0"),
        ([0.0, 0.0], "node 0 is 0"),
        ([math.nan, 1.0], "node 0 is nan"),
        ([1.0, math.nan], "next nan"),
        ([2.0, math.nan, 1.0], "next nan"),
        ([math.inf, 1.0], "node 0 is inf"),
        ([1.0, -math.inf], "next -inf"),
    ],
)
def test_bad_explicit_schedules_are_one_line(nodes, message):
    with pytest.raises(SolverError, match=message) as error:
        explicit_schedule(nodes)
    assert "\n" not in str(error.value)


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


FLOWMATCH = {"schedule_type": "flowmatch", "sigma_max": 1.0}


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
        ({"schedule_rho": 0}, "schedule_rho must be 0.05 to 1000, got 0"),
        ({"schedule_type": "discrete"}, "pass net"),
        ({"schedule_type": "flowmatch"}, "needs sigma_max <= 1, got 10"),
        ({**FLOWMATCH, "net": MixtureDenoiser()}, "flow models"),
        ({"shift": 3.0}, "shift and mu belong to schedule flowmatch, not to polynomial"),
        ({"schedule_type": "discrete", "mu": 0.5, "net": MixtureDenoiser()}, "belong to schedule flowmatch"),
        ({**FLOWMATCH, "shift": 3.0, "mu": 0.5}, "shift 3 or mu 0.5, not both"),
        ({**FLOWMATCH, "shift": 0.0}, "shift must be positive, got 0"),
        ({**FLOWMATCH, "shift": -1.0}, "shift must be positive, got -1"),
        ({**FLOWMATCH, "shift": math.inf}, "shift must be positive, got inf"),
        ({**FLOWMATCH, "shift": math.nan}, "shift must be positive, got nan"),
        ({**FLOWMATCH, "mu": math.nan}, "mu must be a number .*, got nan"),
        ({**FLOWMATCH, "mu": -math.inf}, "mu must be a number .*, got -inf"),
        ({**FLOWMATCH, "mu": 1000.0}, "mu must be a number .*, got 1000"),
        ({**FLOWMATCH, "shift": 3.0, "net": MixtureDenoiser()}, "flow models"),
        ({**FLOWMATCH, "shift": 3.0, "sigma_max": 1.1}, "needs sigma_max <= 1"),
        # log(1 + sigma_min^2) is too large for the VP process to reach it at t = 1e-3.
        ({"schedule_type": "time_uniform", "sigma_min": 5.0}, "time_uniform .* does not fall"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(SolverError, match=message) as error:
        get_schedule(**{"num_steps": 11, "sigma_min": 0.1, "sigma_max": 10.0, **arguments})
    assert "\n" not in str(error.value)


def test_ends_that_are_the_models_own_are_not_checked():
    """None stands for an end that the model knows; what is given is checked all the same."""
    check_schedule("polynomial", 5, None, None, 7)
    check_schedule("flowmatch", 5, None, 1.0, 1, shift=3.0)
    with pytest.raises(SolverError, match="sigma_max -1"):
        check_schedule("polynomial", 5, None, -1.0, 7)
    with pytest.raises(SolverError, match="not both"):
        check_schedule("flowmatch", 5, None, None, 1, shift=3.0, mu=0.5)
