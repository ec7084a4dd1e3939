"""The training loop: roll out, update, evaluate, report, save."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from torch_utils import distributed
from torch_utils.checkpoint import save_checkpoint
from torch_utils.errors import UserError
from training.ppo.config import Config, flatten
from training.ppo.evaluation import MeanTableEvaluator
from training.ppo.guard import HackingGuard
from training.ppo.interrupt import StopRequest
from training.ppo.intervals import summarize
from training.ppo.learner import Learner
from training.ppo.losses import group_std
from training.ppo.pathwise import Pathwise
from training.ppo.policy import EPDParamPolicy
from training.ppo.rdpo import RDPO
from training.ppo.reporting import Reporter
from training.ppo.rl_runner import EPDRolloutRunner, Rollout, first_broken
from training.ppo.run_dir import RunDirectory, check_config, config_sha256, restore_policy

STOP_AFTER = 2  # diverging evaluations in a row, where evaluation.on_divergence is stop


def mean_and_interval(name: str, scores: torch.Tensor, group_ids: torch.Tensor | None = None) -> dict[str, float]:
    """`<name>_mean` of `scores` `[M]`, and `<name>_ci95_low` and `_high`, the 95 % interval of that mean.

    What belongs to one group of `group_ids` `[M]` is no independent evidence: the interval is over the means of the
    groups, of equal size. One group, or one score without groups, gives no interval.
    """
    found = {f"{name}_mean": scores.mean().item()}
    if group_ids is not None:
        scores = torch.stack([scores[group_ids == group].mean() for group in group_ids.unique()])
    interval = summarize(scores.tolist())["ci95"]
    return found if interval is None else found | {f"{name}_ci95_low": interval[0], f"{name}_ci95_high": interval[1]}


def create_learner(config: Config, policy: EPDParamPolicy) -> Learner:
    """The algorithm of `trainer.algorithm`."""
    if config.trainer.algorithm == "pathwise":
        return Pathwise(policy, config.ppo, config.pathwise)
    return RDPO(policy, config.ppo, config.run.seed)


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
        self.learner = create_learner(config, policy)
        self.runner = runner
        self.evaluator = evaluator
        # By the names of the rewards themselves, which differ from the configuration's for HPSv2.
        metrics = [] if evaluator is None else evaluator.scorer.rewards[len(runner.mix.rewards) :]
        self.guard = HackingGuard(runner.mix.name, [metric.name for metric in metrics])
        self.directory = directory
        self.step = 0
        # In the whole run: prompts with a score that is not a number, optimizer steps with a gradient that is not.
        self.dropped_groups = self.skipped_updates = 0
        self.seconds_checkpoint = 0.0  # that the last save took
        # After which steps the mean table is judged: every `interval` of them and the last one; also before the first.
        steps = config.ppo.steps
        self.evaluation_steps = set() if evaluator is None else {steps, *range(0, steps, config.evaluation.interval)}

    def train(self, stop: StopRequest) -> int:
        """Run to `ppo.steps`, to the end of the step in which a signal came, or until the reward is being exploited.

        Returns the signal's number, or 0. Raises `UserError` when the GPU's memory does not suffice, when nothing can
        be written, or when too much had to be left out.
        """
        try:
            with contextlib.ExitStack() as opened:
                reporter = None
                if distributed.is_main():
                    reporter = Reporter(self.directory, self.config, self.step, self.evaluation_steps)
                    opened.callback(reporter.close)
                return self._train(reporter, stop)
        except torch.OutOfMemoryError as error:
            micro_batch = self.config.ppo.rollout_micro_batch or "null, the rank's whole share"
            raise UserError(
                f"step {self.step}: the GPU's memory does not suffice; make fewer images at once with "
                f"ppo.rollout_micro_batch (now {micro_batch}) and start again, the run goes on from its last checkpoint"
            ) from error
        except OSError as error:
            place = f"{error.filename or self.directory.path}: {error.strerror or error}"
            raise UserError(
                f"step {self.step}: cannot write {place}; make room there and start again, the run goes on from its "
                "last checkpoint"
            ) from error

    def _train(self, reporter: Reporter | None, stop: StopRequest) -> int:
        if self.step == 0:
            self._evaluate(reporter)
        signum = 0
        while self.step < self.config.ppo.steps and not signum and not self._must_stop():
            signum = self._train_step(reporter, stop)
        return signum

    def _train_step(self, reporter: Reporter | None, stop: StopRequest) -> int:
        self.step += 1
        started = time.perf_counter()
        draw = self.learner.draw(self.runner, self.step)
        rollout = self.runner.rollout(draw, self.learner.needs_gradients)
        rolled_out = time.perf_counter()
        kept, dropped = rollout.finite_groups()
        self.dropped_groups += dropped
        metrics: dict[str, Any] = {"step": self.step}
        if len(kept.rewards):
            metrics |= {**self._describe(kept), **self.learner.update(self.step, kept)}
        self.skipped_updates += metrics.get("skipped_updates", 0)
        metrics |= {
            "dropped_groups": dropped,
            "dropped_groups_in_all": self.dropped_groups,
            "skipped_updates_in_all": self.skipped_updates,
        }
        seconds = time.perf_counter() - started
        metrics |= {
            "images": self.step * len(rollout.rewards),
            "images_per_second": len(rollout.rewards) / seconds,
            "seconds_step": seconds,
            "seconds_generation": rollout.seconds_generation,
            "seconds_reward": rollout.seconds_reward,
            "seconds_update": time.perf_counter() - rolled_out,
            "seconds_checkpoint": self.seconds_checkpoint,  # of the save before this step, 0 where there was none
        }
        self.seconds_checkpoint = 0.0
        signum = self._agree(stop.signum)
        last = self.step == self.config.ppo.steps
        record = self._evaluate(reporter)
        metrics |= {f"eval_{key}": value for key, value in record.items() if "_mean" in key or key == "diverging"}
        # The line comes before the checkpoint: after a crash between the two it is dropped and written again.
        if reporter is not None:
            reporter.log_step(metrics)
        ppo = self.config.ppo
        too_many = self.dropped_groups > ppo.max_dropped_groups or self.skipped_updates > ppo.max_skipped_updates
        if last or signum or too_many or self._must_stop() or self.step % self.config.logging.save_interval == 0:
            self._save_step()
        if dropped:
            broken = first_broken(rollout.raw, self.runner.mix.rewards, rollout.draw.prompts)
            counts = f"prompts left out: {dropped} in this step, {self.dropped_groups} in all"
            self._note(f"{broken}; {counts}", self.dropped_groups, "ppo.max_dropped_groups", reporter)
        if skipped := metrics.get("skipped_updates", 0):
            counts = f"updates left out, for their gradient is not finite: {skipped}, {self.skipped_updates} in all"
            self._note(counts, self.skipped_updates, "ppo.max_skipped_updates", reporter)
        return signum

    def _note(self, what: str, count: int, limit: str, reporter: Reporter | None) -> None:
        """Say what a step left out. Raises `UserError` where `count` is above the limit that `limit` names."""
        message = f"step {self.step}: {what}"
        most = flatten(self.config)[limit]
        if count > most:
            raise UserError(
                f"{message}, more than {limit}={most}; the images or the reward's weights are bad; "
                f"{self.directory.checkpoint(self.step)} has the policy so far"
            )
        if reporter is not None:
            reporter.progress.message(f"note: {message}")

    def _save_step(self) -> None:
        """The checkpoint of this step, and none too many."""
        started = time.perf_counter()
        self._save(self.directory.checkpoint(self.step))
        if distributed.is_main():
            self.directory.prune_checkpoints(self.config.checkpoints)
        self.seconds_checkpoint = time.perf_counter() - started

    def _must_stop(self) -> bool:
        """Whether the reward is being exploited and the configuration says to end the run then."""
        return self.config.evaluation.on_divergence == "stop" and self.guard.consecutive >= STOP_AFTER

    def _describe(self, rollout: Rollout) -> dict[str, float]:
        rewards = rollout.rewards
        return {
            **mean_and_interval("reward", rewards, rollout.draw.group_ids),
            "reward_std": rewards.std(correction=0).item(),
            "reward_min": rewards.amin().item(),
            "reward_max": rewards.amax().item(),
            "reward_group_std": group_std(rewards, rollout.draw.group_ids).item(),
            **self.runner.mix.raw_means(rollout.raw),
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
        """Judge the mean table if that is due, keep it if it is the best so far, and return the record, else {}.

        An evaluation with a score that is not a number is reported over the other prompts and not judged: it would be
        compared with evaluations of other prompts.
        """
        if self.evaluator is None or self.step not in self.evaluation_steps:
            return {}
        started = time.perf_counter()
        evaluation = self.evaluator.evaluate(self.policy.mean_table())
        finite = torch.stack(list(evaluation.scores.values())).isfinite().all(0)
        verdict = self.guard.judge(self.step, evaluation.scores) if finite.all() else None
        record: dict[str, Any] = {
            "step": self.step,
            "images": self.step * self.config.ppo.rollout_batch_size,
            "prompts": int(finite.sum()),
        }
        if finite.any():
            for name, scores in evaluation.scores.items():
                record |= mean_and_interval(name, scores[finite])
        if verdict is not None:
            record["diverging"] = verdict.diverging
        record["seconds"] = time.perf_counter() - started
        if reporter is not None:
            reporter.log_evaluation(record, evaluation.images)
            if verdict is None:
                count = len(finite) - record["prompts"]
                message = f"note: step {self.step}: {count} held-out prompts have a score that is not a number"
                reporter.progress.message(f"{message}; this evaluation is not judged")
            elif verdict.message is not None:
                reporter.progress.message(verdict.message)
        if verdict is not None and verdict.is_best:
            self._save(self.directory.best_checkpoint)
        return record

    def _save(self, path: Path) -> None:
        if distributed.is_main():
            save_checkpoint(path, self.state())

    def state(self) -> dict[str, Any]:
        """All that going on needs, after `step`. "guard" has the best evaluation so far.

        Learning rate, exploration, prompts, noises and tables of a step are functions of its number and the
        configuration (`learning_rate`, `RDPO.concentration`, `PromptOrder.take`, `derive_seed`): there is no scheduler,
        no place in the prompts and no random generator to keep.
        """
        config = flatten(self.config)
        return {
            "step": self.step,
            "policy": self.policy.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "guard": self.guard.state(),
            "dropped_groups": self.dropped_groups,
            "skipped_updates": self.skipped_updates,
            "mix": self.runner.mix.state(),
            "evaluation_mix": [] if self.evaluator is None else self.evaluator.mix.state(),
            "start_table_sha256": self.policy.start.sha256(),
            "config": config,
            "config_sha256": config_sha256(config),
        }

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises `CheckpointError` for one that cannot be read, or of another run."""
        state = restore_policy(self.policy, path)
        check_config(state["config"], self.config, path)
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.guard.restore(state["guard"])
        self.dropped_groups, self.skipped_updates = state["dropped_groups"], state["skipped_updates"]
        self.runner.mix.restore(state["mix"])
        if self.evaluator is not None:
            self.evaluator.mix.restore(state["evaluation_mix"])
