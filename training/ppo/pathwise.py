"""The pathwise gradient: the reward's derivative through image, decoder and solver to the numbers of the mean table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.ppo.config import PathwiseConfig, PPOConfig
from training.ppo.learner import learning_rate, set_learning_rate
from training.ppo.policy import EPDParamPolicy
from training.ppo.rl_runner import Draw, EPDRolloutRunner, Rollout


class Pathwise:
    """Climbs the gradient of the mean table's reward with Adam; nothing is sampled, the policy only holds the table.

    One image tells the slope in every direction of the table, where a sampled table tells one number. It costs a
    backward pass and rewards that can be differentiated.
    """

    needs_gradients = True

    def __init__(self, policy: EPDParamPolicy, ppo: PPOConfig, pathwise: PathwiseConfig):
        self.policy = policy
        self.steps = ppo.steps
        self.learning_rate = pathwise.learning_rate
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=pathwise.learning_rate, betas=(0.9, 0.99))

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw:
        """The prompts and noises of step `step` >= 1, with the mean table."""
        return runner.draw_mean(self.policy, step)

    def update(self, step: int, rollout: Rollout) -> dict[str, float]:
        """One step of Adam along the mean of the images' gradients; returns statistics."""
        rate = learning_rate(self.learning_rate, "linear", step, self.steps)
        set_learning_rate(self.optimizer, rate)
        gradient, norms = robust_mean(torch.stack(rollout.gradients, dim=1))
        self.optimizer.zero_grad()
        pairs = zip(self.policy.mean_arrays(), -gradient, strict=True)
        trained, slopes = zip(*((array, slope) for array, slope in pairs if array.requires_grad), strict=True)
        torch.autograd.backward(trained, slopes)
        grads = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        finite = all(grad.isfinite().all() for grad in grads)
        if finite:
            self.optimizer.step()
        found = {
            "skipped_updates": int(not finite),
            "kl": self.policy.kl().item(),
            "learning_rate": rate,
            "grad_norm": gradient.norm().item(),
            "grad_norm_median": norms.median().item(),
            "grad_norm_max": norms.max().item(),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


def robust_mean(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the images of `gradients [N, ...]`, each shortened to the median length; and the lengths `[N]` before.

    Where the solver is unstable an image or two have gradients many times longer than the others', which point
    nowhere. A gradient that is not finite counts as zero, its length as infinite.
    """
    norms = gradients.flatten(1).norm(dim=1)
    finite = norms.isfinite()
    norms = torch.where(finite, norms, torch.inf)
    shares = (norms.median() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1)
    shares = torch.where(finite, shares, 0.0) / len(norms)
    return torch.einsum("n,n...->...", shares, gradients.nan_to_num(0, 0, 0)), norms
