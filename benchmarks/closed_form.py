"""A denoiser whose slope is known exactly: data from a mixture of Gaussians, so tests have true trajectories."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETA_D, BETA_MIN = 19.9, 0.1  # VP time: sigma(t)^2 = exp(BETA_D t^2/2 + BETA_MIN t) - 1


@dataclass(frozen=True)
class ShiftCond:
    """A condition that moves all mixture means of row b by `shift[b]` (`[B]`)."""

    shift: Tensor

    def __len__(self) -> int:
        return len(self.shift)

    def __getitem__(self, rows: slice) -> ShiftCond:
        return ShiftCond(self.shift[rows])

    def repeat_interleave(self, k: int) -> ShiftCond:
        return ShiftCond(self.shift.repeat_interleave(k))


class MixtureDenoiser:
    """Data x_0 ~ sum_j pi_j N(mu_j, std^2 I); the state is x_0 + sigma n, or (1 - sigma) x_0 + sigma n if `is_flow`.

    `slope` has the dtype of x (float32 or float64) and refuses sigmas that break the contract of the solvers (float64
    on x.device, 0-dim or one per row). `calls` and `rows` count.
    """

    sigma_min, sigma_max = 0.01, 80.0
    img_channels, img_resolution = 2, 3

    def __init__(self, components: int = 3, std: float = 0.5, is_flow: bool = False, flow_shift: float = 3.0):
        random = torch.Generator().manual_seed(5)
        size = (self.img_channels, self.img_resolution, self.img_resolution)
        self.means = torch.randn(components, *size, generator=random, dtype=torch.float64)  # [J, C, H, W]
        self.log_pi = torch.log_softmax(torch.randn(components, generator=random, dtype=torch.float64), 0)
        self.std, self.is_flow, self.flow_shift = std, is_flow, flow_shift
        if is_flow:
            self.sigma_min, self.sigma_max = 0.003, 1.0
        self.calls = self.rows = 0

    def slope(self, x: Tensor, sigma: Tensor, cond: ShiftCond | None = None) -> Tensor:
        if sigma.dtype != torch.float64 or sigma.device != x.device or sigma.shape not in ((), (len(x),)):
            raise ValueError(f"sigma {sigma.dtype} {tuple(sigma.shape)} on {sigma.device} for {len(x)} rows")
        if cond is not None and len(cond) != len(x):
            raise ValueError(f"{len(cond)} conditions for {len(x)} rows")
        self.calls += 1
        self.rows += len(x)
        means = self.means.to(x)[None]  # [1, J, C, H, W]
        if cond is not None:
            means = means + cond.shift.to(x)[:, None, None, None, None]
        s = sigma.to(x.dtype).expand(len(x))[:, None, None, None, None]
        signal = 1 - s if self.is_flow else torch.ones_like(s)
        variance = (signal * self.std) ** 2 + s**2
        away = x[:, None] - signal * means  # [B, J, C, H, W]
        log_gamma = self.log_pi.to(x) - (away**2 / variance).sum((2, 3, 4)) / 2
        gamma = torch.softmax(log_gamma, 1)[:, :, None, None, None]
        data = means + signal * self.std**2 / variance * away  # E[x_0 | x, j]
        noise = s / variance * away  # E[n | x, j]
        return (gamma * (noise - data if self.is_flow else noise)).sum(1)

    def sigma(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return self.flow_shift * t / (1 + (self.flow_shift - 1) * t)
        return torch.expm1(BETA_D * t**2 / 2 + BETA_MIN * t).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        if self.is_flow:
            return sigma / (self.flow_shift - (self.flow_shift - 1) * sigma)
        return ((BETA_MIN**2 + 2 * BETA_D * torch.log1p(sigma**2)).sqrt() - BETA_MIN) / BETA_D

    def initial_state(self, noise: Tensor, sigma0: float) -> Tensor:
        return noise if self.is_flow else noise * sigma0

    def start(self, batch: int, sigma0: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """A fixed start state `[B,C,H,W]` at sigma0."""
        size = (batch, *self.means.shape[1:])
        noise = torch.randn(size, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        return self.initial_state(noise, sigma0).to(dtype)


def gaussian_solution(net: MixtureDenoiser, x: Tensor, sigma0: float, sigma: float) -> Tensor:
    """The exact state at `sigma`, in closed form for a net of ONE component that is not a flow model."""
    ratio = math.sqrt((net.std**2 + sigma**2) / (net.std**2 + sigma0**2))
    return net.means[0] + (x - net.means[0]) * ratio


def reference_solution(net, x: Tensor, sigma0: float, sigma: float, cond=None, steps: int = 800) -> Tensor:
    """The state at `sigma` > 0 by classical Runge-Kutta 4 in log sigma, float64; error about 1e-10 for the mixture."""
    h = (math.log(sigma) - math.log(sigma0)) / steps

    def f(log_sigma: float, x: Tensor) -> Tensor:
        s = torch.tensor(log_sigma, dtype=torch.float64, device=x.device).exp()
        return s * net.slope(x, s, cond)

    x = x.double()
    for n in range(steps):
        y = math.log(sigma0) + n * h
        k1 = f(y, x)
        k2 = f(y + h / 2, x + h / 2 * k1)
        k3 = f(y + h / 2, x + h / 2 * k2)
        k4 = f(y + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
