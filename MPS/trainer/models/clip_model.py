"""MPS's network: CLIP ViT-H/14, all of its tokens, and the prompt's words that matter for a condition.

Where the facts come from:

- Which features are taken, what is projected, the similarity and the mask: `trainer/models/clip_model.py` of
  Kwai-Kolors/MPS (copies in aigc-apps/EasyAnimate and modelscope/DiffSynth-Studio) and its evaluation scripts
  `eval_overall_mps_on_hpdv2.py` and `eval_overall_mps_on_imagereward.py`.
- The threshold 0.3: both evaluation scripts. The README's example runs the model's own forward, which has 0.01.
- The maximum per prompt: the scripts score one pair at a time. The code itself takes it over whatever it is given.
- The condition of the overall score: both evaluation scripts and the README, with the full stop at its end.
- Padding with the end-of-text token, which is attended like every other: `pad_token` in the tokenizer configuration of
  laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which the scripts load.
- The prompt's one vector at its highest token id: transformers before its pull request 24777. It is the first
  end-of-text token, as it is by the later rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from MPS.trainer.models.cross_modeling import CrossModel, CrossSizes

if TYPE_CHECKING:
    from transformers import CLIPConfig

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3


class MPSModel(nn.Module):
    """CLIP, as `model`, and the attention from its image tokens to its text tokens, as `cross_model`."""

    def __init__(self, clip: CLIPConfig, cross: CrossSizes) -> None:
        """Random weights; the names of the parameters are the official module's."""
        super().__init__()
        from transformers import CLIPModel

        self.model = CLIPModel(clip)
        self.cross_model = CrossModel(clip.projection_dim, cross)

    def encode_texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """int64 `[N, T]` => projected features of all tokens `[N, T, W]` and of the end-of-text token `[N, W]`."""
        hidden = self.model.text_model(input_ids=tokens).last_hidden_state
        features = self.model.text_projection(hidden)
        # The end-of-text token has the highest id; of several, as in padding, the first is meant.
        return features, features[range(len(tokens)), tokens.argmax(dim=-1)]

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised `[N, 3, S, S]` => projected features of the class token and the patches `[N, 1 + P, W]`.

        They are taken before CLIP's last layer norm, which only its usual embedding goes through.
        """
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)

    def cosines(self, images: Tensor, texts: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
        """Cosine of each prompt with the image as seen through its unmasked words: `[N]`.

        `images [N, 1 + P, W]`; `texts [N, T, W]` and `ends [N, W]` of `encode_texts`; `mask [N, T]` of
        `condition_mask`.
        """
        seen = F.normalize(self.cross_model(images, texts, mask)[:, 0], dim=-1)
        # A matrix product, so that autocast rounds it to half precision as the authors' arithmetic does.
        return (seen[:, None, :] @ F.normalize(ends, dim=-1)[:, :, None]).flatten()

    @property
    def scale(self) -> Tensor:
        """What the cosine is multiplied by: exp(logit_scale)."""
        return self.model.logit_scale.exp()


def condition_mask(texts: Tensor, condition: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Which tokens of each prompt to look at: bool `[N, T]`, for `texts [N, T, W]` and one `condition [C, W]`.

    A token's similarity is its largest dot product with a token of the condition. It is seen when the similarity is
    more than `threshold` of the largest in its own prompt; so at least the most similar one always is.
    """
    similarity = (texts @ condition.T).amax(dim=-1)
    return similarity / similarity.amax(dim=-1, keepdim=True) > threshold
