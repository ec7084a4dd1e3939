"""Many training runs side by side: the images that they ask for in a step are made and scored in one network batch.

The embedded model is bound by the launches of its small kernels, so that a thousand images cost little more than a
hundred. A learner does not know: it draws and learns as in a run of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.learning_lines import Line
from torch_utils.errors import UserError
from training.ppo.policy import TableArrays
from training.ppo.rl_runner import Draw, EPDRolloutRunner, ImageScorer, Rollout, first_broken
from training.table import SolverTable

# Training images after which a mean table is evaluated, at the end of the step that reaches them; and at the last step.
MARKS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
SHOW_EVERY = 10.0  # seconds between progress lines
DIGITS = 6  # of the scores that are kept


class Stepper(Protocol):
    """What a run needs of its algorithm (see `training.ppo.learner`)."""

    needs_gradients: bool

    def draw(self, runner: EPDRolloutRunner, step: int) -> Draw: ...

    def update(self, step: int, rollout: Rollout) -> dict[str, float]: ...


@dataclass
class Run:
    """One algorithm with one seed."""

    line: Line
    seed: int
    learner: Stepper
    mean_table: Callable[[], SolverTable]
    runner: EPDRolloutRunner
    steps: int
    start_images: float = 0.0  # what the start table cost, in images
    step: int = 0
    curve: list[list[float]] = field(default_factory=list)  # [images, reward, held-out reward]
    scores: Tensor | None = None  # [M, 2] of the last evaluation
    table: SolverTable | None = None  # that it judged
    failure: str | None = None
    seconds: float = 0.0  # its share of the time that all runs took

    @property
    def images(self) -> int:
        return self.step * self.runner.batch_size

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.step >= self.steps

    def is_marked(self) -> bool:
        """Whether the mean table is to be evaluated after this step."""
        before = self.images - self.runner.batch_size
        return self.step in (0, self.steps) or any(before < mark <= self.images for mark in MARKS)


class BatchScorer:
    """`ImageScorer` for batches of any size, in pieces of at most `chunk` images, `gradient_chunk` with gradients."""

    def __init__(self, scorer: ImageScorer, chunk: int, gradient_chunk: int):
        self.scorer, self.chunk, self.gradient_chunk = scorer, chunk, gradient_chunk
        self.images = 0  # made so far

    def scores(self, tables: TableArrays, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """`[B, R]`: every reward of the scorer for the B tables, prompts and noises."""
        parts = []
        for rows in _pieces(len(prompts), self.chunk):
            images = self.scorer.images(_select(tables, rows), prompts[rows], seeds[rows])
            parts.append(self.scorer.scores(images, prompts[rows]))
            self.images += len(images)
        return torch.cat(parts)

    def gradients(
        self, tables: TableArrays, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[Tensor, TableArrays]:
        """`[B]` scores of the mix's one reward, and their gradients `[B, N-1, K]`."""
        scores, gradients = [], []
        for rows in _pieces(len(prompts), self.gradient_chunk):
            part, slopes = self.scorer.gradients(_select(tables, rows), prompts[rows], seeds[rows])
            scores.append(part[:, 0])
            gradients.append(slopes)
            self.images += len(part)
        return torch.cat(scores), TableArrays(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))


