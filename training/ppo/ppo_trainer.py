"""The PPO loop: roll out, update, evaluate, report, save."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_utils import distributed
from torch_utils.checkpoint import save_checkpoint
from torch_utils.seeds import derive_seed, generator
from training.ppo.config import Config, flatten
from training.ppo.evaluation import MeanTableEvaluator
from training.ppo.interrupt import StopRequest
from training.ppo.losses import advantages, clipped_surrogate, group_std, legacy_mixed_groups, ratio_statistics
from training.ppo.policy import EPDParamPolicy
from training.ppo.reporting import Reporter
from training.ppo.rl_runner import EPDRolloutRunner, Rollout
from training.ppo.run_dir import RunDirectory, restore_policy


class PPOTrainer:
    """Improves `policy` step by step.

    All ranks hold the whole batch (tables are drawn everywhere, rewards are gathered: a few kilobytes) and make the
    same update on the CPU, so the weights need no exchange and do not depend on the number of ranks. Each step compares
    a hash of them.
    """

    def __init__(
        self,
        config: Config,
        policy: EPDParamPolicy,
        runner: EPDRolloutRunner,
        evaluator: MeanTableEvaluator | None,
        directory: RunDirectory,
    ):
        """`evaluator` None: no evaluation, and no policy-best.pt."""
        self.config = config
        self.policy = policy
        self.runner = runner
        self.evaluator = evaluator
        self.directory = directory
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.ppo.learning_rate)
        self.step = 0
        self.best: dict[str, Any] | None = None  # step and reward_mean of the best evaluation

    def train(self, stop: StopRequest) -> int:
        """Run to `ppo.steps`, or to the end of the step in which a signal came. Returns the signal's number, or 0."""
        reporter = None
        if distributed.is_main():
            reporter = Reporter(self.directory, self.config.logging, self.config.ppo.steps, self.step)
        try:
            if self.step == 0 and self.evaluator is not None:
                self._evaluate(reporter)
            signum = 0
            while self.step < self.config.ppo.steps and not signum:
                signum = self._train_step(reporter, stop)
        finally:
            if reporter is not None:
                reporter.close()
        return signum

    def _train_step(self, reporter: Reporter | None, stop: StopRequest) -> int:
        self.step += 1
        started = time.perf_counter()
        rollout = self.runner.rollout(self.policy, self.step)
        rolled_out = time.perf_counter()
        metrics = {"step": self.step, **self._describe(rollout), **self.update(rollout)}
        seconds = time.perf_counter() - started
        metrics |= {
            "images": self.step * len(rollout.rewards),
            "images_per_second": len(rollout.rewards) / seconds,
            "seconds_step": seconds,
            "seconds_generation": rollout.seconds_generation,
            "seconds_reward": rollout.seconds_reward,
            "seconds_update": time.perf_counter() - rolled_out,
        }
        signum = self._agree(stop.signum)
        last = self.step == self.config.ppo.steps
        if self.evaluator is not None and (last or self.step % self.config.evaluation.interval == 0):
            metrics |= {f"eval_{key}": value for key, value in self._evaluate(reporter).items() if "_mean" in key}
        # The line comes before the checkpoint: after a crash between the two it is dropped and written again.
        if reporter is not None:
            reporter.log_step(metrics)
        if last or signum or self.step % self.config.logging.save_interval == 0:
            self._save(self.directory.checkpoint(self.step))
        return signum

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Optimise the policy on a rollout; returns statistics, ratios and KL as they are after the last update."""
        ppo = self.config.ppo
        groups = rollout.group_ids
        if ppo.baseline == "legacy_mixed":
            groups = legacy_mixed_groups(len(groups), ppo.rloo_k)
        gains = advantages(rollout.rewards, groups, ppo.normalize_advantages)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._learning_rate()
        losses, norms = [], []
        for epoch in range(ppo.ppo_epochs):
            for index in self._minibatches(len(gains), epoch):
                loss, norm = self._optimize(rollout, gains, index)
                losses.append(loss)
                norms.append(norm)
        with torch.no_grad():
            ratios = ratio_statistics(self.policy.log_prob(rollout.sample), rollout.sample.log_prob, ppo.clip_range)
            return {
                "kl": self.policy.kl().item(),
                "approx_kl": ratios.approx_kl,
                "clip_fraction": ratios.clip_fraction,
                "ratio_mean": ratios.ratio_mean,
                "ratio_max": ratios.ratio_max,
                "entropy": self.policy.entropy().item(),
                "learning_rate": self._learning_rate(),
                "loss": sum(losses) / len(losses),
                "grad_norm": sum(norms) / len(norms),
            }

    def _learning_rate(self) -> float:
        """Of the present step. A linear fall lets the mean table settle: the last steps average out their noise."""
        ppo = self.config.ppo
        left = 1 - (self.step - 1) / ppo.steps
        return ppo.learning_rate * (left if ppo.learning_rate_schedule == "linear" else 1.0)

    def _minibatches(self, count: int, epoch: int) -> list[Tensor]:
        size = self.config.ppo.minibatch_size or count
        random = generator(derive_seed(self.config.run.seed, "minibatch", self.step, epoch))
        return list(torch.randperm(count, generator=random).split(size))

    def _optimize(self, rollout: Rollout, gains: Tensor, index: Tensor) -> tuple[float, float]:
        """One optimizer step on the samples `index`; returns the loss and the gradient's norm before clipping."""
        ppo = self.config.ppo
        sample = rollout.sample.select(index)
        loss = clipped_surrogate(self.policy.log_prob(sample), sample.log_prob, gains[index], ppo.clip_range)
        loss = loss + ppo.kl_coef * self.policy.kl() - ppo.entropy_coef * self.policy.entropy()
        self.optimizer.zero_grad()
        loss.backward()
        limit = float("inf") if ppo.max_grad_norm is None else ppo.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit, error_if_nonfinite=True)
        self.optimizer.step()
        return loss.item(), norm.item()

    def _describe(self, rollout: Rollout) -> dict[str, float]:
        rewards = rollout.rewards
        return {
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "reward_min": rewards.amin().item(),
            "reward_max": rewards.amax().item(),
            "reward_group_std": group_std(rewards, rollout.group_ids).item(),
        }

    def _agree(self, signum: int) -> int:
        """The signal that any rank has received (0: none). Raises `RuntimeError` if the ranks' weights have parted."""
        digest = hashlib.sha256()
        for parameter in self.policy.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        fingerprint = int.from_bytes(digest.digest()[:8], "big", signed=True)
        gathered = distributed.all_gather(torch.tensor([[fingerprint, signum]], dtype=torch.int64))
        if (gathered[:, 0] != fingerprint).any():
            raise RuntimeError(f"step {self.step}: the policy weights differ between ranks")
        return int(gathered[:, 1].amax())

    def _evaluate(self, reporter: Reporter | None) -> dict[str, Any]:
        """Judge the mean table, keep it if it is the best so far, and return the record."""
        started = time.perf_counter()
        evaluation = self.evaluator.evaluate(self.policy.mean_table())
        record = {
            "step": self.step,
            "images": self.step * self.config.ppo.rollout_batch_size,
            "prompts": len(evaluation.scores["reward"]),
            **{f"{name}_mean": scores.mean().item() for name, scores in evaluation.scores.items()},
            "seconds": time.perf_counter() - started,
        }
        if reporter is not None:
            reporter.log_evaluation(record, evaluation.images)
        if self.best is None or record["reward_mean"] > self.best["reward_mean"]:
            self.best = {"step": self.step, "reward_mean": record["reward_mean"]}
            self._save(self.directory.best_checkpoint)
        return record

    def _save(self, path: Path) -> None:
        if distributed.is_main():
            state = {
                "step": self.step,
                "policy": self.policy.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "start_table_sha256": self.policy.start.sha256(),
                "config": flatten(self.config),
            }
            save_checkpoint(path, state)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint: every draw is derived from the step, so nothing else need be restored."""
        state = restore_policy(self.policy, path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.best = state["best"]
