"""RDPO: PPO on the Dirichlet policy over solver tables (arXiv 2512.22796)."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from torch_utils.seeds import derive_seed, generator
from training.ppo.config import PPOConfig
from training.ppo.learner import learning_rate, set_learning_rate
from training.ppo.losses import advantages, clipped_surrogate, legacy_mixed_groups, ratio_statistics
from training.ppo.policy import EPDParamPolicy
from training.ppo.rl_runner import Draw, EPDRolloutRunner, Rollout


class RDPO:
    """Samples tables around the mean, and makes those likelier that did better than others on the same prompt."""

    needs_gradients = False

    def __init__(self, policy: EPDParamPolicy, ppo: PPOConfig, seed: int):
        """`seed` is the run's; it decides the order of the minibatches."""
        self.policy = policy
        self.ppo = ppo
        self.seed = seed
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=ppo.learning_rate)

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw:
        """The tables, prompts and noises of step `step` >= 1."""
        self.policy.set_concentration(self.concentration(step))
        return runner.draw(self.policy, step)

    def concentration(self, step: int) -> float:
        """Of step `step`: from `dirichlet_concentration` at the first to `concentration_end` at the last one,
        geometrically. Exploring less and less finds the neighbourhood first and the place in it later."""
        first, last = self.ppo.dirichlet_concentration, self.ppo.concentration_end
        if last is None:
            return first
        return first * (last / first) ** ((step - 1) / max(self.ppo.steps - 1, 1))

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        """Optimise the policy on a rollout; returns statistics, ratios and KL as they are after the last update."""
        ppo, sample = self.ppo, rollout.draw.sample
        groups = rollout.draw.group_ids
        if ppo.baseline == "legacy_mixed":
            groups = legacy_mixed_groups(len(groups), ppo.rloo_k)
        gains = advantages(rollout.rewards, groups, ppo.normalize_advantages)
        rate = learning_rate(ppo.learning_rate, ppo.learning_rate_schedule, step, ppo.steps)
        set_learning_rate(self.optimizer, rate)
        taken, skipped = [], 0
        for epoch in range(ppo.ppo_epochs):
            for index in self._minibatches(step, epoch, len(gains)):
                loss, norm = self._optimize(rollout, gains, index)
                if math.isfinite(norm):
                    taken.append((loss, norm))
                else:
                    skipped += 1
        with torch.no_grad():
            ratios = ratio_statistics(self.policy.log_prob(sample), sample.log_prob, ppo.clip_range)
            found = {
                "kl": self.policy.kl().item(),
                "approx_kl": ratios.approx_kl,
                "clip_fraction": ratios.clip_fraction,
                "ratio_mean": ratios.ratio_mean,
                "ratio_max": ratios.ratio_max,
                "entropy": self.policy.entropy().item(),
                "concentration": self.policy.concentration,
                "learning_rate": rate,
                "skipped_updates": skipped,
            }
        if taken:
            found["loss"], found["grad_norm"] = (fmean(values) for values in zip(*taken, strict=True))
        # Ratios may be infinite where updates were skipped; such a number is not written down.
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _minibatches(self, step: int, epoch: int, count: int) -> list[Tensor]:
        size = self.ppo.minibatch_size or count
        random = generator(derive_seed(self.seed, "minibatch", step, epoch))
        return list(torch.randperm(count, generator=random).split(size))

    def _optimize(self, rollout: Rollout, gains: Tensor, index: Tensor) -> tuple[float, float]:
        """One optimizer step on the samples `index`; returns the loss and the gradient's norm before clipping.

        Where the norm is not finite the step is not taken: neither weights nor the optimizer's state change.
        """
        ppo = self.ppo
        sample = rollout.draw.sample.select(index)
        loss = clipped_surrogate(self.policy.log_prob(sample), sample.log_prob, gains[index], ppo.clip_range)
        loss = loss + ppo.kl_coef * self.policy.kl() - ppo.entropy_coef * self.policy.entropy()
        self.optimizer.zero_grad()
        loss.backward()
        limit = float("inf") if ppo.max_grad_norm is None else ppo.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        if norm.isfinite():
            self.optimizer.step()
        return loss.item(), norm.item()
