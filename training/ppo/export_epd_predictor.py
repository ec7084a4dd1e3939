"""Turn a policy checkpoint into the table that `sample.py` reads. Needs no backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_utils.errors import user_errors
from torch_utils.options import command

if TYPE_CHECKING:
    from training.ppo.config import Config
    from training.ppo.run_dir import RunDirectory
    from training.solver_table import SolverTable


def export_predictor(run_dir: Path, checkpoint: Path | None = None) -> Path:
    """Write the mean table of a checkpoint below `run_dir/export/` and return the path of the `.pkl`.

    Three files: `network-snapshot-export-stepNNNNNN.pkl` (float32, what the published samplers read), the same name
    with `.safetensors` (every bit), and `training_options.json`. `checkpoint` is a path, or one relative to `run_dir`;
    None takes `policy-best.pt`, else the latest. Raises `RunError`, `CheckpointError` or `TableError`.
    """
    from torch_utils.checkpoint import atomic_write_text
    from training.ppo.config import flatten
    from training.ppo.run_dir import RunDirectory
    from training.table import save_table

    directory = RunDirectory(run_dir)
    config, start = directory.read()
    path = find_checkpoint(directory, checkpoint)
    step, table = checkpoint_table(config, start, path)
    snapshot = directory.export / f"network-snapshot-export-step{step:06d}.pkl"
    save_table(table, snapshot)  # first: it can refuse scales that its format does not hold
    save_table(table, snapshot.with_suffix(".safetensors"))
    options = {
        "snapshot": snapshot.name,
        "table_sha256": table.sha256(),
        "start_table_sha256": start.sha256(),
        "checkpoint": path.name,
        "step": step,
        "config": flatten(config),
        **table.to_dict(),
    }
    atomic_write_text(directory.export / "training_options.json", json.dumps(options, indent=2, allow_nan=False) + "\n")
    return snapshot


def checkpoint_table(config: Config, start: SolverTable, path: Path) -> tuple[int, SolverTable]:
    """The step of the checkpoint `path` of a run from `start`, and its mean table. Raises `CheckpointError`."""
    from dataclasses import replace

    from training.ppo.policy import create_policy
    from training.ppo.run_dir import restore_policy

    policy = create_policy(config, start)
    state = restore_policy(policy, path)
    table = policy.mean_table()
    # A trained scale may leave the range that the start table declared for its .pkl; 0 stands for the widest.
    if config.ppo.train_scale_dir:
        table = replace(table, scale_dir_range=0.0)
    if config.ppo.train_scale_time:
        table = replace(table, scale_time_range=0.0)
    return state["step"], table


def find_checkpoint(directory: RunDirectory, checkpoint: Path | None) -> Path:
    """The checkpoint file that `export_predictor` means. Raises `RunError` where there is none."""
    from training.ppo.run_dir import RunError

    if checkpoint is not None:
        for path in (directory.path / checkpoint, checkpoint):
            if path.is_file():
                return path
        raise RunError(f"checkpoint {checkpoint} is neither in {directory.path} nor in the working directory")
    if directory.best_checkpoint.is_file():
        return directory.best_checkpoint
    latest = directory.latest_checkpoint()
    if latest is None:
        raise RunError(f"{directory.path} has no checkpoint to export; let the run reach logging.save_interval steps")
    return latest


@command({"Table": ("checkpoint",)})
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    help="Policy checkpoint, relative to RUN_DIR",
    metavar="FILE",
    type=click.Path(path_type=Path),
    show_default="policy-best.pt, else the latest",
)
@user_errors
def main(run_dir: Path, checkpoint: Path | None) -> None:
    """Export the mean table of a PPO run into RUN_DIR/export: .pkl, .safetensors and training_options.json.

    The path of the .pkl goes to stdout. Example (installed: epd-export):

    \b
    python -m training.ppo.export_epd_predictor exps/<run> --checkpoint checkpoints/policy-step000070.pt
    """
    click.echo(export_predictor(run_dir, checkpoint))


if __name__ == "__main__":
    main()
