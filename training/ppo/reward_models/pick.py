"""PickScore v1 (arXiv 2305.01569): CLIP ViT-H/14, tuned on which of two pictures people picked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.ppo.reward_models.clip_backbone import CLIP_H, CosineReward
from training.ppo.reward_models.pixels import transformers_offset
from training.ppo.reward_models.tokens import TransformersTokenizer


class RewardPick(CosineReward):
    """Raw PickScore, usually 20 to 22 on Stable Diffusion v1.5: exp(logit_scale) times the cosine, not divided by 26.

    Preprocessing and tokens are those of transformers' CLIP processor before it had a torchvision one.
    """

    name = "pickscore_v1"
    asset = "pickscore_v1"
    published_version = "v1"
    published_sizes = CLIP_H
    tokenizer = TransformersTokenizer
    crop_offset = staticmethod(transformers_offset)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        cosines = super().score(images, prompts)
        return self.backbone.model.logit_scale.exp().to(cosines.device) * cosines
