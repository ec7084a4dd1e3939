"""The folder of one run: its layout, how it is made, found again, locked and read."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_utils import distributed
from torch_utils.checkpoint import (
    CheckpointError,
    atomic_write_text,
    load_checkpoint,
    lock_folder,
    lock_holder,
    read_intact,
    record_path,
    sweep_leftovers,
)
from torch_utils.errors import UserError
from training.ppo.config import CheckpointsConfig, Config, differences, flatten, load_config, to_yaml
from training.ppo.policy import EPDParamPolicy
from training.table import SolverTable, load_table, save_table

# What may change when a run is resumed by name: how long it runs, how often it reports, where and how fast.
FREE_KEYS = re.compile(
    r"ppo\.steps|logging\..*|run\.(output_root|timeout_minutes)|model\.model_path|reward\.(weights_path|batch_size)|ppo\.rollout_micro_batch"
    r"|ppo\.max_(dropped_groups|skipped_updates)|checkpoints\..*"
    r"|evaluation\.on_divergence|distill\..*"
    # The start table is compared by content.
    r"|data\.predictor_snapshot|model\.num_(steps|points)"
)
CHECKPOINT_KEYS = {
    *("step", "policy", "optimizer", "guard", "start_table_sha256", "config", "config_sha256"),
    *("dropped_groups", "skipped_updates", "mix", "evaluation_mix"),
}
CHECKPOINT_NAME = re.compile(r"policy-step(\d{6,})\.pt")


class RunError(UserError):
    """A run folder that is missing, incomplete, in use, or of another configuration."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths below `exps/<timestamp>-<run_name>/`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "configs" / "resolved_config.yaml"

    @property
    def start_table(self) -> Path:
        """A bit-exact copy of the table that the run started from: the policy is defined around it."""
        return self.path / "configs" / "start_table.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "logs" / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "logs" / "evaluation.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "logs" / "tensorboard"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "policy-best.pt"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"policy-step{step:06d}.pt"

    def sample_grid(self, step: int) -> Path:
        return self.path / "samples" / f"step{step:06d}.png"

    def checkpoint_steps(self) -> list[int]:
        """The steps of which there is a checkpoint, by name, rising."""
        matches = (CHECKPOINT_NAME.fullmatch(file.name) for file in (self.path / "checkpoints").glob("policy-step*.pt"))
        return sorted(int(match[1]) for match in matches if match)

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step, by name; None where there is none."""
        steps = self.checkpoint_steps()
        return self.checkpoint(steps[-1]) if steps else None

    def latest_intact_checkpoint(self) -> Path | None:
        """The newest checkpoint whose bytes match its record; a line on stderr names those that do not."""
        for step in reversed(self.checkpoint_steps()):
            try:
                read_intact(self.checkpoint(step))
            except CheckpointError as error:
                distributed.print0(f"note: {error}; trying the one before")
            else:
                return self.checkpoint(step)
        return None

    def prune_checkpoints(self, keep: CheckpointsConfig) -> None:
        """Remove all but the newest `keep.keep_last` and those of every `keep.keep_every`-th step."""
        if keep.keep_last is None:
            return
        for step in self.checkpoint_steps()[: -keep.keep_last]:
            if keep.keep_every is None or step % keep.keep_every:
                # The record goes last: a checkpoint without one would look damaged.
                for path in (self.checkpoint(step), record_path(self.checkpoint(step))):
                    path.unlink(missing_ok=True)

    def write(self, config: Config, start: SolverTable) -> None:
        """Write the resolved configuration and the start table, making the folders. Raises `UserError`s."""
        save_table(start, self.start_table)
        resolved = copy.deepcopy(config)
        resolved.data.predictor_snapshot = config.data.predictor_snapshot or str(self.start_table)
        resolved.model.num_steps, resolved.model.num_points = start.num_steps, start.num_points
        try:
            atomic_write_text(self.config, to_yaml(resolved))
        except OSError as error:
            raise RunError(f"{self.config} cannot be written: {error.strerror}") from error

    def read(self) -> tuple[Config, SolverTable]:
        """The configuration and the start table of an existing run. Raises `RunError` where either is missing."""
        for file in (self.config, self.start_table):
            if not file.is_file():
                raise RunError(f"{self.path} is not a run folder: it has no {file.relative_to(self.path)}")
        return load_config(self.config), load_table(self.start_table)


@contextlib.contextmanager
def open_run(config: Config, start: SolverTable, resume: str) -> Iterator[tuple[RunDirectory, Path | None]]:
    """Make a run folder, or find the one to continue, and keep other processes out of it while the block runs.

    Gives, on every rank, the folder and the checkpoint to go on from (None: start at the beginning). `resume` is
    "never", "auto", or a run folder. "auto" continues the newest folder of the same name with the same start table and
    a configuration that differs in FREE_KEYS at most, but not in `ppo.steps`, which has an intact checkpoint (damaged
    ones are named on stderr) and which no other process is using; where that run is finished, nothing is left to do.
    Raises `RunError`, or `CheckpointError` where the newest checkpoint of a named folder is damaged.
    """
    with contextlib.ExitStack() as locks:

        def choose() -> tuple[RunDirectory, Path | None]:
            if resume not in ("never", "auto"):
                return _continue_named(config, start, RunDirectory(Path(resume)), locks)
            found = _find_equal(config, start, locks) if resume == "auto" else None
            return found or (_create(config, start, locks), None)

        yield distributed.on_main(choose)


def _continue_named(
    config: Config, start: SolverTable, directory: RunDirectory, locks: contextlib.ExitStack
) -> tuple[RunDirectory, Path]:
    differing = _changed_keys(directory, config, start)
    changed = [key for key in differing if not FREE_KEYS.fullmatch(key)]
    if changed:
        raise RunError(
            f"{directory.path} was run with other values of {', '.join(changed)}; use the same, or --resume never"
        )
    checkpoint = directory.latest_checkpoint()
    if checkpoint is None:
        raise RunError(f"{directory.path} has no checkpoint to resume from; use --resume never")
    if not lock_folder(directory.path, locks):
        holder = lock_holder(directory.path)
        raise RunError(f"{directory.path} is in use by {holder}; wait for it, or use --resume never")
    _check_named(directory, checkpoint)
    sweep_leftovers(directory.path)
    if differing:
        directory.write(config, start)
    return directory, checkpoint


def _check_named(directory: RunDirectory, checkpoint: Path) -> None:
    """Raise `CheckpointError` where the newest checkpoint is damaged, with the way to go on from an older one."""
    try:
        read_intact(checkpoint)
    except CheckpointError as error:
        older = directory.latest_intact_checkpoint()
        way = "no other is intact" if older is None else f"to go on from {older.name}, move the damaged ones away"
        raise CheckpointError(f"{error}; {way}") from error


def _create(config: Config, start: SolverTable, locks: contextlib.ExitStack) -> RunDirectory:
    root = Path(config.run.output_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            directory = RunDirectory(root / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.run.run_name}")
            try:
                directory.path.mkdir()
                break
            except FileExistsError:
                time.sleep(0.2)  # another run began in this second; the next one has a name of its own
    except OSError as error:
        raise RunError(f"cannot make a run folder in {root} (run.output_root): {error.strerror}") from error
    lock_folder(directory.path, locks)
    directory.write(config, start)
    return directory


def _find_equal(config: Config, start: SolverTable, locks: contextlib.ExitStack) -> tuple[RunDirectory, Path] | None:
    name = re.compile(r"\d{8}-\d{6}-" + re.escape(config.run.run_name))
    root = Path(config.run.output_root)
    for path in sorted(root.glob("*") if root.is_dir() else (), reverse=True):
        directory = RunDirectory(path)
        if not name.fullmatch(path.name) or not directory.checkpoint_steps():
            continue
        try:
            differing = _changed_keys(directory, config, start)
            # Another number of steps would end a run early or bend its learning rate: that is asked for by name.
            equal = all(FREE_KEYS.fullmatch(key) and key != "ppo.steps" for key in differing)
            if not equal or not lock_folder(directory.path, locks):
                continue
        except UserError:
            continue  # of another version, incomplete, or another user's: not a run that can be continued
        checkpoint = directory.latest_intact_checkpoint()
        if checkpoint is None:
            continue
        sweep_leftovers(directory.path)
        if differing:
            directory.write(config, start)
        return directory, checkpoint
    return None


def _changed_keys(directory: RunDirectory, config: Config, start: SolverTable) -> list[str]:
    """Keys that differ from those of the run, compared as `RunDirectory.write` resolves them."""
    stored, stored_start = directory.read()
    resolved = copy.deepcopy(config)
    resolved.model.num_steps, resolved.model.num_points = start.num_steps, start.num_points
    changed = differences(stored, resolved)
    if start.sha256() != stored_start.sha256():
        changed.append("the start table")
    return changed


def config_sha256(flat: dict[str, Any]) -> str:
    """SHA-256 of a flat configuration as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def _holds_its_config(state: dict[str, Any]) -> bool:
    try:
        return isinstance(state["config"], dict) and state["config_sha256"] == config_sha256(state["config"])
    except (TypeError, ValueError, RecursionError):  # it holds what no configuration does
        return False


