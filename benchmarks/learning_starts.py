"""The start tables that runs are compared from, and what they cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.learning_lines import Line, Setting, run_config
from torch_utils.seeds import derive_seed
from training.denoisers import Denoiser
from training.distill import distill
from training.ppo.config import Config
from training.ppo.inputs import split_prompts, start_table
from training.ppo.rl_runner import PromptOrder
from training.table import SolverTable

DISTILL_ROWS = 1024  # of a network call


@dataclass(frozen=True)
class Start:
    """A start table."""

    table: SolverTable
    images: float  # what it cost: network rows / the rows of one image made with it
    seconds: float
    errors: list[float] | None = None  # of a distillation, by interval


def optimal_rows(num_points: int) -> tuple[list[float], list[float]]:
    """Positions and weights of second-order placement: Gauss-Legendre on (0, 1), so that sum w r = 1/2."""
    nodes, weights = np.polynomial.legendre.leggauss(num_points)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


class StartTables:
    """Start tables of one setting by name and seed, each made once.

    cold: `cold_start_table`. optimal: `optimal_rows` in every interval. distilled: `training.distill` at its defaults,
    with prompts and noises of the seed; "distilled, no scale" with all scales 1; "distilled, <teacher>" with another
    teacher.
    """

    def __init__(self, setting: Setting, net: Denoiser, eval_prompts: int):
        self.setting, self.net, self.eval_prompts = setting, net, eval_prompts
        self.made: dict[tuple[str, int], Start] = {}

    def get(self, name: str, seed: int) -> Start:
        kind, _, other = name.partition(", ")
        key = name, seed if kind == "distilled" else 0
        if key not in self.made:
            overrides = ()
            if other:
                overrides = ("distill.fit_scale=false",) if other == "no scale" else (f"distill.teacher={other}",)
            config = run_config(self.setting, Line("start", overrides=overrides), seed, 1024, self.eval_prompts)
            cold = start_table(config)
            if kind == "distilled":
                self.made[key] = self._distill(config, cold)
            elif kind == "optimal":
                rows = (torch.tensor(row, dtype=torch.float64) for row in optimal_rows(cold.num_points))
                positions, weights = (row.expand_as(cold.positions) for row in rows)
                self.made[key] = Start(replace(cold, positions=positions, weights=weights), 0.0, 0.0)
            else:
                self.made[key] = Start(cold, 0.0, 0.0)
        return self.made[key]

    def _distill(self, config: Config, cold: SolverTable) -> Start:
        training, _ = split_prompts(config)
        prompts = PromptOrder(list(dict.fromkeys(training)), config.run.seed).take(1, config.distill.prompts)
        seeds = [derive_seed(config.run.seed, "distill-noise", index) for index in range(len(prompts))]
        rows, started = self.net.rows, time.perf_counter()
        found = distill(self.net, cold, prompts, seeds, replace(config.distill, max_rows=DISTILL_ROWS))
        per_image = cold.positions.shape[0] * (1 + cold.num_points)
        images = (self.net.rows - rows) / per_image
        return Start(found.table, images, time.perf_counter() - started, found.errors)


def made_for(setting: Setting, guidance: float, intervals: int) -> Setting:
    """The setting under another condition."""
    return replace(setting, guidance=guidance, num_steps=intervals + 1)


def stretch(table: SolverTable, intervals: int) -> SolverTable:
    """The table for another number of intervals: rows interpolated linearly along the interval's index."""
    places = torch.linspace(0, len(table.positions) - 1, intervals, dtype=torch.float64)
    if intervals == 1:
        places = torch.full((1,), (len(table.positions) - 1) / 2, dtype=torch.float64)
    low = places.floor().long()
    high = (low + 1).clamp(max=len(table.positions) - 1)
    share = (places - low)[:, None]
    arrays = {
        name: (1 - share) * part[low] + share * part[high]
        for name, part in (
            ("positions", table.positions),
            ("weights", table.weights),
            ("scale_dir", table.scale_dir),
            ("scale_time", table.scale_time),
        )
    }
    return replace(table, **arrays, num_steps=intervals + 1)
