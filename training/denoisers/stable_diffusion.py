"""Stable Diffusion 1.x in the diffusers folder layout: the real one and the embedded miniature, by the same code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.denoisers.base import PRECISIONS, Denoiser, ModelError, TextCond

WEIGHT_FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
}
# Where sampling stops: below it SD's latents change too little to be worth an evaluation, and the published tables
# and baselines all end there.
SIGMA_MIN = 0.1


class NoiseTable:
    """Continuous time of SD's 1000-step noise table: log alpha is piecewise linear between t_n = (n+1)/1000.

    alpha is the signal's coefficient in x_t = alpha x_0 + alpha sigma noise (DPM-Solver, arXiv 2206.00927, Appendix
    D.4 has this interpolation). Outside the table the first and last segments are extended.
    """

    def __init__(self, beta_start: float, beta_end: float, num_timesteps: int):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        self.log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)  # [n] float64, falling
        self.times = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps

    def to(self, device: torch.device) -> NoiseTable:
        self.log_alpha, self.times = self.log_alpha.to(device), self.times.to(device)
        return self

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t) = sqrt(1 - alpha^2)/alpha, float64."""
        log_alpha = _interpolate(t.to(self.times), self.times, self.log_alpha)
        return torch.expm1(-2 * log_alpha).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """The t of sigma(t), float64."""
        log_alpha = -0.5 * torch.log1p(sigma.to(self.times) ** 2)
        return _interpolate(-log_alpha, -self.log_alpha, self.times)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots rising; the outer segments go on beyond the ends."""
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    # `take` and not `knots[left]`: a single index is read back from the device, and the host would wait for it.
    share = (x - knots.take(left)) / (knots.take(right) - knots.take(left))
    return values.take(left) + share * (values.take(right) - values.take(left))


class StableDiffusion(Denoiser):
    """Epsilon-prediction latent diffusion with a CLIP text encoder; the slope is the guided epsilon."""

    is_flow = False

    def __init__(
        self, folder: Path, dataset_name: str, guidance_rate: float, device: torch.device, precision: str = "float32"
    ):
        """Load from `folder`, which `check_folder` accepted. `precision`: of UNet and text encoder; the VAE stays in
        float32, and so does the ODE's state."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as transformers_logging

        dtype = PRECISIONS[precision]

        def frozen(model: torch.nn.Module) -> torch.nn.Module:
            return model.to(device).eval().requires_grad_(False)

        def diffusers_part(kind: type, part: str, dtype: torch.dtype) -> torch.nn.Module:
            # low_cpu_mem_usage would need the accelerate package.
            model = kind.from_pretrained(
                folder / part, dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True
            )
            return frozen(model).to(memory_format=torch.channels_last)

        transformers_logging.disable_progress_bar()
        self.dataset_name = dataset_name
        self.device = device
        self.dtype = dtype
        self.guidance_rate = guidance_rate
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.text_encoder = frozen(
            CLIPTextModel.from_pretrained(
                folder / "text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
            )
        )
        self.unet = diffusers_part(UNet2DConditionModel, "unet", dtype)
        self.vae = diffusers_part(AutoencoderKL, "vae", torch.float32)
        scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
        self.table = NoiseTable(scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"])
        self.table.to(device)
        self.img_channels = self.unet.config.in_channels
        self.img_resolution = self.unet.config.sample_size
        self.sigma_min = SIGMA_MIN
        self.sigma_max = self.table.sigma(torch.ones(())).item()
        self.calls = self.rows = 0
        self.empty_text = self._embed([""])

    def slope(self, x: Tensor, sigma: Tensor, cond: TextCond) -> Tensor:
        """Guided epsilon e_0 + g (e_c - e_0) (Ho & Salimans, arXiv 2207.12598, Eq. 6 with g = 1 + w)."""
        self.calls += 1
        self.rows += len(x)
        scale = (sigma.to(torch.float64) ** 2 + 1).rsqrt().to(x.dtype).reshape(-1, 1, 1, 1)
        timestep = len(self.table.times) * self.sigma_inv(sigma) - 1
        rows = (x * scale).to(self.dtype).contiguous(memory_format=torch.channels_last)
        timestep = timestep.to(torch.float32).expand(len(x))
        if self.guidance_rate == 1:
            return self.unet(rows, timestep, cond.text).sample.to(x.dtype)
        text = torch.cat([self.empty_text.expand(len(x), -1, -1), cond.text])
        epsilon = self.unet(rows.repeat(2, 1, 1, 1), timestep.repeat(2), text).sample.to(x.dtype)
        unconditional, conditional = epsilon.chunk(2)
        return unconditional + self.guidance_rate * (conditional - unconditional)

    def sigma(self, t: Tensor) -> Tensor:
        return self.table.sigma(t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return self.table.sigma_inv(sigma)

    def initial_state(self, noise: Tensor, sigma0: float | Tensor) -> Tensor:
        return noise * sigma0

    def encode_prompts(self, prompts: Sequence[str]) -> TextCond:
        return TextCond(self._embed(list(prompts)))

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> Tensor:
        """Last hidden states `[B, length, width]`, padded and cut to the tokenizer's length, end token kept."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(torch.float32).contiguous(memory_format=torch.channels_last)
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


def check_folder(folder: Path) -> None:
    """Raise `ModelError`, one line, unless `folder` holds every part of a Stable Diffusion 1.x model."""
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give a folder in diffusers' layout")
    needed = ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
    needed += [f"{part}/{name}" for part, weights in WEIGHT_FILES.items() for name in ("config.json", weights)]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"model folder {folder} lacks {', '.join(missing)}")
    try:
        scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
        schedule, prediction = scheduler["beta_schedule"], scheduler.get("prediction_type", "epsilon")
        complete = all(name in scheduler for name in ("beta_start", "beta_end", "num_train_timesteps"))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/scheduler/scheduler_config.json is not a scheduler configuration") from error
    if schedule != "scaled_linear" or prediction != "epsilon" or not complete:
        raise ModelError(
            f"{folder} has noise schedule {schedule} and predicts {prediction}; Stable Diffusion 1.x needed"
        )
