"""What the training loop needs of an algorithm, and what the algorithms share."""

from __future__ import annotations

from typing import Protocol

import torch

from training.ppo.policy import EPDParamPolicy
from training.ppo.rl_runner import Draw, EPDRolloutRunner, Rollout


class Learner(Protocol):
    """An algorithm that improves `policy`: it says what a step needs, and is told what came of it."""

    policy: EPDParamPolicy
    needs_gradients: bool  # whether `update` reads `Rollout.gradients`

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the policy's parameters; a checkpoint keeps its state."""

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw:
        """The images of step `step` >= 1: the same whatever happened before, the policy's state aside."""

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        """Learn from what the draw gave; returns finite statistics, "kl" (to the start policy) among them.

        "skipped_updates" counts the optimizer steps that were left out because their gradient was not finite.
        """


def learning_rate(first: float, schedule: str, step: int, steps: int) -> float:
    """Of step `step` in 1..`steps`. "linear" falls towards zero, which lets the mean table settle: the last steps
    average out their noise; "constant" stays."""
    return first * (1 - (step - 1) / steps if schedule == "linear" else 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