def _pieces(count: int, size: int) -> list[slice]:
    """`count` rows in as few pieces of about equal length as a limit of `size` allows."""
    pieces = math.ceil(count / size)
    bounds = [count * i // pieces for i in range(pieces + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


def _select(tables: TableArrays, rows: slice) -> TableArrays:
    return TableArrays(*(part[rows] for part in tables))


def join_draws(draws: Sequence[Draw]) -> tuple[TableArrays, list[str], list[int]]:
    """Tables, prompts and noise seeds of several draws, one behind the other."""
    tables = TableArrays(*(torch.cat(parts) for parts in zip(*(draw.sample.arrays for draw in draws), strict=True)))
    prompts = [prompt for draw in draws for prompt in draw.prompts]
    return tables, prompts, [seed for draw in draws for seed in draw.noise_seeds]


def roll_out(draws: Sequence[Draw], scorer: BatchScorer, with_gradients: bool) -> list[Rollout | UserError]:
    """The rollouts of several draws, made as one batch; those with a reward that is not a number give an error."""
    judges = scorer.scorer.rewards[:1]
    outcomes: list[Rollout | UserError] = []
    for rollout in _roll_out_together(draws, scorer, with_gradients):
        broken = not rollout.rewards.isfinite().all()
        prompts = rollout.draw.prompts
        outcomes.append(UserError(first_broken(rollout.rewards[:, None], judges, prompts)) if broken else rollout)
    return outcomes


def _roll_out_together(draws: Sequence[Draw], scorer: BatchScorer, with_gradients: bool) -> list[Rollout]:
    joined, sizes = join_draws(draws), [len(draw.prompts) for draw in draws]
    if not with_gradients:
        rewards = scorer.scores(*joined)[:, 0].split(sizes)
        return [Rollout(draw, part) for draw, part in zip(draws, rewards, strict=True)]
    rewards, gradients = scorer.gradients(*joined)
    slopes = zip(*(part.split(sizes) for part in gradients), strict=True)
    parts = zip(draws, rewards.split(sizes), slopes, strict=True)
    return [Rollout(draw, reward, TableArrays(*slope)) for draw, reward, slope in parts]


class Judge:
    """The held-out evaluation of tables: always the same prompts and noises."""

    def __init__(self, scorer: BatchScorer, prompts: Sequence[str], seeds: Sequence[int]):
        """`scorer` has the trained reward and the held-out one."""
        self.scorer, self.prompts, self.seeds = scorer, list(prompts), list(seeds)

    def scores(self, tables: Sequence[SolverTable]) -> list[Tensor | UserError]:
        """`[M, 2]` of each table, or why it has none."""
        count = len(self.prompts)
        arrays = TableArrays(
            *(
                torch.stack([getattr(table, name) for table in tables]).repeat_interleave(count, dim=0)
                for name in TableArrays._fields
            )
        )
        try:
            scores = self.scorer.scores(arrays, self.prompts * len(tables), self.seeds * len(tables))
        except UserError as error:
            return [error] if len(tables) == 1 else [self.scores([table])[0] for table in tables]
        return list(scores.split(count))


class Lockstep:
    """Advances runs of one setting together. `progress(images)` hears of every image made, training or evaluation."""

    def __init__(self, scorer: BatchScorer, judge: Judge, progress: Callable[[int], None]):
        self.scorer, self.judge, self.progress = scorer, judge, progress
        self.waiting: list[tuple[Run, int, SolverTable]] = []  # evaluations to be made: run, images, table

    def run(self, runs: Sequence[Run]) -> None:
        """To the end of all of them."""
        started = time.perf_counter()
        for run in runs:
            self._evaluate_later(run)
        while active := [run for run in runs if not run.is_over]:
            for with_gradients in (False, True):
                self._advance([run for run in active if run.learner.needs_gradients == with_gradients], with_gradients)
        self._evaluate()
        for run in runs:
            run.seconds = (time.perf_counter() - started) / len(runs)

    def _advance(self, runs: Sequence[Run], with_gradients: bool) -> None:
        """One step of each."""
        if not runs:
            return
        draws = [run.learner.draw(run.runner, run.step + 1) for run in runs]
        for run, outcome in zip(runs, roll_out(draws, self.scorer, with_gradients), strict=True):
            self._learn(run, outcome)
        self.progress(sum(len(draw.prompts) for draw in draws))

    def _learn(self, run: Run, outcome: Rollout | UserError) -> None:
        if isinstance(outcome, UserError):
            run.failure = str(outcome)
            return
        run.step += 1
        try:
            run.learner.update(run.step, outcome)
        except (RuntimeError, ValueError) as error:  # a gradient or a policy that is no number, which ends a real run
            run.failure = " ".join(str(error).split())[:200]
            return
        if run.is_marked():
            self._evaluate_later(run)

    def _evaluate_later(self, run: Run) -> None:
        self.waiting.append((run, run.images, run.mean_table()))
        if len(self.waiting) * len(self.judge.prompts) >= self.scorer.chunk:
            self._evaluate()

    def _evaluate(self) -> None:
        """Judge the tables that wait, all in one batch."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        found = self.judge.scores([table for _, _, table in waiting])
        for (run, images, table), scores in zip(waiting, found, strict=True):
            if isinstance(scores, UserError):
                run.failure = run.failure or str(scores)
                continue
            run.curve.append([images, *scores.mean(0).tolist()])
            run.scores, run.table = scores, table
        self.progress(len(waiting) * len(self.judge.prompts))


def crews(runs: Sequence[Run], chunk: int, gradient_chunk: int) -> Iterator[list[Run]]:
    """The runs in groups that fill a network batch, those alike in length together, so that none waits half empty."""
    ordered = sorted(runs, key=lambda run: (run.learner.needs_gradients, run.steps, run.runner.batch_size))
    crew: list[Run] = []
    for run in ordered:
        limit = gradient_chunk if run.learner.needs_gradients else chunk
        size = sum(other.runner.batch_size for other in crew) + run.runner.batch_size
        alike = crew and (crew[0].learner.needs_gradients, crew[0].steps) == (run.learner.needs_gradients, run.steps)
        if crew and (not alike or size > limit):
            yield crew
            crew = []
        crew.append(run)
    if crew:
        yield crew


def images_of(run: Run, eval_prompts: int) -> int:
    """Images that a run makes in all, to tell the time left."""
    marks = sum(mark <= run.steps * run.runner.batch_size for mark in MARKS)
    return run.steps * run.runner.batch_size + (2 + marks) * eval_prompts


class Progress:
    """Lines with the time left."""

    def __init__(self, title: str, total: int, say: Callable[[str], None]):
        self.title, self.total, self.say = title, total, say
        self.done = 0
        self.started = self.said = time.perf_counter()

    def __call__(self, images: int) -> None:
        self.done += images
        now = time.perf_counter()
        if now - self.said < SHOW_EVERY:
            return
        self.said = now
        rate = self.done / (now - self.started)
        left = tqdm.format_interval(max(self.total - self.done, 0) / rate)
        self.say(f"{self.title}: {self.done} of {self.total} images, {rate:.0f} images/s, {left} left")


def run_row(run: Run) -> dict:
    """What is kept of a run that is over."""
    return {
        "line": run.line.label,
        "algorithm": run.line.algorithm,
        "start": run.line.start,
        "seed": run.seed,
        "steps": run.steps,
        "images_per_step": run.runner.batch_size,
        "start_images": run.start_images,
        "curve": [[images, round(reward, DIGITS), round(other, DIGITS)] for images, reward, other in run.curve],
        "scores": score_lists(run.scores),
        "table": None if run.table is None else table_lists(run.table),
        "seconds": round(run.seconds, 2),
        "failure": run.failure,
    }


def score_lists(scores: Tensor | None) -> dict[str, list[float]] | None:
    """`[M, 2]` as lists by metric."""
    if scores is None:
        return None
    columns = [[round(value, DIGITS) for value in column] for column in scores.T.tolist()]
    return dict(zip(("reward", "heldout"), columns, strict=True))


def table_lists(table: SolverTable) -> dict[str, list]:
    return {name: getattr(table, name).tolist() for name in TableArrays._fields}
