"""The one factory of rewards."""

from __future__ import annotations

from pathlib import Path

import torch

from torch_utils.errors import UserError
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, Reward
from training.ppo.reward_hps import RewardHPS, find_hps_weights
from training.ppo.reward_models.emoji import REWARD_FOLDERS, RewardEmoji, find_emoji_weights

REWARD_TYPES = ("hps", *REWARD_FOLDERS)


def check_reward_weights(reward_type: str, weights: str | Path | None = None) -> Path:
    """Find the weights of a reward without loading them: the file, or the folder, that `create_reward` will read.

    `weights` None means the usual place; HPSv2.1 is fetched there first. Raises `UserError` for an unknown type, or
    saying which file is missing, where it comes from and where it belongs.
    """
    if reward_type == "hps":
        return find_hps_weights(weights)
    if reward_type in REWARD_FOLDERS:
        return find_emoji_weights(reward_type, weights)
    raise UserError(f"unknown reward {reward_type!r}: choose one of {', '.join(REWARD_TYPES)}")


def create_reward(
    reward_type: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = DEFAULT_BATCH_SIZE,
    amp: bool = False,
) -> Reward:
    """Load the reward `reward_type` (one of `REWARD_TYPES`) onto `device`; `batch_size` images go into one forward.

    `amp` is half precision, for HPSv2.1 on a GPU only. Raises `UserError` as `check_reward_weights` does, or for an
    `amp` that the reward does not have; `CheckpointError` for weights that do not fit.
    """
    path = check_reward_weights(reward_type, weights)
    if reward_type == "hps":
        return RewardHPS(path, device=device, batch_size=batch_size, amp=amp)
    if amp:
        raise UserError(f"{reward_type} is computed in float32 only: switch half precision (amp) off")
    return RewardEmoji(reward_type, path, device=device, batch_size=batch_size)
