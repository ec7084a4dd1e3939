"""The policy: a distribution over solver tables whose mean starts at a given table.

Row i of a table is drawn from two Dirichlet distributions, one over the K+1 segments that the K positions cut (0, 1)
into, one over the K weights, and, where scales are trained, from log-normal distributions. All of it is a few hundred
numbers, so it lives on the CPU in float64: the same arithmetic on every rank, whatever the accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Normal, kl_divergence

from torch_utils.seeds import derive_seed
from training.ppo.config import Config
from training.table import SolverTable

# A sampled segment or weight is at least this large: positions then increase strictly and every weight is positive.
MIN_SHARE = 1e-6
# How far training can move a log-concentration, and a log-scale, from its start. The first keeps every mean inside
# the simplex, the second keeps scales that start at 1 inside (0, 2), which is what the .pkl format can hold.
LOG_ALPHA_BOUND = 5.0
LOG_SCALE_BOUND = math.log(2.0)
# Log-scales move this fraction of what log-concentrations move: a scale changes the length of every step, so equal
# steps of the optimizer would throw the pictures off long before positions and weights have found their places.
SCALE_RATE = 0.25


@dataclass(frozen=True)
class PolicyOutput:
    """Distribution parameters of M rows, float64. Frozen scales are the start table's, with no gradient."""

    alpha_pos: Tensor  # [M, K+1] > 0
    alpha_weight: Tensor  # [M, K] > 0
    log_scale_dir: Tensor  # [M, K] mean of the logarithm
    log_scale_time: Tensor  # [M, K]


class TableArrays(NamedTuple):
    """The numbers of a table, float64 `[..., N-1, K]`, with gradient where the source has one. Solvers take it as they
    take a `SolverTable`."""

    positions: Tensor
    weights: Tensor
    scale_dir: Tensor
    scale_time: Tensor


@dataclass(frozen=True)
class PolicySample:
    """B drawn tables, float64 on the CPU, no gradient."""

    segments: Tensor  # [B, N-1, K+1] > 0, rows sum to 1
    weights: Tensor  # [B, N-1, K] > 0, rows sum to 1
    scale_dir: Tensor  # [B, N-1, K] > 0
    scale_time: Tensor  # [B, N-1, K] > 0
    log_prob: Tensor  # [B], under the policy that drew them
    start: SolverTable  # gives `table` its metadata

    @property
    def arrays(self) -> TableArrays:
        """The numbers of the tables, `[B, N-1, K]`."""
        return TableArrays(_positions(self.segments), self.weights, self.scale_dir, self.scale_time)

    @property
    def table(self) -> SolverTable:
        """The tables as one `SolverTable` with a leading sample axis."""
        return replace(self.start, **self.arrays._asdict())

    def select(self, index: Tensor | slice) -> PolicySample:
        """The samples at `index`: an integer tensor `[M]`, or a slice."""
        return PolicySample(
            segments=self.segments[index],
            weights=self.weights[index],
            scale_dir=self.scale_dir[index],
            scale_time=self.scale_time[index],
            log_prob=self.log_prob[index],
            start=self.start,
        )


