"""How pictures reach the scorers' image encoders: Pillow's and torchvision's resizing, on tensors on their device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Of OpenAI's CLIP, and of all scorers that grew out of it.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow's filter weights are whole multiples of 1 / ONE.
ONE = 1 << 22


def torchvision_offset(spare: int) -> int:
    """Rows or columns that torchvision's centre crop leaves before it, of `spare` in all: half, rounded to even."""
    return round(spare / 2)


def transformers_offset(spare: int) -> int:
    """The same of transformers' image processors: half, rounded down."""
    return spare // 2


def shortest_side(images: Tensor, size: int, offset: Callable[[int], int]) -> Tensor:
    """Shortest side to `size` by Pillow's bicubic filter, then the central square: `[N, 3, size, size]` in [0, 1].

    `images` are float `[N, 3, H, W]` on the 8-bit grid, and so is the result: Pillow's pixels, bit for bit. `offset`
    places the square: one of the two functions above. The longer side is cut to a whole number of pixels, as both
    libraries do.

    As in Pillow, rows are resized before columns. (Since version 13 it begins with the columns of pictures that shrink
    much more in height than in width; the published scores are older.)
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    left, top = offset(wide - size), offset(tall - size)
    images = pillow_pass(images, wide, slice(left, left + size))
    return pillow_pass(images.transpose(-1, -2), tall, slice(top, top + size)).transpose(-1, -2)


def pillow_pass(images: Tensor, size: int, kept: slice) -> Tensor:
    """One direction of Pillow's bicubic `resize`: `[..., W]` => the columns `kept` of `[..., size]`.

    The result is rounded to 8 bits, which gradients do not see. Pillow computes with whole numbers; so does this, in
    float64, which holds them exactly on every device.
    """
    width = images.shape[-1]
    if size == width:
        return images[..., kept]
    levels = 255 * images.double()
    levels = levels + (levels.round() - levels).detach()
    resized = levels @ pillow_weights(width, size, kept).to(images.device).T / ONE
    rounded = torch.floor(resized + 0.5).clamp(0, 255)
    return ((resized + (rounded - resized).detach()) / 255).to(images.dtype)


def pillow_weights(width: int, size: int, kept: slice) -> Tensor:
    """Pillow's bicubic filter from `width` to `size` pixels: whole float64 `[kept, width]`, in units of 1 / ONE.

    The filter widens as pictures shrink. What lies beyond the edge counts nothing.
    """
    scale = width / size
    widened = max(scale, 1.0)
    centres = (torch.arange(kept.start, kept.stop, dtype=torch.float64)[:, None] + 0.5) * scale
    x = ((torch.arange(width, dtype=torch.float64) + 0.5 - centres) / widened).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = ONE * weights / weights.sum(1, keepdim=True)
    return torch.trunc(weights + weights.sign() / 2)  # halves away from 0


def antialiased(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as torchvision resizes tensors: `[N, 3, H, W]` => `[N, 3, height, width]`.

    Overshoot is kept. The gradient is that of PyTorch's own backward pass, added up in a fixed order on a GPU too.
    """
    if (height, width) == images.shape[-2:]:
        return images
    return _Antialiased.apply(images, height, width)


class _Antialiased(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, height: int, width: int) -> Tensor:
        ctx.sides = images.shape[-2:]
        return _bicubic(images, height, width)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = (
            _bicubic(torch.eye(old, dtype=gradient.dtype, device=gradient.device)[None, None], new, old)[0, 0]
            for old, new in zip(ctx.sides, gradient.shape[-2:], strict=True)
        )
        return rows.T @ gradient @ columns, None, None


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def normalized(images: Tensor) -> Tensor:
    """`images [N, 3, H, W]` with CLIP's mean and deviation of each channel taken out."""
    mean, std = (torch.tensor(part, device=images.device, dtype=images.dtype).view(3, 1, 1) for part in (MEAN, STD))
    return (images - mean) / std
