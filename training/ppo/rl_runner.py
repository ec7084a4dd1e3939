"""Rollouts: which prompts, noises and tables a step uses, the images they give, and the rewards of those."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers import epd_sampler
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.seeds import derive_seed, generator
from training.denoisers.base import Denoiser
from training.generate import generate_batch, table_schedule
from training.ppo.config import PPOConfig
from training.ppo.policy import EPDParamPolicy, PolicySample
from training.ppo.reward_base import Reward
from training.table import SolverTable


class RolloutError(UserError):
    """A rollout that cannot be used: a reward that is not a number."""


@dataclass(frozen=True)
class Rollout:
    """The samples of one step, of all ranks and the same on every rank: CPU tensors, N = prompts * rloo_k."""

    sample: PolicySample  # N tables
    prompts: list[str]  # N
    group_ids: Tensor  # [N] int64: samples with equal ids share a prompt
    rewards: Tensor  # [N] float64, raw
    seconds_generation: float  # of this rank's share
    seconds_reward: float


class PromptOrder:
    """The prompts of every step: one seeded shuffle per pass over the list, none repeated before all were used."""

    def __init__(self, prompts: Sequence[str], seed: int):
        self.prompts = list(prompts)
        self.seed = seed

    def take(self, step: int, count: int) -> list[str]:
        """The `count` prompts of step `step` >= 1; they depend on the step, not on what was taken before."""
        first = (step - 1) * count
        shuffles: dict[int, list[int]] = {}
        taken = []
        for position in range(first, first + count):
            epoch, offset = divmod(position, len(self.prompts))
            if epoch not in shuffles:
                random = generator(derive_seed(self.seed, "prompts", epoch))
                shuffles[epoch] = torch.randperm(len(self.prompts), generator=random).tolist()
            taken.append(self.prompts[shuffles[epoch][offset]])
        return taken


class ImageScorer:
    """Makes images with an EPD table and scores them, `micro_batch` images at a time (None: all at once)."""

    def __init__(self, net: Denoiser, rewards: Sequence[Reward], start: SolverTable, micro_batch: int | None):
        """`start` gives the schedule; the tables used later share it."""
        self.net = net
        self.rewards = list(rewards)
        self.sigmas = table_schedule(start, net)
        self.afs = start.afs
        self.micro_batch = micro_batch
        self.seconds_generation = 0.0
        self.seconds_reward = 0.0

    @torch.no_grad()
    def images(self, table: SolverTable, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Quantised images `[B, 3, H, W]` in [0, 1] on the net's device; `table` has B samples, or no sample axis."""
        started = time.perf_counter()
        sampler = functools.partial(epd_sampler, table=table, afs=self.afs)
        images = generate_batch(self.net, list(prompts), list(seeds), sampler, self.sigmas)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        self.seconds_generation += time.perf_counter() - started
        return images

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores `[B, R]` float64 on the CPU, one column per reward."""
        started = time.perf_counter()
        scores = torch.stack([reward.score(images, list(prompts)).cpu().double() for reward in self.rewards], dim=1)
        self.seconds_reward += time.perf_counter() - started
        for row, column in (~torch.isfinite(scores)).nonzero().tolist():
            name, value = self.rewards[column].name, scores[row, column].item()
            raise RolloutError(f"{name} gave {value} for the prompt {prompts[row]!r}; the image or the weights are bad")
        return scores

    def batches(self, indices: range) -> list[range]:
        """`indices` cut into micro-batches."""
        size = self.micro_batch or max(len(indices), 1)
        return [indices[start : start + size] for start in range(0, len(indices), size)]


class EPDRolloutRunner:
    """Draws P prompts x k tables, makes their images, and scores them; the ranks share out the samples.

    Every draw has a seed derived from (run seed, purpose, step, prompt index, sample index). Each rank draws all
    tables, which costs nothing, and makes its part of the images; only rewards travel between ranks.
    """

    def __init__(
        self,
        net: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        start: SolverTable,
        ppo: PPOConfig,
        seed: int,
    ):
        """`start` is the table the policy starts from, `seed` the run's."""
        self.scorer = ImageScorer(net, [reward], start, ppo.rollout_micro_batch)
        self.order = PromptOrder(prompts, seed)
        self.group_size = ppo.rloo_k
        self.num_prompts = ppo.rollout_batch_size // ppo.rloo_k
        self.shared_noise = ppo.shared_noise
        self.seed = seed

    def rollout(self, policy: EPDParamPolicy, step: int) -> Rollout:
        """The samples of step `step` >= 1 under `policy`. Raises `RolloutError` for a reward that is not finite."""
        places = [(p, j) for p in range(self.num_prompts) for j in range(self.group_size)]
        prompts = [prompt for prompt in self.order.take(step, self.num_prompts) for _ in range(self.group_size)]
        sample = policy.sample_tables([derive_seed(self.seed, "table", step, p, j) for p, j in places])
        noise_places = [(p, 0) for p, _ in places] if self.shared_noise else places
        noise_seeds = [derive_seed(self.seed, "noise", step, p, j) for p, j in noise_places]

        self.scorer.seconds_generation = self.scorer.seconds_reward = 0.0
        rewards = []
        for batch in self.scorer.batches(distributed.shard(len(places))):
            rows = slice(batch.start, batch.stop)
            images = self.scorer.images(sample.select(rows).table, prompts[rows], noise_seeds[rows])
            rewards.append(self.scorer.scores(images, prompts[rows])[:, 0])
        return Rollout(
            sample=sample,
            prompts=prompts,
            group_ids=torch.tensor([p for p, _ in places]),
            rewards=distributed.all_gather(torch.cat(rewards)),
            seconds_generation=self.scorer.seconds_generation,
            seconds_reward=self.scorer.seconds_reward,
        )