class ResidualBlock(nn.Module):
    """x + W2 silu(W1 norm(x)), width kept."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residual_mlp(rows: int, hidden_dim: int, num_layers: int, outputs: int) -> nn.Module:
    """Step index `[M]` -> `[M, outputs]`, zero for every step until trained."""
    head = nn.Linear(hidden_dim, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    blocks = [ResidualBlock(hidden_dim) for _ in range(num_layers)]
    return nn.Sequential(nn.Embedding(rows, hidden_dim), *blocks, nn.LayerNorm(hidden_dim), head)


def direct_residuals(rows: int, outputs: int) -> nn.Module:
    """Step index `[M]` -> `[M, outputs]`: one free number per entry, zero until trained."""
    embedding = nn.Embedding(rows, outputs)
    nn.init.zeros_(embedding.weight)
    return embedding


class EPDParamPolicy(nn.Module):
    """Dirichlet (and log-normal) policy around `table`, whose mean table is `table` until it is trained.

    alpha = concentration * (segments, weights) * exp(residual), the residual a function of the step index: a residual
    MLP on a step embedding ("mlp"), or one number per entry ("direct"). A larger `concentration` explores less; it can
    be changed on the way (`set_concentration`), which leaves the mean table as it is. Scales
    whose training is off keep the table's values in every sample; the others are log-normal with standard deviation
    `scale_std` in the logarithm and median exp(mu), which is what `mean_table` reports. `seed` draws the MLP's weights.
    """

    start_segments: Tensor  # [N-1, K+1]

    def __init__(
        self,
        table: SolverTable,
        concentration: float = 20.0,
        hidden_dim: int = 128,
        num_layers: int = 2,
        *,
        parameterization: str = "mlp",
        scale_std: float = 0.05,
        train_scale_dir: bool = False,
        train_scale_time: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if table.positions.ndim != 2:
            raise ValueError("the start table must be a single table, without a sample axis")
        if parameterization not in ("mlp", "direct"):
            raise ValueError(f"parameterization {parameterization!r} must be mlp or direct")
        self.start = table
        self.concentration = concentration
        self.scale_std = scale_std
        self.train_scale_dir = train_scale_dir
        self.train_scale_time = train_scale_time
        rows, points = table.positions.shape
        self.output_sizes = [points + 1, points, points * train_scale_dir, points * train_scale_time]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if parameterization == "mlp":
                self.residuals = residual_mlp(rows, hidden_dim, num_layers, sum(self.output_sizes))
            else:
                self.residuals = direct_residuals(rows, sum(self.output_sizes))
        self.double()
        # Not in the state dict: it follows from the start table, which a run keeps beside its checkpoints.
        self.register_buffer("start_segments", _segments(table.positions), persistent=False)

    def set_concentration(self, concentration: float) -> None:
        """Explore with another sum of concentrations (> 0) from now on, around the same mean table."""
        self.concentration = concentration

    def forward(self, step_indices: Tensor) -> PolicyOutput:
        """Distribution parameters of the rows `step_indices`, integers `[M]` in 0..N-2."""
        pos, weight, scale_dir, scale_time = self.residuals(step_indices).split(self.output_sizes, dim=-1)
        log_scale_dir = self.start.scale_dir[step_indices].log()
        log_scale_time = self.start.scale_time[step_indices].log()
        if self.train_scale_dir:
            log_scale_dir = log_scale_dir + _bounded(SCALE_RATE * scale_dir, LOG_SCALE_BOUND)
        if self.train_scale_time:
            log_scale_time = log_scale_time + _bounded(SCALE_RATE * scale_time, LOG_SCALE_BOUND)
        start_pos, start_weight = self._start_alphas()
        return PolicyOutput(
            alpha_pos=start_pos[step_indices] * _bounded(pos, LOG_ALPHA_BOUND).exp(),
            alpha_weight=start_weight[step_indices] * _bounded(weight, LOG_ALPHA_BOUND).exp(),
            log_scale_dir=log_scale_dir,
            log_scale_time=log_scale_time,
        )

    def _start_alphas(self) -> tuple[Tensor, Tensor]:
        """Concentrations of the untrained policy: `[N-1, K+1]` of the segments, `[N-1, K]` of the weights."""
        return self.concentration * self.start_segments, self.concentration * self.start.weights

    def all_rows(self) -> PolicyOutput:
        """`forward` for the whole table, M = N-1."""
        return self(torch.arange(len(self.start.positions)))

    def mean_arrays(self) -> TableArrays:
        """Dirichlet means and log-normal medians, `[N-1, K]`, with gradient."""
        output = self.all_rows()
        return TableArrays(
            positions=_positions(output.alpha_pos / output.alpha_pos.sum(-1, keepdim=True)),
            weights=output.alpha_weight / output.alpha_weight.sum(-1, keepdim=True),
            scale_dir=output.log_scale_dir.exp(),
            scale_time=output.log_scale_time.exp(),
        )

    def mean_table(self) -> SolverTable:
        """The table of `mean_arrays`, without gradient."""
        return replace(self.start, **self.mean_arrays()._asdict())

    def sample_table(self, batch: int, seed: int) -> PolicySample:
        """Draw `batch` tables; sample b depends on the policy, `seed` and b alone."""
        return self.sample_tables([derive_seed(seed, "table", index) for index in range(batch)])

    @torch.no_grad()
    def mean_sample(self, batch: int) -> PolicySample:
        """The mean table `batch` times, as if it had been drawn."""
        output, arrays = self.all_rows(), self.mean_arrays()
        segments = output.alpha_pos / output.alpha_pos.sum(-1, keepdim=True)
        parts = segments, arrays.weights, arrays.scale_dir, arrays.scale_time
        segments, weights, scale_dir, scale_time = (part.expand(batch, -1, -1) for part in parts)
        sample = PolicySample(segments, weights, scale_dir, scale_time, torch.zeros(batch), self.start)
        return replace(sample, log_prob=self.log_prob(sample))

    @torch.no_grad()
    def sample_tables(self, seeds: Sequence[int]) -> PolicySample:
        """Draw one table per seed; each depends on the policy and its own seed alone."""
        output = self.all_rows()
        draws = [self._draw(output, seed) for seed in seeds]
        segments, weights, scale_dir, scale_time = (torch.stack(parts) for parts in zip(*draws, strict=True))
        sample = PolicySample(segments, weights, scale_dir, scale_time, torch.zeros(len(seeds)), self.start)
        return replace(sample, log_prob=self.log_prob(sample))

    def _draw(self, output: PolicyOutput, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # NumPy, because torch's gamma sampler takes a generator only in its private interface.
        random = np.random.Generator(np.random.PCG64(seed))
        segments = _dirichlet(random, output.alpha_pos)
        weights = _dirichlet(random, output.alpha_weight)
        scale_dir, scale_time = output.log_scale_dir, output.log_scale_time
        if self.train_scale_dir:
            scale_dir = scale_dir + self.scale_std * torch.from_numpy(random.standard_normal(scale_dir.shape))
        if self.train_scale_time:
            scale_time = scale_time + self.scale_std * torch.from_numpy(random.standard_normal(scale_time.shape))
        return segments, weights, scale_dir.exp(), scale_time.exp()

    def log_prob(self, sample: PolicySample) -> Tensor:
        """Log-density `[B]` of each sampled table, summed over its rows, with gradient.

        Densities are with respect to Lebesgue measure on the first K segments, the first K-1 weights and, where
        trained, the scales themselves.
        """
        return self.log_prob_rows(sample).sum(-1)

    def log_prob_rows(self, sample: PolicySample) -> Tensor:
        """The parts `[B, N-1]` of `log_prob` that belong to each row; rows are independent."""
        output = self.all_rows()
        total = _dirichlet_distribution(output.alpha_pos).log_prob(sample.segments)
        total = total + _dirichlet_distribution(output.alpha_weight).log_prob(sample.weights)
        for mean, scale in self._trained_scales(output, sample.scale_dir, sample.scale_time):
            log_scale = scale.log()
            total = total + (Normal(mean, self.scale_std).log_prob(log_scale) - log_scale).sum(-1)
        return total

    def entropy(self) -> Tensor:
        """Differential entropy of a sampled table: a scalar, summed over rows, with gradient."""
        output = self.all_rows()
        total = _dirichlet_distribution(output.alpha_pos).entropy().sum()
        total = total + _dirichlet_distribution(output.alpha_weight).entropy().sum()
        for mean, _ in self._trained_scales(output, output.log_scale_dir, output.log_scale_time):
            total = total + (Normal(mean, self.scale_std).entropy() + mean).sum()
        return total

    def kl(self) -> Tensor:
        """KL(this policy || the start policy of the same concentration): a scalar, summed over rows, with gradient."""
        output = self.all_rows()
        total = torch.zeros((), dtype=torch.float64)
        start_pos, start_weight = self._start_alphas()
        for alpha, start in ((output.alpha_pos, start_pos), (output.alpha_weight, start_weight)):
            total = total + kl_divergence(_dirichlet_distribution(alpha), _dirichlet_distribution(start)).sum()
        for mean, start in self._trained_scales(output, self.start.scale_dir.log(), self.start.scale_time.log()):
            total = total + ((mean - start) ** 2).sum() / (2 * self.scale_std**2)
        return total

    def _trained_scales(
        self, output: PolicyOutput, scale_dir: Tensor, scale_time: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs of the policy's log-median and the given counterpart, for the scales that are trained."""
        pairs = []
        if self.train_scale_dir:
            pairs.append((output.log_scale_dir, scale_dir))
        if self.train_scale_time:
            pairs.append((output.log_scale_time, scale_time))
        return pairs


