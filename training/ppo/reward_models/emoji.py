"""The embedded model's rewards: small CLIP models in transformers' folder format, trained by `training/embedded`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.checkpoint import CheckpointError, sha256_file
from torch_utils.errors import UserError
from torch_utils.resources import SOURCES
from torch_utils.untrusted import check_tokenizer_config, read_model_config
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, check_inputs, cosine_scores, load_strict, read_weights
from training.ppo.reward_models.pixels import antialiased

EMBEDDED_FOLDER = SOURCES / "embedded"
REWARD_FOLDERS = {"emoji_reward": EMBEDDED_FOLDER / "reward", "emoji_heldout": EMBEDDED_FOLDER / "heldout"}
NEEDED_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json")


def find_emoji_weights(reward_type: str, folder: str | Path | None = None) -> Path:
    """The folder of `emoji_reward` or `emoji_heldout` (default: the one in `src/embedded`), checked to be complete.

    Raises `UserError` naming the first missing file and where it comes from.
    """
    folder = Path(folder) if folder is not None else REWARD_FOLDERS[reward_type]
    for name in NEEDED_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing: {reward_type} needs {', '.join(NEEDED_FILES)}; they come with the "
                f"repository in {REWARD_FOLDERS[reward_type]} (git checkout -- src/embedded brings them back)"
            )
    return folder


class RewardEmoji:
    """Cosine of the L2-normalised image and text embeddings of a CLIP model (raw: no logit scale), in float32."""

    version = "1"
    dtype = "float32"

    def __init__(
        self,
        name: str,
        folder: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """Load the model `name` ("emoji_reward" or "emoji_heldout") from `folder`, without network access.

        Raises `UserError` for missing files, `CheckpointError` for weights that do not fit `config.json`.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        folder = find_emoji_weights(name, folder)
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.weights_sha256 = sha256_file(folder / "model.safetensors")
        weights = folder / "model.safetensors"
        state = read_weights(weights, "CLIP weights")
        try:
            read_model_config(folder / "config.json")
            config = CLIPConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                wanted = sum(parameter.numel() for parameter in CLIPModel(config).parameters())
            if wanted > 2 * sum(value.numel() for value in state.values()):  # fewer are told one by one, below
                raise ValueError("config.json describes far more numbers than model.safetensors has")
            self.model = CLIPModel(config).float().eval().requires_grad_(False)
            check_tokenizer_config(folder / "tokenizer_config.json")
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            pixels = read_model_config(folder / "preprocessor_config.json")
            self.mean = torch.tensor(pixels["image_mean"], device=self.device).view(3, 1, 1)
            self.std = torch.tensor(pixels["image_std"], device=self.device).view(3, 1, 1)
        except Exception as error:  # what the libraries raise for a configuration that is none is written down nowhere
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CheckpointError(f"{folder} cannot be loaded as a CLIP model: {reason}") from error
        load_strict(self.model, state, weights)
        self.model.to(self.device)
        self.context_length = config.text_config.max_position_embeddings
        self.image_size = config.vision_config.image_size
        self.preprocessing = f"bicubic-antialias-clamp-{self.image_size}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; images of another size, square or not, are resized to the model's square."""
        check_inputs(images, prompts)
        return cosine_scores(images, prompts, self.batch_size, self._embed_images, self._embed_texts)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`."""
        # verbose=False: the tokenizer's own warning about long prompts would repeat what is counted here.
        return sum(len(ids) > self.context_length for ids in self.tokenizer(list(prompts), verbose=False).input_ids)

    def _embed_images(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            # Overshoot only: for pixels of exactly 0 or 1 a clamp stops the gradient.
            images = antialiased(images, *size).clamp(0, 1)
        output = self.model.get_image_features(pixel_values=(images - self.mean) / self.std)
        return F.normalize(output.pooler_output, dim=-1)

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        ).to(self.device)
        output = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(output.pooler_output, dim=-1)
