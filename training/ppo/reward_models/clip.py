"""CLIPScore as the EPD paper reports it: the plain cosine of OpenAI's CLIP ViT-L/14 (arXiv 2103.00020)."""

from __future__ import annotations

from training.ppo.reward_models.clip_backbone import CLIP_L, CosineReward
from training.ppo.reward_models.pixels import torchvision_offset
from training.ppo.reward_models.tokens import OpenAITokenizer


class RewardCLIP(CosineReward):
    """Raw CLIPScore, usually 0.26 to 0.28 on Stable Diffusion v1.5. No factor of 2.5, no words before the prompt.

    Preprocessing and tokens are those of OpenAI's package. On a GPU that package computes with float16 weights, which
    changes the fourth digit; here float32 is the default.
    """

    name = "clip_l14"
    asset = "clip_l14"
    published_version = "openai"
    published_sizes = CLIP_L
    tokenizer = OpenAITokenizer
    crop_offset = staticmethod(torchvision_offset)