def create_policy(config: Config, start: SolverTable, kind: type[EPDParamPolicy] = EPDParamPolicy) -> EPDParamPolicy:
    """The untrained policy that a configuration describes, around the table `start`; `kind` draws in its own way."""
    return kind(
        start,
        concentration=config.ppo.dirichlet_concentration,
        hidden_dim=config.policy.hidden_dim,
        num_layers=config.policy.num_layers,
        parameterization=config.policy.parameterization,
        scale_std=config.ppo.scale_std,
        train_scale_dir=config.ppo.train_scale_dir,
        train_scale_time=config.ppo.train_scale_time,
        seed=derive_seed(config.run.seed, "policy"),
    )


def _segments(positions: Tensor) -> Tensor:
    """`[..., K]` positions inside (0, 1) -> `[..., K+1]` lengths between 0, the positions and 1."""
    zero, one = torch.zeros_like(positions[..., :1]), torch.ones_like(positions[..., :1])
    return torch.cat([zero, positions, one], dim=-1).diff(dim=-1)


def _positions(segments: Tensor) -> Tensor:
    """`[..., K+1]` segments -> `[..., K]` positions."""
    return segments.cumsum(-1)[..., :-1]


def _bounded(residual: Tensor, bound: float) -> Tensor:
    """Squash into (-bound, bound), slope 1 at zero."""
    return bound * torch.tanh(residual / bound)


def _dirichlet_distribution(alpha: Tensor) -> Dirichlet:
    # Dirichlet's own checks cost more than the arithmetic here, and exp() makes every alpha positive.
    return Dirichlet(alpha, validate_args=False)


def _dirichlet(random: np.random.Generator, alpha: Tensor) -> Tensor:
    """Draw rows of a Dirichlet, `[M, n]`, every entry at least MIN_SHARE.

    Gamma(alpha) is Gamma(alpha + 1) * U^(1/alpha) (Marsaglia and Tsang 2000, section 6); taken in logarithms it cannot
    underflow, however small alpha is.
    """
    concentrations = alpha.numpy()
    log_gamma = np.log(random.standard_gamma(concentrations + 1))
    log_gamma -= random.standard_exponential(concentrations.shape) / concentrations
    shares = torch.from_numpy(log_gamma).softmax(-1)
    return (1 - MIN_SHARE * shares.shape[-1]) * shares + MIN_SHARE
