"""The two CLIP models, in transformers' layout, that several metrics are built on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.download_util import stamped_sha256
from training.ppo.reward_base import (
    DEFAULT_BATCH_SIZE,
    check_inputs,
    cosine_scores,
    dtype_name,
    load_strict,
    read_weights,
)
from training.ppo.reward_models.pixels import normalized, shortest_side
from training.ppo.reward_models.tokens import CONTEXT_LENGTH, OpenAITokenizer, TransformersTokenizer
from training.ppo.reward_weights import find_weights, version_of

if TYPE_CHECKING:
    from transformers import CLIPConfig

# Buffers that older files hold: positions, counted up.
SPARE = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


@dataclass(frozen=True)
class Tower:
    """One transformer of a CLIP model."""

    width: int
    layers: int
    heads: int
    hidden: int  # width of the feed-forward networks


@dataclass(frozen=True)
class ClipSizes:
    """The shape of a CLIP model."""

    vision: Tower
    text: Tower
    projection: int  # length of both embeddings
    activation: str  # transformers' name
    patch: int = 14
    image_size: int = 224
    vocabulary: int = 49408

    def config(self) -> CLIPConfig:
        """As transformers describes it."""
        from transformers import CLIPConfig

        towers = [
            {
                "hidden_size": tower.width,
                "num_hidden_layers": tower.layers,
                "num_attention_heads": tower.heads,
                "intermediate_size": tower.hidden,
                "hidden_act": self.activation,
                "projection_dim": self.projection,
            }
            for tower in (self.text, self.vision)
        ]
        ids = {"bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1}
        text = {"vocab_size": self.vocabulary, "max_position_embeddings": CONTEXT_LENGTH, **ids}
        vision = {"patch_size": self.patch, "image_size": self.image_size}
        return CLIPConfig(
            text_config=towers[0] | text, vision_config=towers[1] | vision, projection_dim=self.projection
        )


# OpenAI's ViT-L/14 (arXiv 2103.00020) and LAION's ViT-H/14 (arXiv 2212.07143), of which PickScore and MPS are tuned.
CLIP_L = ClipSizes(Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072), 768, "quick_gelu")
CLIP_H = ClipSizes(Tower(1280, 32, 16, 5120), Tower(1024, 24, 16, 4096), 1024, "gelu")


class ClipBackbone:
    """A CLIP model with its own preprocessing: pictures and prompts in, L2-normalised embeddings out."""

    def __init__(
        self,
        weights: Path,
        sizes: ClipSizes,
        tokenizer: OpenAITokenizer | TransformersTokenizer,
        crop_offset: Callable[[int], int],
        device: torch.device,
    ) -> None:
        """Load `weights`, a `.safetensors` file or a torch file of a plain dict.

        `crop_offset` is of `pixels`. Raises `CheckpointError`, one line, for weights that do not fit `sizes`.
        """
        from transformers import CLIPModel

        state = read_weights(weights, "CLIP weights in transformers' layout")
        # The random start values, which nobody needs, are drawn on the device: seconds faster than on the CPU.
        with torch.device(device):
            self.model = CLIPModel(sizes.config())
        self.model = self.model.to(torch.float32).eval().requires_grad_(False)
        load_strict(self.model, state, weights, spare=SPARE)
        self.sizes, self.tokenizer, self.crop_offset, self.device = sizes, tokenizer, crop_offset, device

    @property
    def preprocessing(self) -> str:
        """How pixels reach the model, for the records of scores."""
        library = self.crop_offset.__name__.removesuffix("_offset")
        return f"shortest-side-pillow-bicubic-{self.sizes.image_size}-{library}-crop"

    def embed_images(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] => `[B, projection]` on the model's device."""
        images = shortest_side(images.to(self.device, torch.float32), self.sizes.image_size, self.crop_offset)
        return F.normalize(self.model.get_image_features(pixel_values=normalized(images)).pooler_output, dim=-1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts => `[B, projection]` on the model's device."""
        tokens = self.tokenizer(prompts).to(self.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=-1)


class CosineReward:
    """A reward that is the cosine of a CLIP model's embeddings; a subclass says which model's, read how."""

    name: str
    asset: ClassVar[str]  # key of the published weights
    published_version: ClassVar[str]
    published_sizes: ClassVar[ClipSizes]
    tokenizer: ClassVar[type[OpenAITokenizer | TransformersTokenizer]]
    crop_offset: ClassVar[staticmethod[[int], int]]

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        amp: bool = False,
        sizes: ClipSizes | None = None,
    ) -> None:
        """Load `weights`, a file or a folder in transformers' layout (default: the cached one), of the model `sizes`.

        `amp` is float16 autocast on a GPU. Raises `UserError` for missing weights or `amp` without a GPU,
        `CheckpointError` for a file that is damaged or another model's.
        """
        self.device = torch.device(device)
        self.dtype = dtype_name(amp, self.device)
        path = find_weights(self.asset, weights)
        self.amp, self.batch_size = amp, batch_size
        self.weights_sha256 = stamped_sha256(path)
        self.version = version_of(self.asset, path, self.weights_sha256, self.published_version)
        sizes = sizes or self.published_sizes
        self.backbone = ClipBackbone(path, sizes, self.tokenizer(), self.crop_offset, self.device)
        self.preprocessing = self.backbone.preprocessing

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`: cosines."""
        check_inputs(images, prompts)
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp):
            return cosine_scores(
                images, prompts, self.batch_size, self.backbone.embed_images, self.backbone.embed_texts
            )

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`: more than 75 tokens between start and end."""
        return self.backbone.tokenizer.count_truncated(prompts)
