"""Stage 4: the text-to-image UNet on cached latents, with SD v1.5's noise schedule; then the pipeline's index file.

python -m training.embedded.unet    ->  src/embedded/unet, scheduler, model_index.json
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
import torch.nn.functional as F

from training.embedded.common import DEVICE, EmojiData, load_data, report_size, train_steps
from training.embedded.data import COLOURS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

VIEWS = 4  # cached random views of each (picture, colour): encoding inside the loop would be the bottleneck
CAPTION_DROP = 0.1
EMA_DECAY = 0.999


def build_unet(text_width: int, sample_size: int) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(4)
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 104, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler():
    """SD v1.5's beta table in the scheduler that its own folder ships."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass
class LatentCache:
    """Scaled latents and text embeddings of every training pair, in half precision on the device."""

    latents: torch.Tensor  # [VIEWS, N, 16, 4, 16, 16]
    text: torch.Tensor  # [N, 16, length, width]
    empty_text: torch.Tensor  # [length, width]: the embedding of the empty caption


@torch.no_grad()
def cache_latents(data: EmojiData, folder: Path) -> LatentCache:
    """Encode every picture on every colour VIEWS times, and every caption once, with the earlier stages' models."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).to(DEVICE)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).to(DEVICE).float()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    num_pictures = len(data.rgba)
    latents = torch.empty(VIEWS, num_pictures, len(COLOURS), 4, 16, 16, dtype=torch.float16, device=DEVICE)
    text = []
    for rows in torch.arange(num_pictures, device=DEVICE).split(256):
        for colour in range(len(COLOURS)):
            colours = torch.full_like(rows, colour)
            for view in range(VIEWS):
                with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
                    mean = vae.encode(data.random_views(rows, colours)).latent_dist.mode()
                latents[view, rows, colour] = (mean.float() * vae.config.scaling_factor).half()
        tokens = data.tokens[rows].flatten(0, 1)
        text.append(text_encoder(tokens).last_hidden_state.half().view(len(rows), len(COLOURS), tokens.shape[1], -1))
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    return LatentCache(latents, torch.cat(text), text_encoder(empty).last_hidden_state[0].half())


def denoising_loss(
    unet: UNet2DConditionModel, cache: LatentCache, data: EmojiData, alphas_cumprod: torch.Tensor, batch: int
) -> torch.Tensor:
    """Epsilon prediction (Ho et al. 2020, eq. 14) with caption dropout for classifier-free guidance."""
    index, colour = data.random_batch(batch)
    view = torch.randint(VIEWS, (len(index),), device=DEVICE)
    latents = cache.latents[view, index, colour].float()
    dropped = torch.rand(len(index), 1, 1, device=DEVICE) < CAPTION_DROP
    text = torch.where(dropped, cache.empty_text, cache.text[index, colour]).float()
    timestep = torch.randint(len(alphas_cumprod), (len(index),), device=DEVICE)
    alpha = alphas_cumprod[timestep][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    return F.mse_loss(unet(noisy, timestep, text).sample.float(), noise)


def write_index(folder: Path) -> None:
    """The `model_index.json` by which diffusers recognises a StableDiffusionPipeline folder."""
    parts = {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", **parts, "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--data", "data_dir", type=click.Path(path_type=Path), default=Path(".data/emoji"), show_default=True)
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("src/embedded"), show_default=True)
@click.option("--steps", type=int, default=20000, show_default=True)
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Stop (and cool down) by then.")
@click.option("--batch", type=int, default=768, show_default=True)
@click.option(
    "--compile/--no-compile", "compiled", default=False, show_default=True, help="torch.compile the UNet (GPU)."
)
def main(data_dir: Path, outdir: Path, steps: int, minutes: float, batch: int, compiled: bool) -> None:
    data = load_data(data_dir)
    cache = cache_latents(data, outdir)
    scheduler = build_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod.to(DEVICE)
    unet = build_unet(cache.text.shape[-1], cache.latents.shape[-1]).to(DEVICE, memory_format=torch.channels_last)
    report_size("UNet", unet)
    average = copy.deepcopy(unet).requires_grad_(False)
    pairs = list(average.parameters()), list(unet.parameters())

    def update_average() -> None:
        torch._foreach_lerp_(pairs[0], pairs[1], 1 - EMA_DECAY)

    network = torch.compile(unet) if compiled else unet
    train_steps(
        unet,
        lambda: denoising_loss(network, cache, data, alphas_cumprod, batch),
        steps,
        minutes,
        lr=1.5e-3,
        after_step=update_average,
    )
    with torch.no_grad():
        losses = [denoising_loss(average, cache, data, alphas_cumprod, 1024).item() for _ in range(8)]
    click.echo(f"UNet: average loss {sum(losses) / len(losses):.4f}", err=True)
    average.to(torch.float16, memory_format=torch.contiguous_format).save_pretrained(outdir / "unet")
    scheduler.save_pretrained(outdir / "scheduler")
    write_index(outdir)


if __name__ == "__main__":
    main()
