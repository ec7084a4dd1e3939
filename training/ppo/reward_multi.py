"""The one factory of rewards, and of mixes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from torch_utils.errors import UserError
from training.ppo.config import CUSTOM_REWARD, RewardConfig, trained_rewards
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, Reward
from training.ppo.reward_hps import RewardHPS
from training.ppo.reward_mix import Component, RewardMix
from training.ppo.reward_models.aesthetic import RewardAesthetic
from training.ppo.reward_models.clip import RewardCLIP
from training.ppo.reward_models.custom import RewardCustom, find_function
from training.ppo.reward_models.emoji import REWARD_FOLDERS, RewardEmoji, find_emoji_weights
from training.ppo.reward_models.imagereward import VOCABULARY_ASSET, RewardImageReward, find_vocabulary
from training.ppo.reward_models.mps import RewardMPS
from training.ppo.reward_models.pick import RewardPick
from training.ppo.reward_weights import find_weights


class PublishedReward(Protocol):
    """The class of a published metric, as `create_reward` calls it."""

    def __call__(self, weights: Path, *, device: torch.device | str, batch_size: int, amp: bool) -> Reward:
        """Raises as `create_reward` does."""


@dataclass(frozen=True)
class Published:
    """A published metric: who computes it, and the key of its weights; of the other file that some need, too."""

    reward: PublishedReward
    key: str
    other_key: str | None = None
    find_other: Callable[[Path], Path] | None = None  # given where the weights are


PUBLISHED: dict[str, Published] = {
    "hps": Published(RewardHPS, "hps_v2.1"),
    "clip": Published(RewardCLIP, "clip_l14"),
    "aesthetic": Published(RewardAesthetic, "aesthetic", "clip_l14", lambda _: find_weights("clip_l14")),
    "pick": Published(RewardPick, "pickscore_v1"),
    "imagereward": Published(
        RewardImageReward, "imagereward", VOCABULARY_ASSET, lambda path: find_vocabulary(None, path)
    ),
    "mps": Published(RewardMPS, "mps"),
}
REWARD_TYPES = (*PUBLISHED, *REWARD_FOLDERS)


def check_reward_weights(reward_type: str, weights: str | Path | None = None) -> Path:
    """Find the weights of a reward without loading them: the file, or the folder, that `create_reward` will read.

    `weights` None means the usual place; published files are fetched there first. For a reward of the user's own it is
    the file of its code. Raises `UserError` for an unknown type, or saying which file is missing, where it comes from
    and where it belongs.
    """
    if reward_type in PUBLISHED:
        published = PUBLISHED[reward_type]
        path = find_weights(published.key, weights)
        if published.find_other is not None:
            published.find_other(path)
        return path
    if reward_type in REWARD_FOLDERS:
        return find_emoji_weights(reward_type, weights)
    if CUSTOM_REWARD.fullmatch(reward_type):
        return find_function(reward_type)[1]
    raise UserError(
        f"unknown reward {reward_type!r}: choose one of {', '.join(REWARD_TYPES)}, or package.module:function"
    )


def create_reward(
    reward_type: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = DEFAULT_BATCH_SIZE,
    amp: bool = False,
) -> Reward:
    """Load the reward `reward_type` (one of `REWARD_TYPES`, or package.module:function) onto `device`.

    `batch_size` images go into one forward.
    `amp` is half precision, for published metrics on a GPU only. Raises `UserError` as `check_reward_weights` does, or
    for an `amp` that the reward does not have; `CheckpointError` for weights that do not fit.
    """
    path = check_reward_weights(reward_type, weights)
    if reward_type in PUBLISHED:
        return PUBLISHED[reward_type].reward(path, device=device, batch_size=batch_size, amp=amp)
    if amp:
        raise UserError(f"{reward_type} is computed in float32 only: switch half precision (amp) off")
    if reward_type in REWARD_FOLDERS:
        return RewardEmoji(reward_type, path, device=device, batch_size=batch_size)
    return RewardCustom(reward_type, batch_size=batch_size)


def create_mix(config: RewardConfig, device: torch.device) -> RewardMix:
    """Load what `config` trains on. Raises as `create_reward` does."""
    components = []
    for part in trained_rewards(config):
        amp = config.enable_amp and device.type == "cuda" and part.type in PUBLISHED
        weights, batch_size = part.weights_path, config.batch_size
        reward = create_reward(part.type, weights=weights, device=device, batch_size=batch_size, amp=amp)
        components.append(Component(reward, part.type, part.weight, part.transform))
    return RewardMix(components)