def check_config(stored: dict[str, Any], config: Config, path: Path) -> None:
    """Raise `CheckpointError` where the checkpoint `path` was saved under other values than those of FREE_KEYS."""
    now = flatten(config)
    changed = [key for key in sorted(now.keys() | stored.keys()) if now.get(key) != stored.get(key)]
    changed = [key for key in changed if not FREE_KEYS.fullmatch(key)]
    if changed:
        raise CheckpointError(
            f"{path} is of a run with other values of {', '.join(changed)}; use a checkpoint of this run"
        )


def restore_policy(policy: EPDParamPolicy, path: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into `policy` and return the whole checkpoint (`step`, `optimizer`, `guard`, ...).

    Raises `CheckpointError` for a missing or damaged file, or a policy of another shape or around another table.
    """
    state = load_checkpoint(path)
    if not state.keys() >= CHECKPOINT_KEYS:
        raise CheckpointError(f"{path} is not a policy checkpoint")
    if not _holds_its_config(state):
        raise CheckpointError(f"{path}: the configuration in it was changed after it was saved; use another checkpoint")
    if state["start_table_sha256"] != policy.start.sha256():
        raise CheckpointError(f"{path} was trained from another start table than the one in this run folder")
    try:
        policy.load_state_dict(state["policy"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another kind of policy than the run's configuration describes") from error
    return state
