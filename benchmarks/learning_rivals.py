"""Other ways to search for a table with rewards alone, with the interface of a learner (`training.ppo.learner`)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from torch_utils.seeds import derive_seed
from training.ppo.config import PPOConfig
from training.ppo.policy import LOG_SCALE_BOUND, SCALE_RATE, EPDParamPolicy, PolicySample
from training.ppo.rl_runner import Draw, EPDRolloutRunner, Rollout
from training.table import SolverTable

SIGMA = 0.6  # of the first generation of CMA-ES, in logits
NEAR_SIGMA = 0.15  # the same, where the start table is known to be a good one
SMALLEST = 1e-5  # segment or weight of a table that is given by logits
# How much the concentration of random search grows from one round to the next.
NARROWING = 1.25


class VectorTables:
    """Tables as vectors of free numbers around `start`, which is the zero vector.

    Segments and weights by centred logits, the last of each row left out; trained scales by SCALE_RATE times their
    logarithm.
    """

    def __init__(self, start: SolverTable, ppo: PPOConfig):
        rows, points = start.positions.shape
        self.start = start
        self.ppo = ppo
        self.segments = EPDParamPolicy(start).start_segments
        self.widths = [points, points - 1, points * ppo.train_scale_dir, points * ppo.train_scale_time]
        self.sizes = [rows * width for width in self.widths]

    def sample(self, vectors: Tensor) -> PolicySample:
        """The tables of `vectors [B, sum(sizes)]`, float64."""
        parts = [
            part.view(len(vectors), -1, width) if width else None
            for part, width in zip(vectors.split(self.sizes, dim=1), self.widths, strict=True)
        ]
        segments, weights, scale_dir, scale_time = parts
        shape = (len(vectors), *self.start.weights.shape)
        return PolicySample(
            segments=_shares(self.segments, segments),
            weights=_shares(self.start.weights, weights if weights is not None else vectors.new_zeros(*shape[:2], 0)),
            scale_dir=_scales(self.start.scale_dir.expand(shape), scale_dir),
            scale_time=_scales(self.start.scale_time.expand(shape), scale_time),
            log_prob=torch.zeros(len(vectors), dtype=torch.float64),
            start=self.start,
        )

    def table(self, vector: Tensor) -> SolverTable:
        """The table of one vector."""
        return table_of(self.sample(vector[None]), 0)


def _shares(start: Tensor, free: Tensor) -> Tensor:
    """`start [R, n]` moved by logits `free [B, R, n - 1]`: `[B, R, n]`, rows sum to 1."""
    last = free.new_zeros(*free.shape[:-1], 1)
    logits = torch.cat([free, last], dim=-1)
    shares = (start.log() + logits - logits.mean(-1, keepdim=True)).softmax(-1)
    return (1 - SMALLEST * shares.shape[-1]) * shares + SMALLEST


def _scales(start: Tensor, free: Tensor | None) -> Tensor:
    if free is None:
        return start.clone()
    return start * (SCALE_RATE * free).clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND).exp()


def table_of(sample: PolicySample, index: int) -> SolverTable:
    """The sampled table at `index`."""
    arrays = {name: part[index] for name, part in sample.arrays._asdict().items()}
    return replace(sample.start, **arrays)


def crossed_draw(runner: EPDRolloutRunner, step: int, sample: PolicySample, num_prompts: int) -> Draw:
    """Every table on every prompt, with the prompt's one noise; sample p * tables + j is table j on prompt p."""
    tables = len(sample.log_prob)
    prompts = runner.order.take(step, num_prompts)
    places = [p for p in range(num_prompts) for _ in range(tables)]
    return Draw(
        sample=sample.select(torch.arange(tables).repeat(num_prompts)),
        prompts=[prompts[p] for p in places],
        noise_seeds=[derive_seed(runner.seed, "noise", step, p, 0) for p in places],
        group_ids=torch.tensor(places),
    )


