"""What an exported table holds, which checkpoint it comes from, and how the command refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from run_folders import only_run
from toy_training import run_toy, write_files

from torch_utils.checkpoint import load_checkpoint, save_checkpoint
from training.ppo.config import load_config
from training.ppo.export_epd_predictor import export_predictor, main
from training.ppo.policy import SCALE_RATE, create_policy
from training.ppo.run_dir import RunDirectory
from training.table import load_table, save_table

REPOSITORY = Path(__file__).resolve().parents[1]
ARRAYS = ("positions", "weights", "scale_dir", "scale_time")


def trained_run(root, *overrides):
    """A finished toy run of 4 steps with checkpoints at 2 and 4."""
    run_toy(write_files(root), "never", list(overrides))
    return only_run(root)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def assert_tables_equal(first, second, tolerance):
    for name in ARRAYS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=tolerance)


def policy_of(directory, checkpoint):
    config, start = directory.read()
    policy = create_policy(config, start)
    policy.load_state_dict(load_checkpoint(checkpoint)["policy"])
    return policy


def test_an_untrained_policy_exports_the_start_table(tmp_path):
    # Learning rates this small leave every weight where it was, up to rounding.
    scales = ["ppo.train_scale_dir=true", "ppo.train_scale_time=true"]
    directory = trained_run(tmp_path, "ppo.learning_rate=1e-12", *scales)
    start = load_table(directory.start_table)
    exported = load_table(export_predictor(directory.path, Path("checkpoints/policy-step000004.pt")))
    assert_tables_equal(exported, start, 1e-6)
    bare = {"scale_dir_range", "scale_time_range"}  # of the file format, not of the table
    assert {k: v for k, v in exported.metadata().items() if k not in bare} == {
        k: v for k, v in start.metadata().items() if k not in bare
    }


def test_export_of_a_named_checkpoint(run):
    snapshot = export_predictor(run.path, Path("checkpoints/policy-step000002.pt"))
    assert snapshot == run.export / "network-snapshot-export-step000002.pkl"
    mean = policy_of(run, run.checkpoint(2)).mean_table()
    exact = load_table(snapshot.with_suffix(".safetensors"))
    assert_tables_equal(exact, mean, 0)
    assert_tables_equal(load_table(snapshot), mean, 1e-6)
    assert not torch.allclose(exact.positions, load_table(run.start_table).positions, atol=1e-3)  # it has learned
    options = json.loads((run.export / "training_options.json").read_text())
    assert options["table_sha256"] == exact.sha256() == mean.sha256()
    assert options["step"] == 2 and options["checkpoint"] == "policy-step000002.pt"
    assert options["positions"] == exact.positions.tolist() and options["guidance_rate"] == 7.5
    assert options["config"]["run.run_name"] == "toy"


def test_default_is_the_best_then_the_latest(run):
    state = load_checkpoint(run.checkpoint(2))
    save_checkpoint(run.best_checkpoint, {**state, "step": 77})
    assert export_predictor(run.path).name == "network-snapshot-export-step000077.pkl"
    run.best_checkpoint.unlink()
    assert export_predictor(run.path).name == "network-snapshot-export-step000004.pkl"
    for step in (2, 4):
        run.checkpoint(step).unlink()
    assert_refused(CliRunner().invoke(main, [str(run.path)]), "has no checkpoint to export")


def test_scales_that_outgrew_the_declared_range(tmp_path):
    # A start table whose .pkl promises scales within 1 +- 0.01, and a policy that has moved them by more.
    directory = trained_run(tmp_path, "ppo.train_scale_dir=true")
    start = replace(load_table(directory.start_table), scale_dir_range=0.01)
    save_table(start, directory.start_table)
    state = load_checkpoint(directory.checkpoint(4))
    state["policy"]["residuals.weight"][:, 5:] = 0.2 / SCALE_RATE
    save_checkpoint(directory.checkpoint(4), {**state, "start_table_sha256": start.sha256()})
    exported = load_table(export_predictor(directory.path, Path("checkpoints/policy-step000004.pt")))
    assert (exported.scale_dir > 1.15).all()
    assert_tables_equal(exported, policy_of(directory, directory.checkpoint(4)).mean_table(), 1e-6)


def test_the_command_needs_no_backbone_and_prints_the_path(run):
    program = (
        "import sys; from training.ppo.export_epd_predictor import main;"
        f"main([{str(run.path)!r}, '--checkpoint', 'checkpoints/policy-step000004.pt'], standalone_mode=False);"
        "sys.exit(bool({'diffusers', 'transformers', 'open_clip'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run.export / "network-snapshot-export-step000004.pkl")


def test_a_run_moved_elsewhere_still_exports(run, tmp_path):
    # The configuration names the start table where the run was made; the run folder has its own copy.
    config = load_config(run.config)
    assert not Path(config.data.predictor_snapshot).is_relative_to(run.path)
    moved = run.path.rename(tmp_path / "moved elsewhere")
    assert export_predictor(moved).is_file()


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    message = result.stderr.strip()
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_refusals(run, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    assert_refused(invoke(tmp_path / "none"), "none is not a run folder")
    assert_refused(invoke(run.path, "--checkpoint", "checkpoints/policy-step000003.pt"), "policy-step000003.pt")
    run.checkpoint(4).write_bytes(run.checkpoint(4).read_bytes()[:-100])
    assert_refused(invoke(run.path, "--checkpoint", "checkpoints/policy-step000004.pt"), "damaged or incomplete")
    save_checkpoint(run.checkpoint(6), {"weights": torch.zeros(3)})
    assert_refused(invoke(run.path, "--checkpoint", "checkpoints/policy-step000006.pt"), "is not a policy checkpoint")
    state = load_checkpoint(run.checkpoint(2))
    save_checkpoint(run.checkpoint(8), {**state, "policy": {"residuals.weight": torch.zeros(2, 2)}})
    assert_refused(invoke(run.path, "--checkpoint", run.checkpoint(8)), "another kind of policy")
    assert not run.export.exists()
