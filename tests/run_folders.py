"""What tests ask of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from torch_utils.checkpoint import load_checkpoint
from training.ppo.run_dir import RunDirectory


def only_run(root: Path, runs: str = "exps") -> RunDirectory:
    """The run in the folder `runs` of `root`, of which there must be one."""
    (folder,) = (root / runs).iterdir()
    return RunDirectory(folder)


def lines(path: Path) -> list[dict]:
    """The records of a .jsonl file, which must be strict JSON: no NaN or Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def without_timings(path: Path) -> list[dict]:
    return [{key: value for key, value in record.items() if "second" not in key} for record in lines(path)]


def assert_same_logs(ours: RunDirectory, theirs: RunDirectory) -> None:
    """Metrics and, where there are some, evaluations; but for timings."""
    logs, expected = (
        {path.name: without_timings(path) for path in run.metrics.parent.glob("*.jsonl")} for run in (ours, theirs)
    )
    assert ours.metrics.name in logs and logs == expected


def assert_same_end(ours: RunDirectory, theirs: RunDirectory, step: int) -> None:
    """Weights at `step` and everything logged, bit for bit, but for timings."""
    policy, expected = (load_checkpoint(run.checkpoint(step))["policy"] for run in (ours, theirs))
    assert expected
    torch.testing.assert_close(policy, expected, rtol=0, atol=0)
    assert_same_logs(ours, theirs)
