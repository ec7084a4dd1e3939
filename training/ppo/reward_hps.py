"""HPSv2.1, the human preference score that PPO maximises on Stable Diffusion (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from HPSv2.model import ARCHITECTURE, build_model, read_state_dict
from HPSv2.preprocess import preprocess
from torch_utils.checkpoint import CheckpointError
from torch_utils.download_util import ASSETS, check_file_by_key, stamped_sha256
from torch_utils.errors import UserError
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, check_inputs, cosine_scores, load_strict

METRIC = "hps_v2.1"
ASSET = ASSETS[METRIC]
PUBLISHED = ASSET.files[0]
# v2.0 has the same layout and is found under v2.1's name in places; its scores are on another scale.
V20_SHA256_START = "07cb0d20"


def find_hps_weights(path: str | Path | None = None) -> Path:
    """The HPSv2.1 checkpoint: `path`, or the cached file, fetched on first use (`HPS_ROOT` moves the cache).

    A path that ends in the published file's name and is not there also means the cached file.

    Raises `UserError` naming the file, its source and the folder it belongs in.
    """
    if path is None:
        return check_file_by_key(METRIC)
    path = Path(path)
    if not path.is_file() and path.name == PUBLISHED.name:
        return check_file_by_key(METRIC)
    if not path.is_file():
        raise UserError(
            f"{path} is missing: download {PUBLISHED.name} from {ASSET.source()} into {path.parent}, or leave the "
            f"path of the weights out to have it fetched"
        )
    return path


class RewardHPS:
    """Raw HPSv2.1: cosine of the fine-tuned CLIP ViT-H/14's image and text embeddings, no logit scale."""

    name = METRIC

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = DEFAULT_BATCH_SIZE,
        amp: bool = False,
        architecture: str = ARCHITECTURE,
    ) -> None:
        """Load the checkpoint `weights` (default: the cached one) into the open_clip model `architecture`.

        `amp` computes under float16 autocast on a GPU as the authors do, which rounds scores in [0.25, 0.5) to
        multiples of 2^-12; the default is float32 throughout. Raises `UserError` for missing weights or `amp` without
        a GPU, `CheckpointError` for a file that is damaged, not HPSv2's, or known to be another version.
        """
        self.device = torch.device(device)
        if amp and self.device.type != "cuda":
            raise UserError(f"half precision (amp) needs a GPU, not {self.device}: leave it off")
        path = find_hps_weights(weights)
        import open_clip  # seconds, which a missing file need not wait for

        self.amp = amp
        self.dtype = "float16-autocast" if amp else "float32"
        self.batch_size = batch_size
        self.weights_sha256 = stamped_sha256(path)
        self.version = _version(path, self.weights_sha256)
        state = read_state_dict(path)
        self.model = build_model(architecture, self.device)
        load_strict(self.model, state, path)
        self.image_size = self.model.visual.image_size[0]
        self.preprocessing = f"longest-side-bicubic-antialias-pad-{self.image_size}"
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; usual values on Stable Diffusion v1.5 are 0.20 to 0.30."""
        check_inputs(images, prompts)
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp):
            return cosine_scores(images, prompts, self.batch_size, self._embed_images, self._embed_texts)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """See `Reward.count_truncated`: more than 75 tokens between start and end."""
        return sum(len(self.tokenizer.encode(prompt)) + 2 > self.tokenizer.context_length for prompt in prompts)

    def _embed_images(self, images: Tensor) -> Tensor:
        pixels = preprocess(images.to(self.device, torch.float32), self.image_size)
        return self.model.encode_image(pixels, normalize=True)

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)


def _version(path: Path, sha256: str) -> str:
    if sha256 == PUBLISHED.sha256:
        return "v2.1"
    if sha256.startswith(V20_SHA256_START):
        raise CheckpointError(f"{path} is HPSv2.0, whose scores are on another scale: get {PUBLISHED.name}")
    if path.name == PUBLISHED.name:
        raise CheckpointError(
            f"{path} is damaged: SHA-256 {sha256[:8]}... is not the published one; download it again from "
            f"{ASSET.source()}, or rename it if these are weights of your own"
        )
    return "custom"
