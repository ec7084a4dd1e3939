"""What the training stages share: pictures on the device, random views of them, captions as tokens, the step loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.embedded.data import COLOURS, STYLES, caption

torch.set_float32_matmul_precision("high")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class EmojiData:
    """All pictures, names and tokenized captions on one device."""

    rgba: Tensor  # [N, 4, 64, 64] uint8, alpha premultiplied
    tokens: Tensor  # [N, 16, length] int64: the caption of picture n on colour c
    colours: Tensor  # [16, 3] float32 in [0, 1]

    def random_views(self, index: Tensor, colour: Tensor, max_shift: float = 0.08, max_zoom: float = 0.12) -> Tensor:
        """Pictures `index` on backgrounds `colour` ([B] each), a little moved and scaled => [B, 3, 64, 64], -1 to 1."""
        pictures = self.rgba[index].float() / 255
        zoom = 1 + (torch.rand(len(index), device=index.device) * 2 - 1) * max_zoom
        shift = (torch.rand(len(index), 2, device=index.device) * 2 - 1) * max_shift
        affine = torch.zeros(len(index), 2, 3, device=index.device)
        affine[:, 0, 0] = affine[:, 1, 1] = zoom
        affine[:, :, 2] = shift
        grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
        pictures = F.grid_sample(pictures, grid, mode="bicubic", align_corners=False).clamp(0, 1)
        background = self.colours[colour][:, :, None, None]
        return ((pictures[:, :3] + (1 - pictures[:, 3:]) * background) * 2 - 1).clamp(-1, 1)

    def random_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """`size` random (picture, colour) index pairs; within one batch of at most N no picture repeats."""
        index = torch.randperm(len(self.rgba), device=self.rgba.device)[:size]
        return index, torch.randint(len(COLOURS), (len(index),), device=self.rgba.device)


def load_data(folder: Path) -> EmojiData:
    """What the data stage wrote, on DEVICE."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    packed = np.load(folder / "emoji.npz")
    captions = [
        caption(name, STYLES[style], colour)
        for name, style in zip(packed["names"].tolist(), packed["styles"].tolist(), strict=True)
        for colour in COLOURS
    ]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    rgba = torch.from_numpy(packed["rgba"]).permute(0, 3, 1, 2).contiguous()
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    return EmojiData(rgba.to(DEVICE), tokens.view(len(rgba), len(COLOURS), -1).to(DEVICE), colours.to(DEVICE))


def train_steps(
    module: torch.nn.Module,
    loss_fn: Callable[[], Tensor],
    steps: int,
    minutes: float,
    lr: float,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Adam with 5 % warm-up and a cosine to zero over `steps` or `minutes`, whichever ends first; bf16 on a GPU.

    The learning rate follows the larger share used up, so that a run that the clock ends has cooled down all the same.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=DEVICE == "cuda"
    )
    start, logged = time.monotonic(), 0.0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(progress / 0.05 + 1e-2, 1) * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = loss_fn()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        after_step()
        if time.monotonic() - logged > 10:
            logged = time.monotonic()
            click.echo(f"step {step}/{steps} loss {loss.item():.4f} at {(logged - start) / 60:.1f} min", err=True)


def report_size(name: str, module: torch.nn.Module) -> None:
    click.echo(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters", err=True)
