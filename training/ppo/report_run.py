"""What a run folder holds, for its report: read with limits, and with whatever is missing left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_utils.checkpoint import CheckpointError
from torch_utils.untrusted import bounded_lines, parse_json
from training.ppo.config import Config
from training.ppo.export_epd_predictor import checkpoint_table, find_checkpoint
from training.ppo.run_dir import RunDirectory, RunError
from training.solver_table import SolverTable

MOST_LINES = 200_000  # of a log that are read
LARGEST = 1e100  # a number in a log; larger ones cannot be drawn
SAMPLE_NAME = re.compile(r"step(\d{6,12})\.png")


@dataclass(frozen=True)
class Log:
    """The lines of a metrics.jsonl or evaluation.jsonl in order of step, and how many could not be read."""

    file: str  # relative to the run folder
    records: list[dict[str, Any]]  # "step" is an int >= 0, other values are finite numbers or bools
    unread: int

    def having(self, key: str) -> list[dict[str, Any]]:
        """The records with a value for `key`."""
        return [record for record in self.records if key in record]


@dataclass(frozen=True)
class Learned:
    """The table that an export of the run gives."""

    file: str  # of the checkpoint, relative to the run folder
    step: int
    table: SolverTable


@dataclass(frozen=True)
class Run:
    """What is known of a run."""

    path: Path
    config: Config
    start: SolverTable
    metrics: Log
    evaluations: Log
    learned: Learned | None
    problem: str | None  # why `learned` is None
    samples: dict[int, Path]  # step -> picture, rising

    @property
    def steps_done(self) -> int:
        """By the last line of metrics.jsonl."""
        return self.metrics.records[-1]["step"] if self.metrics.records else 0


def read_run(path: Path) -> Run:
    """Raises `RunError`, or a `UserError` of what reads them, where the configuration or the start table is missing or
    cannot be read; anything else may be missing."""
    directory = RunDirectory(path)
    config, start = directory.read()
    learned, problem = None, None
    try:
        file = find_checkpoint(directory, None)
        learned = Learned(str(file.relative_to(path)), *checkpoint_table(config, start, file))
    except (RunError, CheckpointError) as error:
        problem = str(error)
    found = (SAMPLE_NAME.fullmatch(file.name) for file in (path / "samples").glob("step*.png"))
    steps = sorted(int(match[1]) for match in found if match)
    return Run(
        path=path,
        config=config,
        start=start,
        metrics=read_log(path, directory.metrics),
        evaluations=read_log(path, directory.evaluations),
        learned=learned,
        problem=problem,
        samples={step: directory.sample_grid(step) for step in steps},
    )


def read_log(folder: Path, path: Path) -> Log:
    """The log `path` below `folder`; empty where there is none. Of lines of the same step the last counts."""
    records, unread = {}, 0
    if path.is_file():
        for record in _parsed(path):
            if record is None:
                unread += 1
            else:
                records[record["step"]] = record
    return Log(str(path.relative_to(folder)), [records[step] for step in sorted(records)], unread)


def _parsed(path: Path) -> Iterator[dict[str, Any] | None]:
    for line in itertools.islice(bounded_lines(path), MOST_LINES):
        try:
            record = parse_json(line)
        except ValueError:  # torn by a crash, or being written just now
            yield None
            continue
        fits = isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 10**12
        fits = fits and all(isinstance(v, bool | int | float) and abs(v) < LARGEST for v in record.values())
        yield record if fits else None
