"""The embedded model and its judges, made for batches of a thousand: every prompt is encoded once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.denoisers import EMBEDDED, TextCond
from training.denoisers.stable_diffusion import StableDiffusion
from training.ppo.reward_models.emoji import RewardEmoji

TEXTS_AT_ONCE = 256
SCORED_AT_ONCE = 512


class TextRows:
    """A text encoder whose rows are computed once for each prompt."""

    def __init__(self, embed: Callable[[list[str]], Tensor]):
        self.embed = embed
        self.row: dict[str, int] = {}
        self.rows: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of the prompts, `[len(prompts), ...]`."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.row]
        if new:
            parts = [self.embed(new[first : first + TEXTS_AT_ONCE]) for first in range(0, len(new), TEXTS_AT_ONCE)]
            self.row |= {prompt: len(self.row) + index for index, prompt in enumerate(new)}
            self.rows[:] = [torch.cat([*self.rows, *parts])]
        [rows] = self.rows
        return rows[torch.tensor([self.row[prompt] for prompt in prompts], device=rows.device)]


class BatchDenoiser(StableDiffusion):
    """The backbone with a memory for prompts."""

    def __init__(self, folder: Path, guidance_rate: float, device: torch.device, precision: str):
        super().__init__(folder, folder, "emoji", guidance_rate, device, precision)
        self.texts = TextRows(self._embed)

    def encode_prompts(self, prompts: Sequence[str]) -> TextCond:
        return TextCond(self.texts(prompts))

    def at(self, guidance_rate: float) -> BatchDenoiser:
        """The same weights and memory at another guidance."""
        other = copy.copy(self)
        other.guidance_rate = guidance_rate
        return other


class BatchReward(RewardEmoji):
    """A judge with a memory for prompts."""

    def __init__(self, name: str, device: torch.device):
        super().__init__(name, device=device, batch_size=SCORED_AT_ONCE)
        self.texts = TextRows(super()._embed_texts)

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        return self.texts(prompts)


def load_denoiser(device: str, precision: str, guidance_rate: float) -> BatchDenoiser:
    return BatchDenoiser(EMBEDDED, guidance_rate, torch.device(device), precision)
