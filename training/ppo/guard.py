"""The rule against reward hacking: which evaluation is the best, and when the reward rises while quality falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from training.ppo.intervals import summarize

REWARD = "reward"  # the key of the trained reward's scores


@dataclass(frozen=True)
class Difference:
    """An evaluation minus an earlier one: mean over the prompts and its paired 95 % interval."""

    mean: float
    half_width: float | None  # >= 0; None where a single prompt gives no interval

    @property
    def is_rise(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.half_width is not None and self.mean > self.half_width

    @property
    def is_fall(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.half_width is not None and self.mean < -self.half_width

    def __str__(self) -> str:
        half = "" if self.half_width is None else f" ± {self.half_width:.2g}"
        return f"{abs(self.mean):.3g}{half}"


@dataclass(frozen=True)
class Verdict:
    """What one evaluation says about the run."""

    is_best: bool  # policy-best.pt should hold this step
    diverging: bool
    consecutive: int  # diverging evaluations in a row, this one included; 0 where it is not diverging
    message: str | None  # one sentence where it is diverging
    reward: Difference | None  # to the peak before this evaluation; None at the first
    held_out: Difference | None  # likewise; None without a held-out metric, too


class HackingGuard:
    """Judges every evaluation against the peak so far, the one whose held-out mean is highest (ties: the first).

    Diverging: the trained reward is significantly higher than at the peak and the held-out metric significantly lower;
    both 95 % intervals (Student's t) of the per-prompt differences exclude 0. Prompts and noise are the same at every
    evaluation, so the spread between prompts cancels.

    Best: a new peak, or an evaluation whose reward is significantly higher than the best one's while its held-out
    metric is not significantly lower than the peak's. The highest mean alone would as often follow the evaluation's
    noise as the tables.

    Several held-out metrics: the first counts. None: the best is the one with the highest reward, and nothing is ever
    diverging.
    """

    def __init__(self, reward_name: str, metrics: Sequence[str]):
        """`reward_name` is what messages call the trained reward; `metrics` are the held-out ones' keys in `scores`."""
        self.reward_name = reward_name
        self.held_out = metrics[0] if metrics else None
        self.best_step: int | None = None
        self.best_scores: dict[str, Tensor] = {}
        self.peak_step: int | None = None
        self.peak_scores: dict[str, Tensor] = {}
        self.consecutive = 0

    def judge(self, step: int, scores: dict[str, Tensor]) -> Verdict:
        """Judge the evaluation after `step` steps and remember it if it is the best or the peak.

        `scores` as in `Evaluation.scores`: `[M]` finite float64 by metric, prompt by prompt the same M at every call;
        higher is better. Raises `ValueError` for another M.
        """
        # Clones: the scores are columns of one matrix, and a checkpoint would hold all of it for each.
        watched = {name: scores[name].clone() for name in (REWARD, self.held_out) if name is not None}
        differences = {name: difference(watched[name], peak) for name, peak in self.peak_scores.items()}
        reward = differences.get(REWARD)
        held_out = None if self.held_out is None else differences.get(self.held_out)
        leading = reward if self.held_out is None else held_out
        is_peak = leading is None or leading.mean > 0
        message = None
        if reward is not None and held_out is not None and reward.is_rise and held_out.is_fall:
            message = self._message(step, reward, held_out, len(scores[REWARD]))
        self.consecutive = 0 if message is None else self.consecutive + 1
        level = held_out is not None and not held_out.is_fall
        is_best = is_peak or (level and difference(watched[REWARD], self.best_scores[REWARD]).is_rise)
        if is_peak:
            self.peak_step, self.peak_scores = step, watched
        if is_best:
            self.best_step, self.best_scores = step, watched
        return Verdict(is_best, message is not None, self.consecutive, message, reward, held_out)

    def _message(self, step: int, reward: Difference, held_out: Difference, prompts: int) -> str:
        return (
            f"step {step}: {self.reward_name} rose by {reward} over step {self.peak_step}, but {self.held_out} fell by "
            f"{held_out} (95 % intervals, {prompts} prompts): the policy exploits the reward; use "
            f"policy-best.pt, which keeps step {self.best_step}"
        )

    def summary(self) -> str:
        """One sentence on the best evaluation, of which there must have been one."""
        kept = f"policy-best.pt keeps step {self.best_step}, the best by"
        if self.best_step == self.peak_step:
            return f"{kept} {self.held_out or self.reward_name}"
        return f"{kept} {self.reward_name}, with {self.held_out} level with its peak at step {self.peak_step}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep: numbers and CPU tensors in dictionaries."""
        return {
            "best_step": self.best_step,
            "best_scores": dict(self.best_scores),
            "peak_step": self.peak_step,
            "peak_scores": dict(self.peak_scores),
            "consecutive": self.consecutive,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the guard did that gave `state`, under the same metrics."""
        self.best_step, self.best_scores = state["best_step"], dict(state["best_scores"])
        self.peak_step, self.peak_scores = state["peak_step"], dict(state["peak_scores"])
        self.consecutive = state["consecutive"]


def difference(scores: Tensor, reference: Tensor) -> Difference:
    """`scores - reference`, both `[M]` and of the same prompts. Raises `ValueError` where the lengths differ."""
    # As lists: zip refuses unequal lengths, which tensors may broadcast.
    gaps = [new - old for new, old in zip(scores.tolist(), reference.tolist(), strict=True)]
    summary = summarize(gaps)
    half_width = None if summary["ci95"] is None else summary["ci95"][1] - summary["mean"]
    return Difference(summary["mean"], half_width)
