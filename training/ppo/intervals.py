"""Means and their 95 % confidence intervals, in plain Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """`count mean std min max ci95` of the values; std has n - 1 in the denominator.

    `ci95` is `[low, high]`, the 95 % confidence interval of the mean by Student's t: mean -+ t(0.975, n - 1) *
    std / sqrt(n). For n = 1 there is no std and no interval (None).
    """
    n, mean = len(values), statistics.fmean(values)
    std = statistics.stdev(values) if n > 1 else None
    half = student_t(n - 1) * std / math.sqrt(n) if std is not None else None
    ci95 = [mean - half, mean + half] if half is not None else None
    return {"count": n, "mean": mean, "std": std, "min": min(values), "max": max(values), "ci95": ci95}


def student_t(degrees: int) -> float:
    """The 0.975 quantile of Student's t with `degrees` >= 1 degrees of freedom (12.706 for 1, 1.96 for many).

    Bisection on the closed form of P(|T| < t) for whole degrees: Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even).
    """

    def two_sided(t: float) -> float:
        theta = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        # The terms are cos(theta), 2/3 cos^3, 2*4/(3*5) cos^5, ... or 1, 1/2 cos^2, 1*3/(2*4) cos^4, ...
        term, total = (math.cos(theta) if odd else 1.0), 0.0
        for k in range(degrees // 2):
            total += term
            term *= math.cos(theta) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, 13.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle) < 0.95 else (low, middle)
    return (low + high) / 2
