"""What a diffusers scheduler's configuration says of the model: its noise levels and what it predicts."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from training.denoisers import ModelError
from training.denoisers.stable_diffusion import MAX_TIMESTEPS, NoiseTable

PREDICTIONS = ("epsilon", "v_prediction")


class ModelNoise(NoiseTable):
    """The noise table of a Stable Diffusion model, with what schedules ask of a `Denoiser`, and the model's view of x.

    x = data + sigma noise is the solver's state. The model sees x / sqrt(1 + sigma^2) at a timestep, a fractional index
    into its table, and predicts epsilon, or v = (noise - sigma data) / sqrt(1 + sigma^2) (arXiv 2202.00512, App. D).
    Raises `ModelError` for another noise schedule or prediction.
    """

    is_flow = False

    def __init__(self, num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str, predicts: str):
        if beta_schedule != "scaled_linear" or predicts not in PREDICTIONS:
            raise ModelError(
                f"the scheduler's configuration has noise schedule {beta_schedule!a} and predicts {predicts!a}; "
                f"scaled_linear and {' or '.join(PREDICTIONS)} needed, as Stable Diffusion has"
            )
        match [beta_start, beta_end, num_train_timesteps]:
            case [float(first), float(last), int(count)] if 0 < first < last < 1 and 2 <= count <= MAX_TIMESTEPS:
                super().__init__(first, last, count)
            case numbers:
                raise ModelError(f"the scheduler's configuration has no usable noise table: {ascii(numbers)[:100]}")
        self.predicts = predicts
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> Self:
        self.device = device
        return super().to(device)

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the model is told for noise level `sigma`: float32, 0 is the first entry of its table."""
        return (len(self.times) * self.sigma_inv(sigma) - 1).to(torch.float32)

    def level(self, timestep: Tensor) -> Tensor:
        """Noise level of a timestep, float64; the inverse of `timestep`."""
        return self.sigma((timestep.to(torch.float64) + 1) / len(self.times))

    def seen(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the model sees of `x [B, C, H, W]` at `sigma` (0-dim or `[B]`), in the dtype of x."""
        return x * _per_row((sigma**2 + 1).rsqrt(), x)

    def slope(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """dx/dsigma, which is epsilon, of the model's `output` at `x [B, C, H, W]` and `sigma` (0-dim or `[B]`)."""
        if self.predicts == "epsilon":
            return output
        return _per_row((sigma**2 + 1).rsqrt(), x) * (output + _per_row(sigma, x) * self.seen(x, sigma))


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype) if values.ndim == 0 else values.to(x.dtype).reshape(-1, 1, 1, 1)
