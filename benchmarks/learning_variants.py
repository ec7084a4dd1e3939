"""RDPO with one thing changed, where the change is no configuration: policies that draw otherwise, and learners that
weigh or stop otherwise. All but what is named is the production code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_utils.seeds import derive_seed
from training.ppo.config import Config, PPOConfig
from training.ppo.losses import ratio_statistics
from training.ppo.pathwise import Pathwise
from training.ppo.policy import MIN_SHARE, EPDParamPolicy, PolicySample, TableArrays, create_policy
from training.ppo.rdpo import RDPO
from training.ppo.rl_runner import Draw, EPDRolloutRunner, PromptOrder, Rollout
from training.table import SolverTable

KL_STOP = 0.1
DAMPING = 0.05  # added to the diagonal of the Fisher matrices
STRATA = 4
MIN_SPREAD = 1e-4  # of a group's rewards; a smaller one counts as this


def variant_policy(kind: type[GroupedPolicy], config: Config, start: SolverTable) -> GroupedPolicy:
    """A policy of `kind` that knows the size of the configuration's groups."""
    policy = create_policy(config, start, kind)
    policy.group_size = config.ppo.rloo_k
    return policy


class GroupedPolicy(EPDParamPolicy):
    """A policy that knows how many of the tables drawn at once belong to one prompt; they follow each other."""

    group_size = 1


# ----------------------------------------------------------------------------
# Tables that are not independent draws. Everything is derived from the first seed.


