"""How pictures reach the scorers' image encoders: Pillow's resizing, on tensors and on their device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Of OpenAI's CLIP, and of all scorers that grew out of it.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def torchvision_offset(spare: int) -> int:
    """Rows or columns that torchvision's centre crop leaves before it, of `spare` in all: half, rounded to even."""
    return round(spare / 2)


def transformers_offset(spare: int) -> int:
    """The same of transformers' image processors: half, rounded down."""
    return spare // 2


def shortest_side(images: Tensor, size: int, offset: Callable[[int], int]) -> Tensor:
    """Shortest side to `size` by Pillow's bicubic filter, then the central square: `[N, 3, size, size]` in [0, 1].

    `images` are float `[N, 3, H, W]` on the 8-bit grid, and so is the result. `offset` places the square: one of the
    two functions above. The longer side is cut to a whole number of pixels, as both libraries do.

    As in Pillow, rows are resized before columns. (Since version 13 it begins with the columns of pictures that shrink
    much more in height than in width; the published scores are older.)
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    left, top = offset(wide - size), offset(tall - size)
    # Cut at once, for the second pass takes every column by itself.
    images = pillow_pass(images, (height, wide))[..., left : left + size]
    return pillow_pass(images, (tall, size))[..., top : top + size, :]


def pillow_pass(images: Tensor, size: tuple[int, int]) -> Tensor:
    """One direction of Pillow's bicubic `resize`: `[N, 3, H, W]` => `[N, 3, *size]`, where one side stays.

    The filter widens as pictures shrink, and the result is rounded to 8 bits, which gradients do not see.
    """
    if size == tuple(images.shape[-2:]):
        return images
    resized = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    levels = torch.floor(255 * resized + 0.5).clamp(0, 255) / 255
    return resized + (levels - resized).detach()


def normalized(images: Tensor) -> Tensor:
    """`images [N, 3, H, W]` with CLIP's mean and deviation of each channel taken out."""
    mean, std = (torch.tensor(part, device=images.device, dtype=images.dtype).view(3, 1, 1) for part in (MEAN, STD))
    return (images - mean) / std
