"""What a measured curve says: images until a share of the gap is closed, and the summaries over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from training.ppo.intervals import summarize

FAILED_SHARE = 0.1
TRAINED_PARTS = ("curves", "schedules", "variants", "starts", "robustness")


@dataclass(frozen=True)
class Gap:
    """What there is to gain in a setting: from the cold start table to the best mean table that any run found."""

    cold: float
    best: float

    def target(self, share: float) -> float:
        """The reward at which `share` of the gap is closed."""
        return self.cold + share * (self.best - self.cold)

    def open_share(self, reward: float) -> float:
        """The share of the gap that `reward` leaves open."""
        return (self.best - reward) / (self.best - self.cold)


def parts_of(parts: Mapping[str, Mapping], setting: str, names: Sequence[str] = TRAINED_PARTS) -> dict[str, Mapping]:
    """Part name without the setting -> the part, of those that were measured in `setting`."""
    return {name: parts[f"{name}_{setting}"] for name in names if f"{name}_{setting}" in parts}


def find_gap(parts: Mapping[str, Mapping], setting: str) -> Gap | None:
    """The gap of a setting over all its parts; None where nothing was trained, or nothing better was found."""
    found = parts_of(parts, setting)
    rewards = [point[1] for part in found.values() for row in part["rows"] for point in row["curve"]]
    colds = [part["references"]["cold"]["reward"] for part in found.values() if "cold" in part["references"]]
    if not colds or not rewards or max(rewards) <= colds[0]:
        return None
    return Gap(colds[0], max(rewards))


def shifted(row: Mapping) -> list[tuple[float, float, float]]:
    """The curve `(images, reward, held-out reward)`, what the start table cost counted as images."""
    return [(images + row["start_images"], reward, heldout) for images, reward, heldout in row["curve"]]


def images_to_reach(curve: Sequence[Sequence[float]], target: float) -> float:
    """Images after which the reward first reaches `target`, linear between evaluations; infinite if it never does."""
    if not curve:
        return math.inf
    if curve[0][1] >= target:
        return curve[0][0]
    for before, after in pairwise(curve):
        if after[1] >= target:
            return before[0] + (after[0] - before[0]) * (target - before[1]) / (after[1] - before[1])
    return math.inf


def reached(rows: Sequence[Mapping], target: float) -> tuple[float, float, float] | None:
    """(median, least, most) images over the runs to reach `target`; None where fewer than half of them do.

    A run that never does counts as infinite; of an even number of runs the lower middle one is the median.
    """
    images = [images_to_reach(shifted(row), target) for row in rows]
    median = statistics.median_low(images)
    return None if math.isinf(median) else (median, min(images), max(images))


def by_line(rows: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """(line, start) -> its runs, in the order in which they were first measured."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        found.setdefault((row["line"], row["start"]), []).append(row)
    return found


def finals(rows: Sequence[Mapping], column: int = 1) -> list[float]:
    """The last reward (column 1) or held-out reward (2) of the runs that have one."""
    return [row["curve"][-1][column] for row in rows if row["curve"]]


def failed(rows: Sequence[Mapping], gap: Gap) -> int:
    """Runs that broke off, or ended with more than FAILED_SHARE of the gap open."""
    return sum(
        row["failure"] is not None or not row["curve"] or gap.open_share(row["curve"][-1][1]) > FAILED_SHARE
        for row in rows
    )


def paired(scores: Sequence[Sequence[float]], reference: Sequence[float]) -> dict:
    """Summary over prompts of (mean over runs of `scores`) - `reference`."""
    means = [statistics.fmean(values) for values in zip(*scores, strict=True)]
    return summarize([mean - other for mean, other in zip(means, reference, strict=True)])


def paired_runs(rows: Sequence[Mapping], reference: Mapping | None, metric: str) -> dict | None:
    """`paired` of the runs' final tables against a row of the part "references"; None without one."""
    scores = [row["scores"][metric] for row in rows if row["scores"]]
    if reference is None or not scores or len(scores[0]) != len(reference["scores"][metric]):
        return None
    return paired(scores, reference["scores"][metric])


def find_reference(parts: Mapping[str, Mapping], setting: str, solver: str = "ddim", calls: int = 50) -> Mapping | None:
    """The row of a baseline."""
    rows = parts.get(f"references_{setting}", {"rows": []})["rows"]
    return next((row for row in rows if (row["solver"], row["calls"]) == (solver, calls)), None)
