"""What training climbs: one reward, or several, each transformed and weighted, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from training.ppo.config import DIVISION, PUBLISHED_TRANSFORMS
from training.ppo.reward_base import Reward

# Below this spread z-scores count the scores as equal.
MIN_STD = 1e-8


@dataclass
class RunningStatistics:
    """Mean and population variance of all numbers seen so far (Chan, Golub, LeVeque 1983, Eq. 2.1)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def observe(self, values: Tensor) -> None:
        """Take in `values [B]`; what is not finite is left out."""
        values = values[values.isfinite()].double()
        if not len(values):
            return
        mean, squares = values.mean().item(), (values - values.mean()).square().sum().item()
        total, gap = self.count + len(values), mean - self.mean
        self.squares += squares + gap**2 * self.count * len(values) / total
        self.mean += gap * len(values) / total
        self.count = total

    def standardize(self, values: Tensor) -> Tensor:
        """(values - mean) / standard deviation."""
        deviation = max((self.squares / max(self.count, 1)) ** 0.5, MIN_STD)
        return (values - self.mean) / deviation


@dataclass
class Component:
    """One reward of a mix. `transform` is a name that `config.check_values` accepts for this reward."""

    reward: Reward
    reward_type: str  # as configured, e.g. "hps"
    weight: float = 1.0  # negative for what should fall
    transform: str = "none"
    statistics: RunningStatistics = field(default_factory=RunningStatistics)  # of raw scores, for zscore

    def transformed(self, raw: Tensor) -> Tensor:
        """`raw [B]` on the scale on which rewards are added up; differentiable."""
        if self.transform == "zscore":
            return self.statistics.standardize(raw)
        if self.transform == "clamp01":
            return raw.clamp(0, 1)
        if self.transform == "published":
            shift, divisor = PUBLISHED_TRANSFORMS[self.reward_type]
            return ((raw + shift) / divisor).clamp(0, 1)
        if division := DIVISION.fullmatch(self.transform):
            return raw / float(division[1])
        return raw


class RewardMix:
    """sum_i w_i T_i(score_i) / sum_i |w_i|: the mean of the transformed scores by weight; a lone reward is left raw.

    z-scores are by the raw scores of all rollouts so far, the one at hand included, or, for a mix that judges
    evaluations, by those of the first evaluation, so that later ones compare with it.
    """

    def __init__(self, components: Sequence[Component]):
        """At least one component; the weights are not 0."""
        self.components = list(components)
        self.rewards = [component.reward for component in components]
        self.name = " + ".join(reward.name for reward in self.rewards)

    @classmethod
    def of(cls, reward: Reward) -> RewardMix:
        """`reward` alone, as it is."""
        return cls([Component(reward, reward.name)])

    @property
    def is_plain(self) -> bool:
        """Whether it is one reward's raw scores."""
        return len(self.components) == 1 and self.components[0].transform == "none" and self.components[0].weight > 0

    def for_evaluation(self) -> RewardMix:
        """The same mix with statistics of its own."""
        return RewardMix([Component(c.reward, c.reward_type, c.weight, c.transform) for c in self.components])

    @property
    def has_observed(self) -> bool:
        """Whether z-scores mean anything yet."""
        return all(component.statistics.count for component in self.components)

    def observe(self, raw: Tensor) -> None:
        """Take `raw [B, C]` into the statistics."""
        for component, scores in zip(self.components, raw.unbind(1), strict=True):
            component.statistics.observe(scores)

    def combine(self, raw: Tensor) -> Tensor:
        """`[B, C]` raw scores, one column per component => `[B]`; differentiable. NaN stays NaN."""
        total = sum(abs(component.weight) for component in self.components)
        pairs = zip(self.components, raw.unbind(1), strict=True)
        weighted = (component.weight / total * component.transformed(scores) for component, scores in pairs)
        return sum(weighted, raw.new_zeros(len(raw)))

    def raw_means(self, raw: Tensor) -> dict[str, float]:
        """For the log: mean and standard deviation of every component's raw scores `[B, C]`, B >= 1.

        Keys are `raw_<name>_mean` and `raw_<name>_std`. Empty where the reward is the raw score itself.
        """
        found: dict[str, float] = {}
        if self.is_plain:
            return found
        for reward, scores in zip(self.rewards, raw.unbind(1), strict=True):
            found[f"raw_{reward.name}_mean"] = scores.mean().item()
            found[f"raw_{reward.name}_std"] = scores.std(correction=0).item()
        return found

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint must keep: the statistics, component by component."""
        return [dict(vars(component.statistics)) for component in self.components]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on as the mix did that gave `state`, with the same components."""
        for component, values in zip(self.components, state, strict=True):
            component.statistics = RunningStatistics(**values)
