"""LAION's aesthetic predictor v2: five linear layers on the image embedding of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_utils.download_util import stamped_sha256
from training.ppo.reward_base import (
    DEFAULT_BATCH_SIZE,
    check_inputs,
    dtype_name,
    exact_float32,
    load_strict,
    read_weights,
)
from training.ppo.reward_models.clip_backbone import CLIP_L, ClipBackbone, ClipSizes
from training.ppo.reward_models.pixels import torchvision_offset
from training.ppo.reward_models.tokens import OpenAITokenizer
from training.ppo.reward_weights import find_weights, version_of

METRIC = "aesthetic_v2"
ASSET = "aesthetic"
BACKBONE_ASSET = "clip_l14"
# Outputs of the linear layers, whose places in the published file are 0, 2, 4, 6 and 7: dropout stood between them.
HEAD_WIDTHS = (1024, 128, 64, 16, 1)


class AestheticHead(nn.Module):
    """`[B, width]` => `[B]`: linear layers with nothing between them, under the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inputs = (width, *HEAD_WIDTHS[:-1])
        linear = [nn.Linear(*sizes) for sizes in zip(inputs, HEAD_WIDTHS, strict=True)]
        between = [nn.Identity() for _ in range(3)]
        self.layers = nn.Sequential(
            linear[0], between[0], linear[1], between[1], linear[2], between[2], linear[3], linear[4]
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)[:, 0]


class RewardAesthetic:
    """Raw aesthetic score of the picture alone; prompts are not read."""

    name = METRIC

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        backbone: str | Path | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        amp: bool = False,
        sizes: ClipSizes = CLIP_L,
    ) -> None:
        """Load the head `weights` and the CLIP model `backbone`, a file or folder (defaults: the cached ones).

        `amp` is float16 autocast on a GPU, of the backbone only. Raises `UserError` for missing weights or `amp`
        without a GPU, `CheckpointError` for a file that is damaged or another model's.
        """
        self.device = torch.device(device)
        self.dtype = dtype_name(amp, self.device)
        path, backbone_path = find_weights(ASSET, weights), find_weights(BACKBONE_ASSET, backbone)
        self.amp, self.batch_size = amp, batch_size
        sha256, backbone_sha256 = stamped_sha256(path), stamped_sha256(backbone_path)
        self.weights_sha256 = f"{sha256}+{backbone_sha256}"  # both decide on a score
        versions = version_of(ASSET, path, sha256, "v2"), version_of(BACKBONE_ASSET, backbone_path, backbone_sha256, "")
        self.version = "custom" if "custom" in versions else "v2"
        self.head = AestheticHead(sizes.projection).eval().requires_grad_(False)
        load_strict(self.head, read_weights(path, "the aesthetic predictor's head"), path)
        self.head.to(self.device)
        self.backbone = ClipBackbone(backbone_path, sizes, OpenAITokenizer(), torchvision_offset, self.device)
        self.preprocessing = self.backbone.preprocessing

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; usual values on Stable Diffusion v1.5 are 4.5 to 6."""
        check_inputs(images, prompts)
        scores = [torch.zeros(0, device=images.device)]
        with exact_float32():
            for few in images.split(self.batch_size) if len(images) else ():
                with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp):
                    embeddings = self.backbone.embed_images(few)
                scores.append(self.head(embeddings.float()).to(images.device))
        return torch.cat(scores)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`: none, as none is read."""
        return 0