class CrossedPolicy(GroupedPolicy):
    """The same tables for every prompt."""

    @torch.no_grad()
    def sample_tables(self, seeds: list[int]) -> PolicySample:
        distinct = super().sample_tables(seeds[: self.group_size])
        return distinct.select(torch.arange(self.group_size).repeat(len(seeds) // self.group_size))


class UniformPolicy(GroupedPolicy):
    """Tables made of given uniform numbers by the inverse of the gamma distribution; frozen scales only."""

    def uniforms(self, count: int, dimensions: int, seed: int) -> np.ndarray:
        """`[count, dimensions]` numbers in (0, 1), each row uniform."""
        raise NotImplementedError

    @torch.no_grad()
    def sample_tables(self, seeds: list[int]) -> PolicySample:
        output = self.all_rows()
        count = len(seeds)
        sizes = [output.alpha_pos.numel(), output.alpha_weight.numel()]
        uniforms = np.clip(self.uniforms(count, sum(sizes), seeds[0]), 1e-9, 1 - 1e-9)
        sample = PolicySample(
            segments=_dirichlet(output.alpha_pos, uniforms[:, : sizes[0]]),
            weights=_dirichlet(output.alpha_weight, uniforms[:, sizes[0] :]),
            scale_dir=self.start.scale_dir.expand(count, -1, -1),
            scale_time=self.start.scale_time.expand(count, -1, -1),
            log_prob=torch.zeros(count),
            start=self.start,
        )
        return replace(sample, log_prob=self.log_prob(sample))


def _dirichlet(alpha: Tensor, uniforms: np.ndarray) -> Tensor:
    """Dirichlet rows `[B, R, n]` from uniform numbers `[B, R * n]`."""
    from scipy.special import gammaincinv

    gammas = torch.from_numpy(gammaincinv(alpha.numpy()[None], uniforms.reshape(len(uniforms), *alpha.shape)))
    gammas = gammas.clamp_min(1e-300)
    shares = gammas / gammas.sum(-1, keepdim=True)
    return (1 - MIN_SHARE * shares.shape[-1]) * shares + MIN_SHARE


class AntitheticPolicy(UniformPolicy):
    """Tables in pairs, made of u and 1 - u; a pair shares its prompt."""

    def uniforms(self, count: int, dimensions: int, seed: int) -> np.ndarray:
        half = np.random.default_rng(seed).random((count // 2, dimensions))
        return np.stack([half, 1 - half], axis=1).reshape(count, dimensions)


class SobolPolicy(UniformPolicy):
    """Tables made of a scrambled Sobol sequence, in random order."""

    def uniforms(self, count: int, dimensions: int, seed: int) -> np.ndarray:
        from scipy.stats import qmc

        random = np.random.default_rng(seed)
        points = qmc.Sobol(dimensions, seed=random).random(count)
        return points[random.permutation(count)]


@dataclass(frozen=True)
class RowSample(PolicySample):
    """Tables that differ from the mean in one row each."""

    rows: Tensor  # [B] int64: which

    def select(self, index: Tensor | slice) -> RowSample:
        return RowSample(**vars(super().select(index)), rows=self.rows[index])


class OneIntervalPolicy(GroupedPolicy):
    """The tables of a prompt differ in one interval only, and so only that interval has their probability."""

    @torch.no_grad()
    def sample_tables(self, seeds: list[int]) -> RowSample:
        count, intervals = len(seeds), len(self.start.positions)
        drawn, mean = super().sample_tables(seeds), self.mean_sample(count)
        # Neighbouring prompts take neighbouring intervals, from one that changes with the step.
        rows = (seeds[0] + torch.arange(count) // self.group_size) % intervals
        own = (torch.arange(intervals) == rows[:, None])[:, :, None]
        parts = ("segments", "weights", "scale_dir", "scale_time")
        pairs = zip(parts, _arrays(drawn), _arrays(mean), strict=True)
        mixed = {name: torch.where(own, part, other) for name, part, other in pairs}
        sample = RowSample(**mixed, log_prob=drawn.log_prob, start=self.start, rows=rows)
        return replace(sample, log_prob=self.log_prob(sample))

    def log_prob(self, sample: PolicySample) -> Tensor:
        if not isinstance(sample, RowSample):
            return super().log_prob(sample)
        return self.log_prob_rows(sample).gather(1, sample.rows[:, None])[:, 0]


def _arrays(sample: PolicySample) -> tuple[Tensor, ...]:
    return sample.segments, sample.weights, sample.scale_dir, sample.scale_time


# ----------------------------------------------------------------------------
# Other updates.


class GroupNormalised(RDPO):
    """Rewards divided by the standard deviation within their prompt before they are compared."""

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        rewards = rollout.rewards.clone()
        for group in rollout.draw.group_ids.unique():
            own = rollout.draw.group_ids == group
            rewards[own] = rewards[own] / rewards[own].std(correction=0).clamp_min(MIN_SPREAD)
        return super().update(step, replace(rollout, rewards=rewards))


class StopByKL(RDPO):
    """No further epoch once the policy has moved KL_STOP away from the one that drew the tables."""

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        self.sample = rollout.draw.sample
        return super().update(step, rollout)

    def _minibatches(self, step: int, epoch: int, count: int) -> list[Tensor]:
        with torch.no_grad():
            new = self.policy.log_prob(self.sample)
        moved = ratio_statistics(new, self.sample.log_prob, self.ppo.clip_range).approx_kl
        return super()._minibatches(step, epoch, count) if moved <= KL_STOP else []


class Fisher(RDPO):
    """The natural gradient: each row's gradient is multiplied by the inverse of its Fisher matrix."""

    def __init__(self, policy: EPDParamPolicy, ppo: PPOConfig, seed: int):
        super().__init__(policy, ppo, seed)
        policy.residuals.weight.register_hook(lambda gradient: natural_gradient(policy, gradient))


@torch.no_grad()
def natural_gradient(policy: EPDParamPolicy, gradient: Tensor) -> Tensor:
    """`gradient [N-1, outputs]` of the "direct" residuals, preconditioned.

    For log alpha of a Dirichlet the Fisher matrix is diag(alpha) (diag(psi'(alpha)) - psi'(sum alpha)) diag(alpha).
    """
    output = policy.all_rows()
    result, first = gradient.clone(), 0
    for alpha in (output.alpha_pos, output.alpha_weight):
        size = alpha.shape[-1]
        trigamma = torch.polygamma(1, alpha), torch.polygamma(1, alpha.sum(-1))
        fisher = torch.diag_embed(trigamma[0]) - trigamma[1][:, None, None]
        fisher = alpha[:, :, None] * fisher * alpha[:, None, :] + DAMPING * torch.eye(size, dtype=alpha.dtype)
        result[:, first : first + size] = torch.linalg.solve(fisher, gradient[:, first : first + size, None])[..., 0]
        first += size
    result[:, first:] *= policy.scale_std**2
    return result


class PlainMean(Pathwise):
    """The images' gradients averaged as they are."""

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        mean = TableArrays(*(part.mean(0, keepdim=True) for part in rollout.gradients))
        return super().update(step, replace(rollout, gradients=mean))


class Stratified(RDPO):
    """Prompts of all difficulties in every step.

    The first steps score the start table on `pilot_prompts` training prompts, one image each, and learn nothing; from
    then on a step takes as many prompts from each quarter of them, ordered by that score.
    """

    def __init__(self, policy: EPDParamPolicy, ppo: PPOConfig, seed: int, pilot_prompts: int):
        self.pilot_steps = min(pilot_prompts // ppo.rollout_batch_size, ppo.steps - 1)
        super().__init__(policy, replace(ppo, steps=ppo.steps - self.pilot_steps), seed)
        self.scores: dict[str, float] = {}
        self.strata: list[PromptOrder] = []

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw:
        if step <= self.pilot_steps:
            return runner.draw_mean(self.policy, step)
        draw = super().draw(runner, step - self.pilot_steps)
        share = runner.batch_size // runner.group_size // STRATA
        prompts = [prompt for order in self._strata() for prompt in order.take(step - self.pilot_steps, share)]
        return replace(draw, prompts=[prompt for prompt in prompts for _ in range(runner.group_size)])

    def _strata(self) -> list[PromptOrder]:
        if not self.strata:
            ranked = sorted(self.scores, key=self.scores.__getitem__)
            size = len(ranked) // STRATA
            quarters = [ranked[q * size : (q + 1) * size] for q in range(STRATA)]
            self.strata = [PromptOrder(part, derive_seed(self.seed, "stratum", q)) for q, part in enumerate(quarters)]
        return self.strata

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        if step <= self.pilot_steps:
            self.scores |= dict(zip(rollout.draw.prompts, rollout.rewards.tolist(), strict=True))
            return {"kl": 0.0}
        return super().update(step - self.pilot_steps, rollout)
