"""Stage 2: the two CLIP models. A's text half becomes the text encoder and A judges held-out; B is the reward.

python -m training.embedded.clip --which a    ->  src/embedded/heldout  and  src/embedded/text_encoder, tokenizer
python -m training.embedded.clip --which b    ->  src/embedded/reward
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import torch
import torch.nn.functional as F

from training.embedded.common import DEVICE, EmojiData, load_data, report_size, train_steps
from training.embedded.data import COLOURS, IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import CLIPModel


class Size(NamedTuple):
    """What one of the two models is built from; text and vision are width, layers, heads."""

    seed: int
    text: tuple[int, int, int]
    vision: tuple[int, int, int]
    projection: int
    folder: str


# Another seed, width, depth and head size for B, so that a flaw of one is not a flaw of the other.
SIZES = {
    "a": Size(seed=1, text=(192, 4, 6), vision=(144, 6, 4), projection=128, folder="heldout"),
    "b": Size(seed=2, text=(128, 3, 2), vision=(128, 6, 8), projection=96, folder="reward"),
}


def build_clip(which: str, tokenizer) -> CLIPModel:
    """A model of the size in SIZES with random weights."""
    from transformers import CLIPConfig, CLIPModel

    size = SIZES[which]
    torch.manual_seed(size.seed)

    def tower(width: int, layers: int, heads: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    specials = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        **tower(*size.text),
        **specials,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
    }
    vision = {**tower(*size.vision), "image_size": IMAGE_SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.projection))


def contrastive_loss(model: CLIPModel, data: EmojiData, batch: int) -> torch.Tensor:
    """Symmetric InfoNCE (Radford et al. 2021) over pairs whose captions all differ."""
    index, colour = data.random_batch(batch)
    # Slight noise, so that a decoded latent scores like the picture it stands for.
    images = data.random_views(index, colour)
    images = images + 0.03 * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(images)
    logits = model(input_ids=data.tokens[index, colour], pixel_values=images).logits_per_image.float()
    target = torch.arange(len(index), device=index.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def evaluate(model: CLIPModel, data: EmojiData) -> tuple[float, float]:
    """Top-1 retrieval among 512 and the mean cosine of matching pairs."""
    index, colour = data.random_batch(512)
    output = model(input_ids=data.tokens[index, colour], pixel_values=data.random_views(index, colour))
    cosine = output.image_embeds @ output.text_embeds.T
    return (
        cosine.argmax(1) == torch.arange(len(index), device=index.device)
    ).float().mean().item(), cosine.diag().mean().item()


def save_preprocessing(folder: Path) -> None:
    """The reward contract reads size, mean and standard deviation from here: [0, 1] pixels to [-1, 1]."""
    from transformers import CLIPImageProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


@click.command(help=__doc__)
@click.option(
    "--which",
    type=click.Choice(["a", "b"]),
    required=True,
    help="The text encoder and held-out judge (a) or the reward (b).",
)
@click.option("--data", "data_dir", type=click.Path(path_type=Path), default=Path(".data/emoji"), show_default=True)
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("src/embedded"), show_default=True)
@click.option("--steps", type=int, default=2500, show_default=True)
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Stop (and cool down) by then.")
@click.option("--batch", type=int, default=1024, show_default=True)
def main(which: str, data_dir: Path, outdir: Path, steps: int, minutes: float, batch: int) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    data = load_data(data_dir)
    tokenizer = CLIPTokenizer.from_pretrained(data_dir / "tokenizer", local_files_only=True)
    model = build_clip(which, tokenizer).to(DEVICE)
    report_size(f"CLIP {which.upper()}", model)
    train_steps(model, lambda: contrastive_loss(model, data, batch), steps, minutes, lr=1e-3)
    top1, cosine = evaluate(model.eval(), data)
    click.echo(
        f"CLIP {which.upper()}: top-1 among 512 {top1:.3f}, mean cosine of {len(COLOURS)}-colour pairs {cosine:.3f}",
        err=True,
    )
    model.half()
    folder = outdir / SIZES[which].folder
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_preprocessing(folder)
    if which == "a":
        CLIPTextModel.from_pretrained(folder, dtype=torch.float16, local_files_only=True).save_pretrained(
            outdir / "text_encoder"
        )
        tokenizer.save_pretrained(outdir / "tokenizer")


if __name__ == "__main__":
    main()
