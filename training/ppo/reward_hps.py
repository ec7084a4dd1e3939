"""HPSv2, the human preference score that PPO maximises on Stable Diffusion (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from HPSv2.model import ARCHITECTURE, build_model, read_state_dict
from HPSv2.preprocess import preprocess
from torch_utils.checkpoint import CheckpointError
from torch_utils.download_util import stamped_sha256
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, check_inputs, cosine_scores, dtype_name, load_strict
from training.ppo.reward_models.tokens import OpenClipTokenizer
from training.ppo.reward_weights import find_weights, version_of

VERSIONS = ("v2.1", "v2.0")
# v2.0 has the same layout and is found under v2.1's name in places; its scores are on another scale. Of its hash the
# project knows the beginning only.
V20_SHA256_START = "07cb0d20"


class RewardHPS:
    """Raw HPSv2: cosine of the fine-tuned CLIP ViT-H/14's image and text embeddings, no logit scale."""

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        amp: bool = False,
        architecture: str = ARCHITECTURE,
        version: str = VERSIONS[0],
    ) -> None:
        """Load the checkpoint `weights` (default: the cached one) of `version` into the open_clip model `architecture`.

        `amp` computes under float16 autocast on a GPU as the authors do, which rounds scores in [0.25, 0.5) to
        multiples of 2^-12; the default is float32 throughout. Raises `UserError` for missing weights or `amp` without
        a GPU, `CheckpointError` for a file that is damaged, not HPSv2's, or known to be another version.
        """
        self.device = torch.device(device)
        self.dtype = dtype_name(amp, self.device)
        self.name = f"hps_{version}"
        path = find_weights(self.name, weights)
        self.amp = amp
        self.batch_size = batch_size
        self.weights_sha256 = stamped_sha256(path)
        self.version = _version(version, path, self.weights_sha256)
        state = read_state_dict(path)
        self.model = build_model(architecture, self.device)
        load_strict(self.model, state, path)
        self.image_size = self.model.visual.image_size[0]
        self.preprocessing = f"longest-side-bicubic-antialias-pad-{self.image_size}"
        self.tokenizer = OpenClipTokenizer(self.model.context_length)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; usual values on Stable Diffusion v1.5 are 0.20 to 0.30."""
        check_inputs(images, prompts)
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp):
            return cosine_scores(images, prompts, self.batch_size, self._embed_images, self._embed_texts)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`: more than 75 tokens between start and end."""
        return self.tokenizer.count_truncated(prompts)

    def _embed_images(self, images: Tensor) -> Tensor:
        pixels = preprocess(images.to(self.device, torch.float32), self.image_size)
        return self.model.encode_image(pixels, normalize=True)

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)


def _version(wanted: str, path: Path, sha256: str) -> str:
    found = "v2.0" if sha256.startswith(V20_SHA256_START) else version_of("hps_v2.1", path, sha256, "v2.1")
    if found not in (wanted, "custom"):
        raise CheckpointError(f"{path} is HPS{found}, whose scores are on another scale than those of HPS{wanted}")
    return found
