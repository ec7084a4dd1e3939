"""ImageReward v1.0, a human preference score in which the prompt reads the image through cross attention.

Xu et al., arXiv 2304.05977: BLIP's ViT-L/16 and BERT, tuned on rankings of images, and a linear head on [CLS].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_utils.checkpoint import CheckpointError, sha256_file
from torch_utils.download_util import ASSETS, stamped_sha256
from torch_utils.untrusted import read_bounded
from training.ppo.reward_base import (
    DEFAULT_BATCH_SIZE,
    check_inputs,
    dtype_name,
    exact_float32,
    load_strict,
    read_weights,
)
from training.ppo.reward_models.aesthetic import AestheticHead
from training.ppo.reward_models.clip_backbone import Tower
from training.ppo.reward_models.pixels import normalized, shortest_side, torchvision_offset
from training.ppo.reward_weights import find_weights, version_of

METRIC = "imagereward_v1.0"
ASSET = "imagereward"
VOCABULARY_ASSET = "bert_vocabulary"
VOCABULARY = ASSETS[VOCABULARY_ASSET].files[0]
MAX_VOCABULARY_BYTES = 4 << 20  # BERT's has 0.2 MB

# Of the head's outputs on the authors' data, which makes scores roughly standard normal.
OUTPUT_MEAN = 0.16717362830052426
OUTPUT_STD = 1.0333394966054072

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# What BLIP appends to BERT's vocabulary; a prompt that holds their names becomes them.
BLIP_TOKENS = ("[DEC]", "[ENC]")
# What a score does not need: three parts of the authors' class, then the rest of what BLIP's own pretraining holds.
SPARE = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.text_encoder.embeddings.position_ids",
    "blip.itm_head.",
    "blip.temp",
    "blip.visual_encoder_m.",
    "blip.text_encoder_m.",
    "blip.vision_proj_m.",
    "blip.text_proj_m.",
    "blip.image_queue",
    "blip.text_queue",
    "blip.queue_ptr",
    "blip.text_decoder.",
)


@dataclass(frozen=True)
class ImageRewardSizes:
    """The shape of the network."""

    vision: Tower
    text: Tower
    patch: int = 16
    image_size: int = 224
    embeddings: int = 30524  # rows of the token embedding: the vocabulary and BLIP's two tokens
    positions: int = 512  # rows of the position embedding
    context: int = 35  # tokens of a prompt, [CLS] and [SEP] included


PUBLISHED_SIZES = ImageRewardSizes(Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072))


def find_vocabulary(path: str | Path | None, weights: Path) -> Path:
    """BERT's vocabulary: `path`, else vocab.txt beside `weights`, else the cached file, fetched on first use.

    Raises `UserError` naming the file, its source and the folder it belongs in.
    """
    beside = weights.with_name(VOCABULARY.name)
    return beside if path is None and beside.is_file() else find_weights(VOCABULARY_ASSET, path)


class BertTokenizer:
    """BERT's lower-case word pieces between [CLS] and [SEP], padded with [PAD]."""

    def __init__(self, path: Path, size: int, length: int) -> None:
        """Read the vocabulary `path`: `size` tokens, one a line, whose number, from 0, is the token's id.

        `length` tokens of a prompt are read. Raises `CheckpointError` for another number of tokens, or where one of
        `SPECIAL_TOKENS` is missing.
        """
        from tokenizers import BertWordPieceTokenizer

        try:
            lines = read_bounded(path, MAX_VOCABULARY_BYTES).decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not BERT's vocabulary: it is no UTF-8 text") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read as BERT's vocabulary: {error.strerror}") from error
        ids = {token: number for number, token in enumerate(lines)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise CheckpointError(f"{path} is not BERT's vocabulary: it lacks {', '.join(missing)}")
        if len(ids) != size:
            raise CheckpointError(
                f"{path} is not the vocabulary of these weights: it has {len(ids)} different tokens instead of {size}"
            )
        self.length = length
        self.padding = ids["[PAD]"]
        self.tokenizer = BertWordPieceTokenizer(ids)
        self.tokenizer.add_special_tokens(list(BLIP_TOKENS))

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids, and 1 for tokens or 0 for padding: both int64 `[N, length]`, N > 0.

        Longer prompts are cut and keep their [SEP].
        """
        rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        rows = [row if len(row) <= self.length else [*row[: self.length - 1], row[-1]] for row in rows]
        padding = [self.length - len(row) for row in rows]
        ids = [row + [self.padding] * rest for row, rest in zip(rows, padding, strict=True)]
        mask = [[1] * len(row) + [0] * rest for row, rest in zip(rows, padding, strict=True)]
        return torch.tensor(ids), torch.tensor(mask)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than `length` with [CLS] and [SEP]."""
        return sum(len(self.tokenizer.encode(prompt).ids) > self.length for prompt in prompts)


class ImageRewardNetwork(nn.Module):
    """BLIP's encoders, of transformers, and ImageReward's head, which is shaped like the aesthetic predictor's."""

    def __init__(self, sizes: ImageRewardSizes) -> None:
        """Random weights for `sizes`."""
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        vision = BlipVisionConfig(
            image_size=sizes.image_size,
            patch_size=sizes.patch,
            hidden_size=sizes.vision.width,
            num_hidden_layers=sizes.vision.layers,
            num_attention_heads=sizes.vision.heads,
            intermediate_size=sizes.vision.hidden,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=sizes.embeddings,
            max_position_embeddings=sizes.positions,
            hidden_size=sizes.text.width,
            num_hidden_layers=sizes.text.layers,
            num_attention_heads=sizes.text.heads,
            intermediate_size=sizes.text.hidden,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            encoder_hidden_size=sizes.vision.width,
            is_decoder=True,  # gives the layers cross attention, no more: `forward` reads prompts in both directions
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = AestheticHead(sizes.text.width)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[CLS] of each prompt after it has seen its image: `[N, 3, S, S]`, `[N, L]`, `[N, L]` => `[N, width]`."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        return self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state[:, 0]

    def published_layout(self) -> nn.Module:
        """The same weights under the names that they have in the published file."""
        vision = self.vision
        blocks = [
            {
                "norm1": layer.layer_norm1,
                "attn": nn.ModuleDict({"qkv": layer.self_attn.qkv, "proj": layer.self_attn.projection}),
                "norm2": layer.layer_norm2,
                "mlp": layer.mlp,
            }
            for layer in vision.encoder.layers
        ]
        visual_encoder = nn.ModuleDict(
            {
                "patch_embed": nn.ModuleDict({"proj": vision.embeddings.patch_embedding}),
                "blocks": nn.ModuleList(nn.ModuleDict(block) for block in blocks),
                "norm": vision.post_layernorm,
            }
        )
        visual_encoder.register_parameter("cls_token", vision.embeddings.class_embedding)
        visual_encoder.register_parameter("pos_embed", vision.embeddings.position_embedding)
        blip = nn.ModuleDict({"visual_encoder": visual_encoder, "text_encoder": self.text})
        return nn.ModuleDict({"blip": blip, "mlp": self.head})


class RewardImageReward:
    """Raw ImageReward on the authors' scale: nothing is added to it or divided out."""

    name = METRIC

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        vocabulary: str | Path | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        amp: bool = False,
        sizes: ImageRewardSizes = PUBLISHED_SIZES,
    ) -> None:
        """Load the checkpoint `weights` (default: the cached one) into a network of the shape `sizes`.

        `vocabulary` is the vocab.txt of bert-base-uncased (default: the one beside the weights, else the cached one).
        `amp` is float16 autocast on a GPU, of the encoders only. Raises `UserError` for missing files or `amp` without
        a GPU, `CheckpointError` for a file that is damaged or another model's.
        """
        self.device = torch.device(device)
        self.dtype = dtype_name(amp, self.device)
        path = find_weights(ASSET, weights)
        vocabulary_path = find_vocabulary(vocabulary, path)
        self.amp, self.batch_size, self.sizes = amp, batch_size, sizes
        self.weights_sha256 = stamped_sha256(path)
        self.version = version_of(ASSET, path, self.weights_sha256, "v1.0")
        if self.version != "custom" and sha256_file(vocabulary_path) != VOCABULARY.sha256:
            raise CheckpointError(
                f"{vocabulary_path} is not the vocabulary that {path} was trained with: get {VOCABULARY.name} from "
                f"{ASSETS[VOCABULARY_ASSET].source()}"
            )
        self.tokenizer = BertTokenizer(vocabulary_path, sizes.embeddings - len(BLIP_TOKENS), sizes.context)
        state = read_weights(path, "ImageReward weights")
        # The random start values, which nobody needs, are drawn on the device: seconds faster than on the CPU.
        with torch.device(self.device):
            self.model = ImageRewardNetwork(sizes)
        self.model = self.model.to(torch.float32).eval().requires_grad_(False)
        load_strict(self.model.published_layout(), state, path, SPARE)
        self.preprocessing = f"shortest-side-pillow-bicubic-{sizes.image_size}-torchvision-offset"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; usual values on Stable Diffusion v1.5 are -2 to 2."""
        check_inputs(images, prompts)
        scores = [torch.zeros(0, device=images.device)]
        with exact_float32():
            for start in range(0, len(prompts), self.batch_size):
                rows = slice(start, start + self.batch_size)
                scores.append(self._score_batch(images[rows], prompts[rows]).to(images.device))
        return torch.cat(scores)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`: more than 33 word pieces between [CLS] and [SEP]."""
        return self.tokenizer.count_truncated(prompts)

    def _score_batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = shortest_side(images.to(self.device, torch.float32), self.sizes.image_size, torchvision_offset)
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer(prompts))
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp):
            features = self.model(normalized(pixels), ids, mask)
        return (self.model.head(features.float()) - OUTPUT_MEAN) / OUTPUT_STD
