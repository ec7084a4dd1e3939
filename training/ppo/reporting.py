"""What a run shows and writes down while it goes: metric lines, boards, progress, picture grids."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write_text
from torch_utils.untrusted import no_link, parse_json
from training.images import save_png
from training.ppo.boards import create_boards, sample_grid
from training.ppo.config import Config
from training.ppo.run_dir import RunDirectory


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append `record` as one line of strict JSON. Raises `ValueError` for NaN and infinity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", opener=no_link) as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines whose "step" is at most `step`: what a resumed run will write again goes, torn lines too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if parse_json(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    atomic_write_text(path, "".join(kept))


class Reporter:
    """The log files and the progress display of one run; only rank 0 has one."""

    def __init__(self, directory: RunDirectory, config: Config, step: int, evaluation_steps: Collection[int]):
        """`step` is the last finished one: what the logs hold beyond it is dropped."""
        self.directory = directory
        self.log_interval = config.logging.log_interval
        for path in (directory.metrics, directory.evaluations):
            drop_lines_after(path, step)
        self.boards = create_boards(directory, config, step)
        self.progress = Progress(config.ppo.steps, step, evaluation_steps)

    def log_step(self, metrics: dict[str, Any]) -> None:
        """Write the line of a step; every `log_interval` steps also to the boards and to the terminal."""
        append_line(self.directory.metrics, metrics)
        self.progress.seconds["step"].append(metrics["seconds_step"])
        if metrics["step"] % self.log_interval == 0:
            self._to_boards("train", metrics)
            self.progress.show(metrics)

    def log_evaluation(self, record: dict[str, Any], images: torch.Tensor) -> None:
        """Write an evaluation and, unless `images` `[M, 3, H, W]` is empty, the grid of its pictures."""
        append_line(self.directory.evaluations, record)
        self.progress.seconds["evaluation"].append(record["seconds"])
        self._to_boards("evaluation", record)
        if len(images):
            grid = sample_grid(images)
            save_png(grid, self.directory.sample_grid(record["step"]))
            for board in self.boards:
                board.add_picture("evaluation/samples", grid, record["step"])
        means = ", ".join(f"{key.removesuffix('_mean')} {value:.4f}" for key, value in record.items() if "_mean" in key)
        self.progress.message(f"step {record['step']}: mean table on {record['prompts']} held-out prompts: {means}")

    def _to_boards(self, group: str, record: dict[str, Any]) -> None:
        values = {f"{group}/{key}": value for key, value in record.items() if key != "step"}
        for board in self.boards:
            board.add_values(values, record["step"])

    def close(self) -> None:
        """Flush and close what is open."""
        self.progress.close()
        for board in self.boards:
            board.close()


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; on stderr."""

    def __init__(self, steps: int, done: int, evaluation_steps: Collection[int]):
        self.steps, self.evaluation_steps = steps, evaluation_steps
        self.seconds: dict[str, list[float]] = {"step": [], "evaluation": []}  # what each took so far
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, file=sys.stderr, bar_format="{bar} {n_fmt}/{total_fmt}{postfix}")

    def show(self, metrics: dict[str, Any]) -> None:
        """Show a step's reward, KL and speed, and the time left."""
        step = metrics["step"]
        learned = "nothing learned, no score is a number"
        if "reward_mean" in metrics:
            learned = f"reward {metrics['reward_mean']:.4f}, kl {metrics['kl']:.3f}"
        left = tqdm.format_interval(self.seconds_left(step))
        text = f"{learned}, {metrics['images_per_second']:.1f} images/s, {left} left"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        print(f"step {step}/{self.steps}: {text}", file=sys.stderr, flush=True)

    def seconds_left(self, step: int) -> float:
        """After `step`: for the steps and evaluations to come, at the mean of those so far."""
        coming = {"step": self.steps - step, "evaluation": sum(other > step for other in self.evaluation_steps)}
        return sum(count * fmean(self.seconds[kind]) for kind, count in coming.items() if self.seconds[kind])

    def message(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
