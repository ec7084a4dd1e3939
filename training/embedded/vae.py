"""Stage 3: the autoencoder, 3x64x64 pixels <-> 4x16x16 latents, in diffusers' `AutoencoderKL`.

python -m training.embedded.vae    ->  src/embedded/vae
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
import torch.nn.functional as F

from training.embedded.common import DEVICE, EmojiData, load_data, report_size, train_steps
from training.embedded.data import IMAGE_SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KL_WEIGHT = 1e-6  # as in latent diffusion (Rombach et al. 2022): the latents only need to stay bounded


def build_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        latent_channels=4,
        block_out_channels=(40, 80, 112),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def reconstruction_loss(vae: AutoencoderKL, data: EmojiData, batch: int) -> torch.Tensor:
    """L1 on pixels and on pixel differences (edges carry the drawing), plus a small KL term."""
    images = data.random_views(*data.random_batch(batch)).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    edges = sum(F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (-1, -2))
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 0.5 * edges + KL_WEIGHT * posterior.kl().mean()


@torch.no_grad()
def evaluate(vae: AutoencoderKL, data: EmojiData) -> tuple[float, float]:
    """Mean PSNR in dB over 512 pictures, and the latents' standard deviation."""
    images = data.random_views(*data.random_batch(512))
    latents = vae.encode(images).latent_dist.mode()
    decoded = vae.decode(latents).sample.clamp(-1, 1)
    psnr = -10 * (((decoded - images) / 2) ** 2).mean(dim=(1, 2, 3)).log10()
    return psnr.mean().item(), latents.std().item()


@click.command(help=__doc__)
@click.option("--data", "data_dir", type=click.Path(path_type=Path), default=Path(".data/emoji"), show_default=True)
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("src/embedded"), show_default=True)
@click.option("--steps", type=int, default=6000, show_default=True)
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Stop (and cool down) by then.")
@click.option("--batch", type=int, default=192, show_default=True)
def main(data_dir: Path, outdir: Path, steps: int, minutes: float, batch: int) -> None:
    data = load_data(data_dir)
    vae = build_vae().to(DEVICE, memory_format=torch.channels_last)
    report_size("VAE", vae)
    train_steps(vae, lambda: reconstruction_loss(vae, data, batch), steps, minutes, lr=1e-3)
    psnr, std = evaluate(vae.eval(), data)
    click.echo(f"VAE: PSNR {psnr:.2f} dB, latent standard deviation {std:.3f}", err=True)
    vae.register_to_config(scaling_factor=1 / std)
    vae.to(torch.float16, memory_format=torch.contiguous_format).save_pretrained(outdir / "vae")


if __name__ == "__main__":
    main()
