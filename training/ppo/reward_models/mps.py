"""MPS (Multi-dimensional Preference Score, arXiv 2405.14705) for the condition "overall"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from MPS.trainer.models.checkpoint import read_state_dict
from MPS.trainer.models.clip_model import OVERALL, THRESHOLD, MPSModel, condition_mask
from MPS.trainer.models.cross_modeling import CrossSizes
from torch_utils.download_util import stamped_sha256
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, check_inputs, dtype_name, exact_float32, load_strict
from training.ppo.reward_models.clip_backbone import CLIP_H, ClipSizes
from training.ppo.reward_models.pixels import normalized, shortest_side, transformers_offset
from training.ppo.reward_models.tokens import TransformersTokenizer
from training.ppo.reward_weights import find_weights

ASSET = "mps"
# Positions, counted up, which some versions of transformers stored.
SPARE = tuple(f"model.{tower}_model.embeddings.position_ids" for tower in ("text", "vision"))


@dataclass(frozen=True)
class MPSSizes:
    """The shape of the network; the defaults are the published model's."""

    clip: ClipSizes = CLIP_H
    cross: CrossSizes = field(default_factory=CrossSizes)


class RewardMPS:
    """Raw MPS: exp(logit_scale) times the cosine of the prompt with the image, of which it sees what its words ask.

    The image's tokens attend to those words of the prompt that are like the condition "overall"; what is computed, and
    who says so, is in `MPS.trainer.models.clip_model`. Pictures and prompts are read as by transformers' image
    processor and tokenizer with the settings of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which the authors' scripts load.
    """

    name = "mps_overall"
    version = "overall"  # one checkpoint was published, without a hash that could tell it from another

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        amp: bool = False,
        sizes: MPSSizes = MPSSizes(),
    ) -> None:
        """Load `weights`, the official pickled module, a state dict or a `.safetensors` file (default: the cached one).

        `amp` computes under float16 autocast on a GPU, close to the authors' half precision; the default is float32
        throughout. Raises `UserError` for missing weights or `amp` without a GPU, `CheckpointError`, one line, for a
        file that is damaged or another model's. No code from the file runs.
        """
        self.device = torch.device(device)
        self.dtype = dtype_name(amp, self.device)
        path = find_weights(ASSET, weights)
        self.amp, self.batch_size, self.sizes = amp, batch_size, sizes
        self.weights_sha256 = stamped_sha256(path)
        state = read_state_dict(path)
        # The random start values, which nobody needs, are drawn on the device: seconds faster than on the CPU.
        with torch.device(self.device):
            model = MPSModel(sizes.clip.config(), sizes.cross)
        self.model = model.to(torch.float32).eval().requires_grad_(False)
        load_strict(self.model, state, path, spare=SPARE)
        self.tokenizer = TransformersTokenizer()
        self.preprocessing = f"shortest-side-pillow-bicubic-{sizes.clip.image_size}-transformers-crop-mask-{THRESHOLD}"
        with self._arithmetic(), exact_float32():
            self.condition = self._encode_texts([OVERALL])[0][0]  # [77, W]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`. Each distinct prompt is encoded once, and takes 0.3 MB meanwhile."""
        check_inputs(images, prompts)
        if not prompts:
            return torch.zeros(0, device=images.device)
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        cosines = []
        with self._arithmetic(), exact_float32():
            chunks = [distinct[i : i + self.batch_size] for i in range(0, len(distinct), self.batch_size)]
            texts, ends = (torch.cat(parts) for parts in zip(*map(self._encode_texts, chunks), strict=True))
            mask = condition_mask(texts, self.condition)
            for start in range(0, len(prompts), self.batch_size):
                rows = [row[prompt] for prompt in prompts[start : start + self.batch_size]]
                features = self._encode_images(images[start : start + self.batch_size])
                cosines.append(self.model.cosines(features, texts[rows], ends[rows], mask[rows]))
            scores = self.model.scale * torch.cat(cosines).float()
        return scores.to(images.device)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`: more than 75 tokens between start and end."""
        return self.tokenizer.count_truncated(prompts)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp)

    def _encode_texts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.model.encode_texts(self.tokenizer(prompts).to(self.device))

    def _encode_images(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        images = shortest_side(images, self.sizes.clip.image_size, transformers_offset)
        return self.model.encode_images(normalized(images))
