"""PPO arithmetic: pure functions on small CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this spread the rewards of a batch count as equal: rounding noise must not be blown up to unit variance.
MIN_STD = 1e-8


def advantages(rewards: Tensor, group_ids: Tensor, normalize: bool = True) -> Tensor:
    """Leave-one-out advantages (RLOO): each reward minus the mean of the *other* rewards of its group.

    `rewards` float `[N]`, `group_ids` integer `[N]` in any order; returns `[N]` in the dtype of `rewards`. With
    `normalize` the result is shifted and scaled over the whole batch: (a - mean) / population standard deviation.
    Raises `ValueError` when a group has a single sample, which leaves nothing to compare with.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"rewards {list(rewards.shape)} and group_ids {list(group_ids.shape)} must both be [N]")
    _, group, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if counts.amin() < 2:
        raise ValueError("every group needs at least two samples")
    totals = torch.zeros(len(counts), dtype=rewards.dtype).index_add(0, group, rewards)
    others = (totals[group] - rewards) / (counts[group] - 1)
    result = rewards - others
    if normalize:
        result = (result - result.mean()) / result.std(correction=0).clamp_min(MIN_STD)
    return result


def group_std(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Mean over the groups of the population standard deviation within each: a scalar, what advantages live on."""
    return torch.stack([rewards[group_ids == group].std(correction=0) for group in group_ids.unique()]).mean()


def legacy_mixed_groups(count: int, group_size: int) -> Tensor:
    """Group ids `[count]` as the published runs formed them: sample n belongs to group n mod (count / group_size).

    Samples arrive prompt by prompt, so these groups mix prompts: with 8 samples, 4 to a prompt, both groups hold two
    samples of prompt A and two of prompt B. Kept to reproduce those runs (`ppo.baseline: legacy_mixed`).
    """
    return torch.arange(count) % (count // group_size)


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), negated: a scalar to minimise.

    All three tensors are `[N]`; `old_log_prob` and `advantages` are constants of the rollout.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@dataclass(frozen=True)
class RatioStatistics:
    """How far the policy has moved from the one that drew the samples."""

    ratio_mean: float
    ratio_max: float
    approx_kl: float  # mean of (ratio - 1) - log ratio: unbiased for KL(old || new), never negative
    clip_fraction: float  # share of samples whose ratio lies outside [1 - clip_range, 1 + clip_range]


def ratio_statistics(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> RatioStatistics:
    """Statistics of the probability ratios of `[N]` samples."""
    log_ratio = (log_prob - old_log_prob).detach()
    ratio = log_ratio.exp()
    return RatioStatistics(
        ratio_mean=ratio.mean().item(),
        ratio_max=ratio.amax().item(),
        approx_kl=(ratio - 1 - log_ratio).mean().item(),
        clip_fraction=((ratio - 1).abs() > clip_range).to(ratio.dtype).mean().item(),
    )
