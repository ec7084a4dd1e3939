"""docs/customising.md: its files, changes and commands, applied and run in a copy of the project."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_folders import lines

from torch_utils.seeds import noise
from training.images import load_image
from training.manifest import image_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/customising.md").read_text(encoding="utf-8")
NEW_FILES = re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CHANGES = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TRAINING, SAMPLING, TRAINING_COLOURS, TESTS = re.findall(
    r"^<!-- run by tests/test_customising.py -->\n```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
)
SPREADS, SOLVER = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "src", "docs", "exps", "results", "samples", "weights")


def bash(commands: str, root: Path) -> str:
    """Run `commands` in `root` with this Python; returns their stdout."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "GIT_CEILING_DIRECTORIES": str(root.parent),
    }
    done = subprocess.run(["bash", "-euc", commands], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def console(block: str, root: Path) -> tuple[list[list[str]], list[list[str]]]:
    """The words of the lines that the page shows below its commands, and of those that the commands print."""
    parts = re.split(r"^\$ ((?:.*\\\n)*.*\n)", block, flags=re.MULTILINE)[1:]
    shown, printed = "".join(parts[1::2]), "".join(bash(command, root) for command in parts[::2])
    return [line.split() for line in shown.splitlines()], [line.split() for line in printed.splitlines()]


def manifest(folder: Path) -> dict:
    return lines(folder / "manifest.jsonl")[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with everything that the page adds and changes."""
    root = tmp_path_factory.mktemp("customising") / "project"
    shutil.copytree(ROOT, root, ignore=NOT_COPIED)
    (root / "src").symlink_to(ROOT / "src")
    for name, text in NEW_FILES:
        (root / name).write_text(text)
    for number, change in enumerate(CHANGES):
        (root.parent / f"{number}.diff").write_text(change)
        bash(f"git apply ../{number}.diff", root)
    return root


def test_what_the_page_adds_keeps_the_style(project):
    changed = re.findall(r"^\+\+\+ b/(\S+)", "".join(CHANGES), re.MULTILINE)
    files = " ".join({name for name, _ in NEW_FILES} | set(changed))
    bash(f"ruff check {files}; ruff format --check {files}", project)


# --- A reward -------------------------------------------------------------------------------------------------------

METRICS = ("emoji_heldout", "my_judge:heart")
GRADIENTS = """
import torch, my_judge, my_rewards

images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
flat = torch.full((1, 3, 64, 64), 0.5)
for reward in (my_rewards.calm, my_judge.heart, my_judge.heart):
    scores = reward(images, ["a", "b", "c"])
    (gradient,) = torch.autograd.grad(scores[1], images)
    print(list(scores.shape), gradient.isfinite().all().item(), [bool(row.any()) for row in gradient])
print(my_rewards.calm(flat, ["a"]).item(), my_judge.judge.cache_info().misses)
"""


def test_rewards_have_gradients_of_their_own_image_and_the_network_is_loaded_once(project):
    (project / "gradients.py").write_text(GRADIENTS)
    *rows, last = bash("python gradients.py", project).splitlines()
    assert rows == ["[3] True [False, True, False]"] * 3
    assert last in ("0.0 1", "-0.0 1")


@pytest.mark.slow
def test_training_with_the_reward_raises_it(project):
    folder = Path(bash(TRAINING, project).split()[-1])  # of training.ppo.launch
    before, after = lines(project / folder / "logs/evaluation.jsonl")
    told = [float(number) for number in re.search(r"rises from (\S+) to (\S+) \(", PAGE).groups()]
    assert before["reward_mean"] == pytest.approx(told[0], abs=2e-4)
    assert after["reward_mean"] == pytest.approx(told[1], abs=2e-3) and told[1] > told[0] + 4e-3
    assert all(math.isfinite(line[f"{name}_mean"]) for line in (before, after) for name in METRICS)
    steps = lines(project / folder / "logs/metrics.jsonl")
    assert len(steps) == 8 and all(math.isfinite(line["grad_norm_max"]) for line in steps)
    code = (project / "my_rewards.py").read_text()
    (project / "my_rewards.py").write_text(code.replace("-(down", "(down"))
    again = Path(bash(TRAINING, project).split()[-1])
    (project / "my_rewards.py").write_text(code)
    assert again == folder and lines(project / folder / "logs/metrics.jsonl") == steps  # as the page warns


# --- A backbone -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colours(project) -> Path:
    """`project` after the commands of the second part: sample_baseline.py, fake_train.py, sample.py,
    training.distill, training.ppo.launch, training.ppo.export_epd_predictor."""
    bash(SAMPLING + TRAINING_COLOURS, project)
    return project


def exact_pictures(seeds: range) -> torch.Tensor:
    """The red field at guidance 1.5 where sigma has fallen to 0.002, before rounding: `[N, 3, 32, 32]` float64."""
    draws = noise(seeds, (3, 32, 32)).double()
    colour = torch.tensor([0.6, -0.6, -0.6], dtype=torch.float64)[:, None, None]
    return ((0.998 * colour + math.hypot(0.998 * 0.1, 0.002) * draws) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("folder", "solver", "nfe"), [("heun", "heun", 80), ("distilled", "epd", 15)])
def test_samples_of_the_backbone_are_the_exact_ones(colours, folder, solver, nfe):
    pictures = torch.stack([load_image(colours / "samples" / folder / image_name(seed)) for seed in range(16)])
    assert 255 * (pictures.double() - exact_pictures(range(16))).abs().max() < 1.5  # rounding alone is 0.5
    line = manifest(colours / "samples" / folder)
    assert (line["dataset_name"], line["solver"], line["nfe"]) == ("colours", solver, nfe)
    assert line["forwards"] == 2 * nfe


def test_the_spreads_are_those_on_the_page(colours):
    shown, printed = console(SPREADS, colours)
    folders = [f"samples/{name}" for name in ("heun", "start", "distilled", "trained")]
    assert [line[0] for line in shown] == [line[0] for line in printed] == ["exact", *folders]
    for told, found in zip(shown, printed, strict=True):
        assert [float(number) for number in found[1:]] == pytest.approx([float(n) for n in told[1:]], abs=0.0021), told
    spread = {line[0]: float(line[-1]) for line in printed}
    too_wide, too_narrow = re.findall(r"(\S+) times the exact one", PAGE)
    assert spread["samples/start"] / spread["exact"] == pytest.approx(float(too_wide), abs=0.08)
    assert spread["samples/trained"] / spread["exact"] == pytest.approx(float(too_narrow), abs=0.08)


def test_training_on_the_backbone_raises_the_reward(colours):
    (run,) = (colours / "exps").glob("*-colours")
    before, after = lines(run / "logs/evaluation.jsonl")
    told = re.search(r"reward rose from (\S+) to (\S+):", PAGE)
    assert [before["reward_mean"], after["reward_mean"]] == pytest.approx([float(n) for n in told.groups()], abs=2e-3)
    bash(f"python -m training.table show {run}/export/*.pkl; python -m training.ppo.report {run}", colours)
    model = "--override model.dataset_name=colours --override model.schedule_type=flowmatch"
    assert "training can start" in bash(f"python -m training.ppo.doctor --config embedded {model}", colours)


# --- A solver -------------------------------------------------------------------------------------------------------


def test_the_solver_has_its_order_and_its_cost(project):
    shown, printed = console(SOLVER, project)
    assert [line[0] for line in shown] == [line[0] for line in printed] == ["ddim", "heun", "ralston"]
    errors = {}
    for told, (name, *found, _, order) in zip(shown, printed, strict=True):
        errors[name] = [float(number) for number in found]
        assert errors[name] == pytest.approx([float(number) for number in told[1:4]], rel=0.06)
        assert float(order) == pytest.approx(1 if name == "ddim" else 2, abs=0.05)
    assert 0.28 < errors["ralston"][-1] / errors["heun"][-1] < 0.39  # a third
    line = manifest(project / "samples/ralston")
    assert (line["solver"], line["nfe"], line["parallel_nfe"], line["forwards"]) == ("ralston", 10, 10, 20)


@pytest.mark.slow
def test_the_tests_of_the_project_take_the_solver(project):
    """Those of test_solvers.py, test_generate.py and test_benchmarks.py that ask about each solver."""
    bash(TESTS, project)
