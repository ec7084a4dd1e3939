"""HPSv2's image preprocessing, on tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from training.ppo.reward_models.pixels import antialiased, normalized


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize, pad and normalise as the authors' inference does: `[N, 3, H, W]` float in [0, 1] -> `[N, 3, size, size]`.

    The longest side becomes `size` (bicubic, antialiased, overshoot kept, as torchvision >= 0.17 does with tensors),
    then black bars make the image square, the odd row or column of a bar to the right or below.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    # A side of a very long image would round to 0 rows.
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    images = antialiased(images, new_height, new_width)
    pad_height, pad_width = size - new_height, size - new_width
    left, top = pad_width // 2, pad_height // 2
    return normalized(F.pad(images, (left, pad_width - left, top, pad_height - top)))
