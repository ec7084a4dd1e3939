"""The wheel, installed into a folder of its own and used from an empty one, without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from torch_utils.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE", "solvers.py", "solver_utils.py"),
    *("training", "torch_utils", "dnnlib", "HPSv2", "MPS", "src"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its traces beside the sources."""
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    pip("wheel", sources, "--no-build-isolation", "--wheel-dir", output)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", folder)
    return folder


def pip(command: str, *words: object) -> None:
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", command, *options, *map(str, words)], check=True)


@pytest.fixture
def run(target, tmp_path, monkeypatch):
    """Run an installed command in an empty folder; the home, and with it the cache, is empty, too."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(target), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def call(name: str, *words: object) -> str:
        command = [str(target / "bin" / name), *map(str, words)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return call


def test_the_wheel_has_all_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    assert {f"training/resources/{name}" for name in here} <= names
    packages = ("training", "torch_utils", "dnnlib", "HPSv2", "MPS")
    modules = {path.relative_to(ROOT).as_posix() for part in packages for path in (ROOT / part).rglob("*.py")}
    assert modules <= names
    assert {"training/ppo/cfgs/embedded.yaml", "solvers.py", "solver_utils.py"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {*packages, "solvers.py", "solver_utils.py", f"epd_rdpo-{VERSION}.dist-info"}


@pytest.mark.parametrize(
    "name",
    [
        *("train", "sample", "sample-baseline", "score", "compare", "export"),
        *("report", "distill", "start-table", "doctor", "fetch"),
    ],
)
def test_every_command_answers(run, name):
    assert run(f"epd-{name}", "--version") == f"epd-rdpo {VERSION}\n"
    assert "Exit codes: 0" in run(f"epd-{name}", "--help")


def test_train_export_sample_and_score_without_the_checkout(run, tmp_path):
    """From the preset, with prompts, model and judges of the installed copy."""
    assert "src/prompts/emoji_train.txt" in run("epd-train", "--config", "embedded", "--dry-run")
    overrides = ["model.num_steps=3", "ppo.steps=1", "ppo.rollout_batch_size=4", "evaluation.interval=1"]
    overrides += ["evaluation.num_prompts=2", "evaluation.grid_images=0", "logging.tensorboard=false"]
    words = [part for override in overrides for part in ("--override", override)]
    run_dir = run("epd-train", "--config", "embedded", "--device", "cpu", *words).strip()
    table = run("epd-export", run_dir).strip()
    pictures = ("--prompt-file", "src/prompts/emoji_test.txt", "--seeds", "0-1", "--device", "cpu")
    assert run("epd-sample", "--predictor-path", table, *pictures, "--outdir", "learned") == ""
    ddim = ("--sampler", "ddim", "--dataset-name", "emoji", "--num-steps", "5", "--schedule-type", "logsnr")
    assert run("epd-sample-baseline", *ddim, *pictures, "--outdir", "ddim") == ""
    scores = ("--metrics", "emoji_heldout", "--output-json", "comparison.json", "--device", "cpu")
    assert "| learned |" in run("epd-score", "--images", "learned", "ddim", *scores)
    assert len(list((tmp_path / "learned").rglob("*.png"))) == 2
