"""Stable Diffusion 1.x, the real one and the embedded miniature, by the same code."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from torch_utils import distributed
from torch_utils.untrusted import check_tokenizer_config, read_model_config
from training.denoisers.base import DECODER_DTYPES, PRECISIONS, Denoiser, ModelError, TextCond
from training.denoisers.replay import Replayed
from training.denoisers.single_file import SUFFIXES, check_single_file, clip_tokenizer, load_single_file
from training.denoisers.unet import BranchedUNet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

WEIGHT_FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
}
WANTED = f"give a folder in diffusers' layout, or a single {' or '.join(SUFFIXES)} file"
MAX_TIMESTEPS = 100_000
ODD_FILES = ("*.index.json", "adapter_*")  # which the libraries would take for the weights, or add to them
# Where sampling stops: below it SD's latents change too little to be worth an evaluation, and the published tables
# and baselines all end there.
SIGMA_MIN = 0.1
# Pixels that are decoded at a time, four pictures of 512 x 512: what the decoder keeps is many times as large as the
# latents, and more at once is no faster.
DECODED_AT_ONCE = 2**20


class NoiseTable:
    """Continuous time of SD's 1000-step noise table: log alpha is piecewise linear between t_n = (n+1)/1000.

    alpha is the signal's coefficient in x_t = alpha x_0 + alpha sigma noise (DPM-Solver, arXiv 2206.00927, Appendix
    D.4 has this interpolation). Outside the table the first and last segments are extended.
    """

    sigma_min = SIGMA_MIN

    def __init__(self, beta_start: float, beta_end: float, num_timesteps: int):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        self.log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)  # [n] float64, falling
        self.times = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps

    def to(self, device: torch.device) -> Self:
        self.log_alpha, self.times = self.log_alpha.to(device), self.times.to(device)
        return self

    @property
    def sigma_max(self) -> float:
        """The noise level of time 1."""
        return self.sigma(torch.ones(())).item()

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
        self,
        source: Path,
        configs: Path,
        dataset_name: str,
        guidance_rate: float,
        device: torch.device,
        precision: str = "float32",
        compile_mode: str = "off",
    ):
        """Load from `source`, a folder or a file that `check_source` accepted; a file goes by the `configs`.

        precision     of UNet and text encoder; of the VAE see DECODER_DTYPES. The ODE's state stays in float32.
        compile_mode  of `replay.COMPILE_MODES`, for UNet and VAE on a GPU.
        """
        self.dataset_name = dataset_name
        self.device = device
        self.dtype = PRECISIONS[precision]
        self.guidance_rate = guidance_rate
        # The whole slope at once, or the network alone where ranks share out its rows.
        self.guided = Replayed(self._slope, "network", compile_mode, device)
        self.epsilon = Replayed(self._epsilon, "network", compile_mode, device)
        self.rows_are_shared = False
        self.decoder = Replayed(self._decode, "decoder", compile_mode, device)
        folder = source if source.is_dir() else configs
        networks = load_folder(source, self.dtype) if source.is_dir() else load_single_file(source, configs, self.dtype)
        unet, vae, self.text_encoder = (network.to(device).eval().requires_grad_(False) for network in networks)
        self.unet = BranchedUNet(unet)
        self.vae = vae.to(memory_format=torch.channels_last)
        self.tokenizer = load_tokenizer(folder, self.text_encoder.config.max_position_embeddings)
        self.table = read_noise(folder).to(device)
        self.img_channels = self.unet.config.in_channels
        self.img_resolution = self.unet.config.sample_size
        side = _decoded_side(self.img_resolution, self.vae.config.block_out_channels)
        self.decoded_at_once = max(DECODED_AT_ONCE // side**2, 1)
        self.sigma_min, self.sigma_max = self.table.sigma_min, self.table.sigma_max
        self.calls = self.rows = 0
        self.noted: set[str] = set()  # prompts that were looked at for their length
        try:
            self.empty_text = self._embed([""])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a configuration can describe what does not run
            raise ModelError(f"the text encoder of {source} does not run: {_one_line(error)}") from error

    def slope(self, x: Tensor, sigma: Tensor, cond: TextCond) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        sigma = sigma.to(torch.float64).expand(len(x))
        if not self.rows_are_shared:
            return self.guided(x, sigma, cond.text)
        text = self._branches(cond.text)
        branches = len(text) // len(x)
        x, sigma = x.repeat(branches, 1, 1, 1), sigma.repeat(branches)
        return self._guide(distributed.share_rows(self.epsilon, x, sigma, text))

    def _slope(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """The slope `[B, C, H, W]` at `x [B, C, H, W]`, `sigma [B]` for the prompts `text [B, length, width]`."""
        return self._guide(self._epsilon(x, sigma, self._branches(text)))

    def _branches(self, text: Tensor) -> Tensor:
        """The prompts of all rows: with guidance an empty one for each row, then its own."""
        return text if self.guidance_rate == 1 else torch.cat([self.empty_text.expand(len(text), -1, -1), text])

    def _guide(self, epsilon: Tensor) -> Tensor:
        """Guided epsilon e_0 + g (e_c - e_0) (Ho & Salimans, arXiv 2207.12598, Eq. 6 with g = 1 + w)."""
        if self.guidance_rate == 1:
            return epsilon
        unconditional, conditional = epsilon.chunk(2)
        return unconditional + self.guidance_rate * (conditional - unconditional)

    def _epsilon(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Epsilon `[R, C, H, W]` for R prompts at `x [B, C, H, W]`, `sigma [B]`; B: see `BranchedUNet`."""
        scale = (sigma**2 + 1).rsqrt().to(x.dtype).reshape(-1, 1, 1, 1)
        timestep = (len(self.table.times) * self.sigma_inv(sigma) - 1).to(torch.float32)
        rows = (x * scale).to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.unet(rows, timestep, text).to(x.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return self.table.sigma(t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return self.table.sigma_inv(sigma)

    def initial_state(self, noise: Tensor, sigma0: float | Tensor) -> Tensor:
        return noise * sigma0

    def encode_prompts(self, prompts: Sequence[str]) -> TextCond:
        if distributed.is_main() or not self.rows_are_shared:  # ranks that share rows have the same prompts
            self._note_truncation(prompts)
        return TextCond(self._embed(list(prompts)))

    def _note_truncation(self, prompts: Sequence[str]) -> None:
        """One line on stderr for each prompt that is longer than the text encoder takes; once in this model's life."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.noted]
        self.noted.update(new)
        limit = self.tokenizer.model_max_length
        # `verbose` would have the tokenizer warn too, of the first one only.
        for ids in self.tokenizer(new, verbose=False).input_ids if new else []:
            if len(ids) > limit:
                read = self.tokenizer.decode(ids[1 : limit - 1]).strip()[-40:]
                note = f"a prompt of {len(ids)} tokens is cut to {limit}; the model reads no further than: ...{read}"
                tqdm.write(f"note: {note}", file=sys.stderr)

    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> Tensor:
        """Last hidden states `[B, length, width]`, padded and cut to the tokenizer's length, end token kept."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.decoder(few) for few in latents.split(self.decoded_at_once)])

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = (latents.to(torch.float32) / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(scaled.contiguous(memory_format=torch.channels_last), return_dict=False)[0].float()

    def share_rows(self) -> None:
        self.rows_are_shared = True

    def compile_calls(self, compiling: bool) -> None:
        for part in (self.guided, self.epsilon, self.decoder):
            part.compiling = compiling


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The three networks of a folder in diffusers' layout, on the CPU, in `dtype` (the VAE: see DECODER_DTYPES)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    common = {"use_safetensors": True, "local_files_only": True}
    unet, vae, text = (folder / part for part in ("unet", "vae", "text_encoder"))
    try:
        with torch.device("meta"):
            _check_size(UNet2DConditionModel.from_config(read_config(folder, "unet")), folder, "unet")
            _check_size(AutoencoderKL.from_config(read_config(folder, "vae")), folder, "vae")
            config = CLIPTextConfig.from_dict(read_config(folder, "text_encoder"))
            _check_size(CLIPTextModel(config), folder, "text_encoder")
        return (
            # low_cpu_mem_usage would need the accelerate package.
            UNet2DConditionModel.from_pretrained(unet, dtype=dtype, low_cpu_mem_usage=False, **common),
            AutoencoderKL.from_pretrained(vae, dtype=DECODER_DTYPES[dtype], low_cpu_mem_usage=False, **common),
            CLIPTextModel.from_pretrained(text, dtype=dtype, **common),
        )
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what the libraries raise for a configuration that is none is written down nowhere
        raise ModelError(f"{folder} cannot be loaded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_size(network: torch.nn.Module, folder: Path, part: str) -> None:
    """Raise `ModelError` for a configuration that asks for more numbers than its weights have."""
    from safetensors import safe_open

    with safe_open(folder / part / WEIGHT_FILES[part], framework="pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict
    wanted = sum(parameter.numel() for parameter in network.parameters())
    if wanted > stored:
        raise ModelError(f"{folder}/{part}/config.json describes {wanted} numbers, its weights have {stored}")


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of a model. Raises `ModelError`, see `read_model_config`."""
    path = folder / part / "config.json"
    try:
        return read_model_config(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be used: {error}") from error


def load_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """The folder's tokenizer, or CLIP's own of `length` tokens where it has none."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer").is_dir():
        return clip_tokenizer(length)
    try:
        check_tokenizer_config(folder / "tokenizer/tokenizer_config.json")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:
        raise ModelError(f"the tokenizer of {folder} cannot be loaded: {_one_line(error)}") from error
    tokens = tokenizer.model_max_length  # whatever tokenizer_config.json says
    if type(tokens) is not int or not 2 < tokens <= length:  # prompts are padded to it
        raise ModelError(f"the tokenizer of {folder} makes {tokens!a:.40} tokens, its text encoder reads {length}")
    return tokenizer


def check_source(source: Path) -> None:
    """Raise `ModelError`, one line, for what can be neither a model's folder nor its single file."""
    if source.is_dir() or (source.suffix not in SUFFIXES and not source.is_file()):
        check_folder(source)
    else:
        check_single_file(source)


def weight_files(source: Path) -> list[Path]:
    """What a model's folder, or its single file, has the weights in."""
    return [source / part / name for part, name in WEIGHT_FILES.items()] if source.is_dir() else [source]


def picture_size(folder: Path) -> int:
    """Height and width in pixels of what the model makes, by the folder's configurations."""
    latents = read_config(folder, "unet").get("sample_size")
    blocks = read_config(folder, "vae").get("block_out_channels")
    if type(latents) is not int or not isinstance(blocks, list):
        raise ModelError(f"{folder} does not say the size of its pictures; Stable Diffusion 1.x needed")
    return _decoded_side(latents, blocks)


def _decoded_side(latents: int, blocks: Sequence[int]) -> int:
    """The picture's side by that of its latents: the VAE halves it between its levels."""
    return latents * 2 ** (len(blocks) - 1)


def check_folder(folder: Path) -> None:
    """Raise `ModelError`, one line, unless `folder` holds every part of a Stable Diffusion 1.x model."""
    if not folder.is_dir():
        raise ModelError(f"model {folder} does not exist; {WANTED}")
    needed = ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
    needed += [f"{part}/{name}" for part, weights in WEIGHT_FILES.items() for name in ("config.json", weights)]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"model folder {folder} lacks {', '.join(missing)}; {WANTED}")
    for part in WEIGHT_FILES:
        read_config(folder, part)
        if odd := [path.name for pattern in ODD_FILES for path in (folder / part).glob(pattern)]:
            raise ModelError(f"{folder}/{part} has {odd[0]}; whole weights needed, in {WEIGHT_FILES[part]}")
    read_noise(folder)


def read_noise(folder: Path) -> NoiseTable:
    """The noise table of the folder's scheduler; raises `ModelError` for one of another kind of model."""
    path = folder / "scheduler/scheduler_config.json"
    try:
        scheduler = read_model_config(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a scheduler configuration: {error}") from error
    schedule, prediction = scheduler.get("beta_schedule"), scheduler.get("prediction_type", "epsilon")
    match [scheduler.get(name) for name in ("beta_start", "beta_end", "num_train_timesteps")]:
        case [float(first), float(last), int(count)] if 0 < first < last < 1 and 2 <= count <= MAX_TIMESTEPS:
            if schedule == "scaled_linear" and prediction == "epsilon":
                return NoiseTable(first, last, count)
    raise ModelError(f"{folder} has noise schedule {schedule} and predicts {prediction}; Stable Diffusion 1.x needed")
