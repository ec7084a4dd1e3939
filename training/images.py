"""The one quantisation rule: what is scored, saved and read back are the same 8-bit pixels."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from torch_utils.checkpoint import atomic_file
from torch_utils.errors import UserError
from torch_utils.untrusted import read_bounded

# Formats that are plain pictures; of the others that Pillow knows, EPS is a program that Ghostscript would run.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 4096 * 4096  # 0.2 GB as float32
MAX_BYTES = 256 << 20  # of a file; as many pixels without compression take 64 MB
# What Pillow raises on broken, truncated or oversized files, depending on the format.
UNREADABLE = (
    OSError,
    SyntaxError,
    EOFError,
    IndexError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageError(UserError):
    """An image that cannot be read, or values that are no image."""


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Put floating-point images in [-1, 1] (clamped, any shape) on the 8-bit grid: float32 k/255 in [0, 1].

    k = floor(255 (x + 1)/2 + 1/2), so halves go up. Raises `ImageError` for NaN and infinity.
    """
    if not images.is_floating_point():
        raise ImageError(f"quantize needs floating-point images in [-1, 1], got {images.dtype}")
    if not torch.isfinite(images).all():
        raise ImageError("images hold NaN or infinite values; the sampler diverged")
    return _from_levels(_levels((images.to(torch.float32) + 1) / 2).clamp_(0, 255))


def to_uint8(images01: torch.Tensor) -> torch.Tensor:
    """Images `[N, 3, H, W]` in [0, 1] as uint8 `[N, H, W, 3]` on the same device, by the rule of `quantize`.

    Raises `ImageError` for another shape or values outside [0, 1].
    """
    if images01.ndim != 4 or images01.shape[1] != 3 or not images01.is_floating_point():
        raise ImageError(f"expected float images [N, 3, H, W], got {images01.dtype} {list(images01.shape)}")
    if not ((images01 >= 0) & (images01 <= 1)).all():
        raise ImageError("image values lie outside [0, 1]; pass images through quantize first")
    return _levels(images01.to(torch.float32)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _levels(images01: torch.Tensor) -> torch.Tensor:
    return torch.floor(images01 * 255 + 0.5)


def _from_levels(levels: torch.Tensor) -> torch.Tensor:
    # The divisor is a tensor: CUDA turns division by a plain number into a product with its rounded inverse, and
    # the same pixel would then differ in the last bit between devices.
    return levels / torch.full((), 255.0, device=levels.device)


def save_png(image01: torch.Tensor, path: str | os.PathLike[str]) -> None:
    """Write one image `[3, H, W]` in [0, 1] as an 8-bit RGB PNG, atomically. `load_image` returns the same pixels."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ImageError(f"image file {path} must end in .png")
    pixels = to_uint8(image01.unsqueeze(0))[0].cpu().numpy()
    with atomic_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def load_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read an image file as float32 RGB `[3, H, W]` on the grid k/255, by Pillow's `convert("RGB")`.

    Grey and palette images are expanded; an alpha channel is dropped, not blended; EXIF rotation is not applied; of an
    animation the first frame counts. Raises `ImageError` naming the file when it is missing, broken or truncated, has
    more than `MAX_BYTES`, more than `MAX_PIXELS` or `PIL.Image.MAX_IMAGE_PIXELS` pixels, more than 8 bits per channel,
    or is none of `FORMATS`.
    """
    try:
        # Not from the file itself: Pillow reads as many bytes as it announces, and each read would reserve them.
        with Image.open(io.BytesIO(read_bounded(path, MAX_BYTES)), formats=FORMATS) as image:
            if image.width * image.height > min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
                raise ImageError(f"image {path} is too large: {image.width} x {image.height} pixels")
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"image {path} has more than 8 bits per channel (mode {image.mode}); save it as 8-bit")
            pixels = np.array(image.convert("RGB"))
    except ImageError:
        raise
    except UNREADABLE as error:
        raise ImageError(f"cannot read image {path}: {error}") from error
    return _from_levels(torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32)).contiguous()


def image_grid(images01: torch.Tensor, columns: int) -> torch.Tensor:
    """Lay images `[N, 3, H, W]` out row by row: `[3, ceil(N/columns) H, columns W]`, empty places black."""
    if columns < 1 or images01.ndim != 4 or len(images01) == 0:
        raise ImageError(f"a grid needs images [N, 3, H, W] and columns >= 1, got {list(images01.shape)} and {columns}")
    count, channels, height, width = images01.shape
    rows = -(-count // columns)
    places = images01.new_zeros(rows * columns, channels, height, width)
    places[:count] = images01
    tiles = places.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiles.reshape(channels, rows * height, columns * width)
