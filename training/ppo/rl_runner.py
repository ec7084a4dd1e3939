"""Rollouts: which prompts, noises and tables a step uses, the images they give, and the rewards of those."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from solvers import epd_sampler
from torch_utils import distributed
from torch_utils.determinism import NoFixedOrder, fixed_order
from torch_utils.errors import UserError
from torch_utils.seeds import derive_seed, generator
from training.denoisers.base import Denoiser, TextCond
from training.generate import generate_batch, initial_latents, table_schedule
from training.images import quantize
from training.ppo.config import PPOConfig
from training.ppo.policy import EPDParamPolicy, PolicySample, TableArrays
from training.ppo.reward_base import Reward
from training.ppo.reward_mix import RewardMix
from training.table import SolverTable

# Rewards are multiplied by it before the backward pass: parts of their gradients are too small for half precision. A
# power of two, so that float32 gradients keep every bit.
GRADIENT_SCALE = 1024.0


@dataclass(frozen=True)
class Draw:
    """What one step asks for, of all ranks and the same on every rank; N images."""

    sample: PolicySample  # N tables
    prompts: list[str]  # N
    noise_seeds: list[int]  # N
    group_ids: Tensor  # [N] int64: samples with equal ids share a prompt

    def select(self, index: Tensor) -> Draw:
        """The samples of `index [M]`, int64."""
        rows = index.tolist()
        prompts, seeds = ([part[row] for row in rows] for part in (self.prompts, self.noise_seeds))
        return Draw(self.sample.select(index), prompts, seeds, self.group_ids[index])


@dataclass(frozen=True)
class Rollout:
    """A draw and what came of it, the same on every rank: CPU tensors."""

    draw: Draw
    rewards: Tensor  # [N] float64, what training climbs
    # [N, N-1, K] float64: of each reward to its table's numbers; empty where not asked for
    gradients: TableArrays | tuple[()] = ()
    # [N, C] float64: the raw scores that the rewards were mixed from; learners do not read them
    raw: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    seconds_generation: float = 0.0  # of this rank's share
    seconds_reward: float = 0.0

    def finite_groups(self) -> tuple[Rollout, int]:
        """The rollout without the groups that hold a score that is not finite, and how many those are."""
        groups = self.draw.group_ids
        broken = groups[~self.raw.isfinite().all(1)].unique()
        if not len(broken):
            return self, 0
        kept = (~torch.isin(groups, broken)).nonzero().flatten()
        gradients = self.gradients and TableArrays(*(part[kept] for part in self.gradients))
        parts = self.draw.select(kept), self.rewards[kept], gradients, self.raw[kept]
        return Rollout(*parts, self.seconds_generation, self.seconds_reward), len(broken)


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


class _Recomputed:
    """`net` whose calls keep no activations: the backward pass computes them again (and counts the calls again)."""

    def __init__(self, net: Denoiser):
        self.net, self.is_flow = net, net.is_flow

    def slope(self, x: Tensor, sigma: Tensor, cond: TextCond) -> Tensor:
        return checkpoint(self.net.slope, x, sigma, cond, use_reentrant=False)


class ImageScorer:
    """Makes images with an EPD table and scores them, `micro_batch` images at a time (None: all at once)."""

    def __init__(
        self,
        net: Denoiser,
        mix: RewardMix,
        start: SolverTable,
        micro_batch: int | None,
        metrics: Sequence[Reward] = (),
    ):
        """`start` gives the schedule; the tables used later share it. `metrics` are judges beside those of `mix`."""
        self.net = net
        self.mix = mix
        self.rewards = [*mix.rewards, *metrics]
        self.sigmas = table_schedule(start, net)
        self.afs = start.afs
        self.micro_batch = micro_batch
        self.in_fixed_order = True  # gradients, until an operation turns out to have no such kernel
        self.seconds_generation = 0.0
        self.seconds_reward = 0.0

    @torch.no_grad()
    def images(self, table: SolverTable | TableArrays, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Quantised images `[B, 3, H, W]` in [0, 1] on the net's device; `table` has B samples, or no sample axis."""
        started = time.perf_counter()
        sampler = functools.partial(epd_sampler, table=table, afs=self.afs)
        images = generate_batch(self.net, list(prompts), list(seeds), sampler, self.sigmas)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        self.seconds_generation += time.perf_counter() - started
        return images

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores `[B, R]` float64 on the CPU: the rewards of the mix, then the metrics. May hold NaN."""
        started = time.perf_counter()
        scores = torch.stack([reward.score(images, list(prompts)).cpu().double() for reward in self.rewards], dim=1)
        self.seconds_reward += time.perf_counter() - started
        return scores

    def gradients(
        self, arrays: TableArrays, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[Tensor, TableArrays]:
        """Raw scores `[B, C]` of the mix's rewards, and the gradients of what the mix makes of them.

        The gradients are `[B, N-1, K]`, to the numbers of the B tables `arrays`; both float64 on the CPU. The scores
        are those of `images` and `scores`; the gradient takes the rounding to 8 bits as the identity. Memory is that of
        one network call beside the states: activations are computed twice. Raises `UserError` for a reward that cannot
        be differentiated. The same call gives the same bits, on a GPU too, unless a note on stderr says otherwise.
        """
        if self.in_fixed_order:
            try:
                with fixed_order():
                    return self._gradients(arrays, prompts, seeds)
            except NoFixedOrder as error:
                self.in_fixed_order = False
                distributed.print0(
                    f"note: {error}: gradients are not the same to the last bit each time, and a run that goes on may "
                    "end a little differently from one that was not interrupted"
                )
        return self._gradients(arrays, prompts, seeds)

    def _gradients(
        self, arrays: TableArrays, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[Tensor, TableArrays]:
        started = time.perf_counter()
        leaves = [part.detach().clone().requires_grad_() for part in arrays]
        sampler = functools.partial(epd_sampler, table=TableArrays(*leaves), afs=self.afs)
        x, cond = initial_latents(self.net, list(prompts), list(seeds), self.sigmas)
        latents = sampler(_Recomputed(self.net), x, self.sigmas, cond)
        scores = checkpoint(self._judge, latents, list(prompts), use_reentrant=False)
        gradients = torch.autograd.grad(GRADIENT_SCALE * self.mix.combine(scores).sum(), leaves)
        scores = scores.detach().cpu().double()
        self.seconds_generation += time.perf_counter() - started
        return scores, TableArrays(*(gradient / GRADIENT_SCALE for gradient in gradients))

    def _judge(self, latents: Tensor, prompts: list[str]) -> Tensor:
        images = self.net.decode(latents)
        smooth = ((images + 1) / 2).clamp(0, 1)
        rounded = smooth + (quantize(images.detach()) - smooth).detach()
        scores = [reward.score(rounded, prompts) for reward in self.mix.rewards]
        for reward, score in zip(self.mix.rewards, scores, strict=True):
            if not score.requires_grad:
                raise UserError(
                    f"trainer.algorithm=pathwise needs rewards that can be differentiated, and {reward.name} cannot; "
                    "use rdpo"
                )
        return torch.stack(scores, dim=1)

    def batches(self, indices: range) -> list[range]:
        """`indices` cut into micro-batches."""
        size = self.micro_batch or max(len(indices), 1)
        return [indices[start : start + size] for start in range(0, len(indices), size)]


def first_broken(scores: Tensor, rewards: Sequence[Reward], prompts: Sequence[str]) -> str:
    """A sentence about the first of `scores [B, R]` that is not finite, of which there must be one."""
    row, column = (~scores.isfinite()).nonzero()[0].tolist()
    return f"{rewards[column].name} gave {scores[row, column].item()} for the prompt {prompts[row]!r}"


class EPDRolloutRunner:
    """Draws tables, prompts and noises, makes the images and scores them; the ranks share out the samples.

    Every draw has a seed derived from (run seed, purpose, step, prompt index, sample index). Each rank draws all
    tables, which costs nothing, and makes its part of the images; only rewards and gradients travel between ranks.
    """

    def __init__(
        self,
        net: Denoiser,
        mix: RewardMix,
        prompts: Sequence[str],
        start: SolverTable,
        ppo: PPOConfig,
        seed: int,
    ):
        """`start` is the table the policy starts from, `seed` the run's."""
        self.mix = mix
        self.scorer = ImageScorer(net, mix, start, ppo.rollout_micro_batch)
        self.order = PromptOrder(prompts, seed)
        self.batch_size = ppo.rollout_batch_size
        self.group_size = ppo.rloo_k
        self.shared_noise = ppo.shared_noise
        self.seed = seed

    def draw(self, policy: EPDParamPolicy, step: int) -> Draw:
        """P prompts x k sampled tables for step `step` >= 1."""
        num_prompts = self.batch_size // self.group_size
        places = [(p, j) for p in range(num_prompts) for j in range(self.group_size)]
        prompts = self.order.take(step, num_prompts)
        sample = policy.sample_tables([derive_seed(self.seed, "table", step, p, j) for p, j in places])
        noise_places = [(p, 0) for p, _ in places] if self.shared_noise else places
        return Draw(
            sample=sample,
            prompts=[prompts[p] for p, _ in places],
            noise_seeds=[derive_seed(self.seed, "noise", step, p, j) for p, j in noise_places],
            group_ids=torch.tensor([p for p, _ in places]),
        )

    def draw_mean(self, policy: EPDParamPolicy, step: int) -> Draw:
        """As many prompts as images, each with the mean table, for step `step` >= 1."""
        return Draw(
            sample=policy.mean_sample(self.batch_size),
            prompts=self.order.take(step, self.batch_size),
            noise_seeds=[derive_seed(self.seed, "noise", step, p, 0) for p in range(self.batch_size)],
            group_ids=torch.arange(self.batch_size),
        )

    def rollout(self, draw: Draw, with_gradients: bool = False) -> Rollout:
        """The images and rewards of a draw; rewards may be NaN. The mix takes the scores into its statistics."""
        scorer = self.scorer
        scorer.seconds_generation = scorer.seconds_reward = 0.0
        scores, gradients = [], []
        for batch in scorer.batches(distributed.shard(len(draw.prompts))):
            rows = slice(batch.start, batch.stop)
            tables, prompts, seeds = draw.sample.select(rows).arrays, draw.prompts[rows], draw.noise_seeds[rows]
            if with_gradients:
                found, slopes = scorer.gradients(tables, prompts, seeds)
                scores.append(found)
                gradients.append(torch.stack(slopes, dim=1))
            else:
                scores.append(scorer.scores(scorer.images(tables, prompts, seeds), prompts))
        raw = distributed.all_gather(torch.cat(scores))
        self.mix.observe(raw)
        return Rollout(
            draw=draw,
            rewards=self.mix.combine(raw),
            gradients=TableArrays(*distributed.all_gather(torch.cat(gradients)).unbind(1)) if with_gradients else (),
            raw=raw,
            seconds_generation=scorer.seconds_generation,
            seconds_reward=scorer.seconds_reward,
        )