class CMAES:
    """CMA-ES (arXiv 1604.00772) on the vectors: a generation is `ppo.rloo_k` tables on as many prompts as the batch has
    room for. The mean of the search distribution is the table that is evaluated."""

    needs_gradients = False

    def __init__(self, start: SolverTable, ppo: PPOConfig, seed: int, sigma: float = SIGMA):
        from cmaes import CMA

        self.tables = VectorTables(start, ppo)
        self.population = ppo.rloo_k
        self.num_prompts = ppo.rollout_batch_size // ppo.rloo_k
        self.search = CMA(
            mean=np.zeros(sum(self.tables.sizes)),
            sigma=sigma,
            seed=derive_seed(seed, "cmaes") % 2**32,
            population_size=self.population,
        )
        self.asked: list[np.ndarray] = []

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw:
        self.asked = [self.search.ask() for _ in range(self.population)]
        sample = self.tables.sample(torch.from_numpy(np.stack(self.asked)))
        return crossed_draw(runner, step, sample, self.num_prompts)

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        fitness = rollout.rewards.view(self.num_prompts, self.population).mean(0)
        self.search.tell([(vector, -value) for vector, value in zip(self.asked, fitness.tolist(), strict=True)])
        return {"reward_best": fitness.amax().item()}

    def mean_table(self) -> SolverTable:
        return self.tables.table(torch.from_numpy(np.array(self.search.mean)))


class SuccessiveHalving:
    """Random search: each round draws `ppo.rloo_k` tables around the best so far, which is one of them, and halves them
    by their mean reward until one is left, each step with twice the images for a table. Later rounds draw closer.

    The tables of a step share prompts and noise; a table is judged by all its images of the round.
    """

    needs_gradients = False

    def __init__(self, start: SolverTable, ppo: PPOConfig, seed: int):
        self.ppo = ppo
        self.seed = seed
        self.best = start
        self.round = 0
        self.alive: PolicySample | None = None  # the tables of the round that are left; None: the round is over
        self.sums = torch.zeros(0, dtype=torch.float64)  # [alive] rewards so far in the round
        self.images = 0  # of each of them

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw:
        if self.alive is None:
            self._begin_round()
        return crossed_draw(runner, step, self.alive, max(self.ppo.rollout_batch_size // len(self.sums), 1))

    def _begin_round(self) -> None:
        policy = EPDParamPolicy(
            self.best,
            self.ppo.dirichlet_concentration * NARROWING**self.round,
            parameterization="direct",
            scale_std=self.ppo.scale_std,
            train_scale_dir=self.ppo.train_scale_dir,
            train_scale_time=self.ppo.train_scale_time,
        )
        seeds = [derive_seed(self.seed, "halving", self.round, j) for j in range(self.ppo.rloo_k - 1)]
        drawn, own = policy.sample_tables(seeds), policy.mean_sample(1)
        parts = ("segments", "weights", "scale_dir", "scale_time", "log_prob")
        joined = [torch.cat([first, second]) for first, second in zip(_parts(own), _parts(drawn), strict=True)]
        self.alive = replace(drawn, **dict(zip(parts, joined, strict=True)))
        self.sums = torch.zeros(self.ppo.rloo_k, dtype=torch.float64)
        self.images = 0
        self.round += 1

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        rewards = rollout.rewards.view(-1, len(self.sums))
        self.sums = self.sums + rewards.sum(0)
        self.images += len(rewards)
        order = self.sums.argsort(descending=True)[: math.ceil(len(self.sums) / 2)]
        best = self.sums[order[0]].item() / self.images
        self.alive, self.sums = self.alive.select(order), self.sums[order]
        if len(order) == 1:
            self.best = table_of(self.alive, 0)
            self.alive = None
        return {"reward_best": best}

    def mean_table(self) -> SolverTable:
        return self.best


def _parts(sample: PolicySample) -> tuple[Tensor, ...]:
    return sample.segments, sample.weights, sample.scale_dir, sample.scale_time, sample.log_prob
