"""Distillation: known rows are found again, its algebra against plain loops and searches, the command's refusals."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from launchers import torchrun
from solver_runs import F64
from toy_training import ToyDenoiser

import training.distill as distillation
from benchmarks.closed_form import MixtureDenoiser, ShiftCond, reference_solution
from solver_utils import SolverError, get_schedule
from solvers import SOLVERS
from torch_utils.seeds import noise
from training.distill import DistillError, best_row, distill, grid_positions, residual_gram, teacher_nodes, teacher_plan
from training.generate import SamplingPlan, table_schedule
from training.ppo.cold_start import cold_start_table
from training.ppo.config import CHOICES, DistillConfig, load_config
from training.solver_table import SolverTable
from training.table import load_table, save_table

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SEEDS = ["a", "bb", "ccc", "dddd"], [5, 6, 7, 8]


class Mixture(MixtureDenoiser):
    """The mixture as a float64 backbone; a prompt's length moves its means."""

    device = torch.device("cpu")

    def encode_prompts(self, prompts):
        return ShiftCond(torch.tensor([len(prompt) / 4 for prompt in prompts], dtype=F64))

    def initial_state(self, noise, sigma0):
        return super().initial_state(noise.double(), sigma0)


def start_table(num_steps=4, num_points=2, **metadata):
    conditions = {"schedule_type": "polynomial", "schedule_rho": 7.0, "sigma_min": 0.05, "sigma_max": 10.0}
    return replace(cold_start_table(num_steps, num_points), **conditions | metadata)


def walk(net, solver, sigmas, **options):
    """All states `[N, B, C, H, W]` that a solver passes from the noise of SEEDS."""
    states = []
    x = net.initial_state(noise(SEEDS, (net.img_channels, net.img_resolution, net.img_resolution)), sigmas[0])
    SOLVERS[solver](
        net, x, sigmas, net.encode_prompts(PROMPTS), callback=lambda i, x, sigma: states.append(x), **options
    )
    return torch.stack(states)


def fixed_row(gram, num_points):
    """`best_row` at scale 1, from the residuals alone."""
    chosen, weights, scale = best_row(torch.nn.functional.pad(gram, (0, 1, 0, 1)), num_points, fit_scale=False)
    assert scale == 1
    return chosen, weights


# ----------------------------------------------------------------------------
# What is known is found.


@pytest.mark.parametrize(("make_net", "tolerance"), [(Mixture, 1e-9), (ToyDenoiser, 1e-4)])
def test_one_point_finds_the_midpoint_of_dpm2(make_net, tolerance):
    """DPM-Solver-2 takes its slope half way in log sigma, at r = 0.5, which is on a grid of 25."""
    options = DistillConfig("dpm2", teacher_steps=1, grid_points=25, fit_scale=False)
    found = distill(make_net(), start_table(num_points=1), PROMPTS, SEEDS, options)
    assert (found.table.positions - 0.5).abs().max() < 1e-12
    assert torch.equal(found.table.weights, torch.ones(3, 1, dtype=F64))
    assert max(found.errors) < tolerance


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(("num_points", "tolerance"), [(1, 1e-9), (2, 1e-6), (3, 1e-3)])
def test_a_teacher_that_walks_by_a_table_is_matched(monkeypatch, num_points, tolerance, afs):
    """The rows differ, so that a shift of nodes or rows is no solution; `afs` is the table's own first step.

    The walk ends at sigma 1, where the mixture still bends; below it the slopes of a row become too much alike.
    """
    net, grid = Mixture(), grid_positions(13, num_points)
    random = torch.Generator().manual_seed(2)
    chosen = [torch.randperm(13, generator=random)[:num_points].sort().values for _ in range(3)]
    weights = torch.rand(3, num_points, generator=random, dtype=F64) + 0.3
    hidden = SolverTable(torch.stack([grid[c] for c in chosen]), weights / weights.sum(1, keepdim=True))
    start = start_table(num_points=num_points, afs=afs, sigma_min=1.0)
    states = walk(net, "epd", table_schedule(start, net), table=hidden, afs=afs)
    monkeypatch.setattr(distillation, "teacher_states", lambda *arguments: list(states))
    found = distill(net, start, PROMPTS, SEEDS, DistillConfig(grid_points=13, fit_scale=False))
    assert torch.equal(found.table.positions, hidden.positions)
    assert (found.table.weights - hidden.weights).abs().max() < tolerance
    assert max(found.errors) < 1e-5
    assert found.table.metadata() == start.metadata()
    for name in ("scale_dir", "scale_time"):
        assert torch.equal(getattr(found.table, name), torch.ones(3, num_points, dtype=F64))


@pytest.mark.parametrize(("num_points", "gain"), [(1, 2), (2, 4), (3, 4)])
def test_distilled_tables_end_nearer_to_the_exact_solution(num_points, gain):
    """On the images of the fit and on others; the teacher must be fine enough not to hide it."""
    net, start = Mixture(), start_table(num_steps=5, num_points=num_points)
    options = DistillConfig("dpm2", teacher_steps=16)
    found = distill(net, start, ["x" * (n % 5) for n in range(32)], range(100, 132), options)
    sigmas = table_schedule(start, net)
    exact = reference_solution(net, walk(net, "ddim", sigmas)[0], 10.0, 0.05, net.encode_prompts(PROMPTS), steps=200)
    cold, fitted = ((walk(net, "epd", sigmas, table=t)[-1] - exact).norm() for t in (start, found.table))
    assert fitted * gain < cold


# ----------------------------------------------------------------------------
# Each part against plain code.


@pytest.mark.parametrize("fit_scale", [False, True])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("teacher", ["ddim", "heun", "unipc"])
def test_rows_and_errors_are_those_of_the_students_own_walk(teacher, afs, fit_scale):
    """Each row is the best one from where the table itself leads, towards the teacher's state at the next node."""
    net, start = Mixture(), start_table(num_points=2, afs=afs)
    found = distill(net, start, PROMPTS, SEEDS, DistillConfig(teacher, 5, grid_points=9, fit_scale=fit_scale))
    sigmas = table_schedule(start, net)
    goal = walk(net, teacher, get_schedule(16, 0.05, 10.0))[::5]
    own = walk(net, "epd", sigmas, table=found.table, afs=afs)
    grid, cond = torch.linspace(0.02, 0.98, 9, dtype=F64), net.encode_prompts(PROMPTS)
    for i in range(3):
        gram = residual_gram(net, own[i], goal[i + 1], sigmas[i : i + 2], cond, grid, afs and i == 0, 64)
        chosen, weights, scale = best_row(gram, 2, fit_scale)
        assert torch.equal(found.table.positions[i], grid[chosen])
        assert torch.allclose(found.table.weights[i], weights, atol=1e-6)
        assert found.table.scale_dir[i].tolist() == pytest.approx([scale] * 2)
        assert (scale != 1) == fit_scale
        after, before = ((state - goal[i + 1]).flatten(1).norm(dim=1) for state in (own[i + 1], own[i]))
        assert found.errors[i] == pytest.approx(((after / before) ** 2).mean().sqrt().item(), rel=1e-6)
        # The step's relative distance is the residual's: what is minimised is what the student will do.
        places, parts = (
            [*chosen.tolist(), len(grid)],
            torch.cat([scale * weights, torch.tensor([scale - 1], dtype=F64)]),
        )
        assert found.errors[i] == pytest.approx((parts @ gram[places][:, places] @ parts).sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("max_rows", [1, 2, 3, 100])
def test_gram_is_the_mean_of_inner_products_of_residuals(max_rows, afs):
    net, cond = Mixture(), Mixture().encode_prompts(PROMPTS)
    x, target = net.start(4, 5.0), net.start(4, 2.0).flip(0)
    t, u = interval = torch.tensor([5.0, 2.0], dtype=F64)
    grid = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    expected = torch.zeros(4, 4, dtype=F64)
    for b in range(4):
        row, row_cond = x[b : b + 1], cond[b : b + 1]
        d = row / math.sqrt(1 + 5.0**2) if afs else net.slope(row, t, row_cond)
        way = (target[b : b + 1] - row) / (u - t)
        residuals = []
        for r in grid:
            tau = u**r * t ** (1 - r)
            residuals.append(net.slope(row + (tau - t) * d, tau, row_cond) - way)
        residuals.append(way)
        for r, s in itertools.product(range(4), range(4)):
            expected[r, s] += (residuals[r] * residuals[s]).sum() / way.norm() ** 2 / 4
    gram = residual_gram(net, x, target, interval, cond, grid, afs, max_rows)
    assert torch.allclose(gram, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_points", [1, 2, 3])
def test_best_row_is_what_a_search_over_weights_finds(num_points, seed):
    """Choices whose best weights, negative ones allowed, include one below 0.03 are passed over by both."""
    residuals = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed), dtype=F64)
    gram = residuals @ residuals.T / 7
    line = torch.linspace(-2, 3, 501, dtype=F64)
    free = torch.tensor(list(itertools.product(line.tolist(), repeat=num_points - 1)), dtype=F64)
    candidates = torch.cat([free, 1 - free.sum(1, keepdim=True)], 1)
    best = (math.inf, None, None)
    for subset in itertools.combinations(range(6), num_points):
        errors = (candidates @ residuals[list(subset)]).square().sum(1) / 7
        lowest = errors.argmin()
        if errors[lowest] < best[0] and (candidates[lowest] >= 0.03).all():
            best = (errors[lowest].item(), subset, candidates[lowest])
    chosen, weights = fixed_row(gram, num_points)
    assert tuple(chosen.tolist()) == best[1]
    assert (weights - best[2]).abs().max() < 0.011
    error = (weights @ gram[chosen][:, chosen] @ weights).item()
    assert best[0] * 0.99 < error <= best[0] + 1e-10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_points", [1, 2, 3])
def test_scaled_rows_are_the_free_least_squares_fit(num_points, seed):
    """Against numpy's least squares over every choice of slopes D = E + T, those with all weights large enough."""
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randn(7, generator=random, dtype=F64)
    slopes = wanted + 0.5 * torch.randn(6, 7, generator=random, dtype=F64)
    rows = torch.cat([slopes - wanted, wanted[None]])
    best = (math.inf,)
    for subset in itertools.combinations(range(6), num_points):
        free, *_ = np.linalg.lstsq(slopes[list(subset)].T.numpy(), wanted.numpy(), rcond=None)
        error = float(((slopes[list(subset)].T.numpy() @ free - wanted.numpy()) ** 2).sum())
        if abs(free.sum() - 1) <= 0.25 and (free / free.sum() >= 0.03).all() and error < best[0]:
            best = (error, subset, free / free.sum(), free.sum())
    chosen, weights, scale = best_row(rows @ rows.T, num_points, fit_scale=True)
    assert tuple(chosen.tolist()) == best[1]
    assert weights.tolist() == pytest.approx(best[2].tolist(), rel=1e-6) and scale == pytest.approx(best[3], rel=1e-6)


def test_a_choice_with_a_small_weight_is_passed_over():
    """The first two meet exactly at weights 0.99 and 0.01; the first and third come within sqrt(0.2)."""
    residuals = torch.tensor([[1.0, 0.0], [-99.0, 0.0], [-1.0, 1.0]], dtype=F64)
    chosen, weights = fixed_row(residuals @ residuals.T, 2)
    assert chosen.tolist() == [0, 2] and weights.tolist() == pytest.approx([0.6, 0.4])


def test_slopes_that_coincide_and_fit_exactly_are_no_obstacle():
    chosen, weights = fixed_row(torch.zeros(4, 4, dtype=F64), 2)
    assert len(set(chosen.tolist())) == 2 and torch.allclose(weights, torch.full((2,), 0.5, dtype=F64))
    residuals = torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.0, 0.0], [2.0, 2.0]], dtype=F64)
    assert fixed_row(residuals @ residuals.T, 2)[0].tolist() == [1, 2]


@pytest.mark.parametrize("num_points", [2, 3, 5])
def test_more_points_than_the_residuals_need_keep_the_least_weight(num_points):
    """All residuals point one way, so that any second point takes from the best single one: it gets 0.03."""
    lengths = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0], dtype=F64)
    gram = lengths[:, None] * lengths
    chosen, weights = fixed_row(gram, num_points)
    assert chosen.tolist() == [*range(1, num_points + 1)] if num_points < 5 else [*range(5)]
    assert torch.allclose(weights.sort().values[:-1], torch.full((num_points - 1,), 0.03, dtype=F64))
    assert chosen[weights.argmax()] == 1 and weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_pinned_weights_are_those_of_a_search(seed):
    """Weights of one choice, the second of three held at 0.1."""
    residuals = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=F64)
    free = torch.linspace(-2, 3, 50001, dtype=F64)
    candidates = torch.stack([free, torch.full_like(free, 0.1), 0.9 - free], 1)
    expected = candidates[(candidates @ residuals).square().sum(1).argmin()]
    pinned = torch.tensor([[False, True, False]])
    weights = distillation.best_weights((residuals @ residuals.T)[None], pinned, 0.1)
    assert (weights[0] - expected).abs().max() < 1e-4


def test_many_points_have_room_for_their_weights():
    found = distill(Mixture(), start_table(2, 40), PROMPTS, SEEDS, DistillConfig(teacher_steps=2, grid_points=41))
    assert found.table.weights.min() >= 0.0125


@pytest.mark.parametrize(
    ("grid_points", "num_points", "count"), [(25, 1, 25), (25, 4, 25), (25, 5, 20), (25, 6, 18), (25, 8, 16), (3, 3, 3)]
)
def test_grid_is_thinned_where_choices_are_too_many(grid_points, num_points, count):
    grid = grid_positions(grid_points, num_points)
    assert torch.allclose(grid, torch.linspace(0.02, 0.98, count, dtype=F64))
    assert math.comb(count, num_points) <= 20_000
    assert count == grid_points or math.comb(count + 1, num_points) > 20_000


def test_grid_must_hold_the_points():
    with pytest.raises(DistillError, match=r"distill\.grid_points=3 must be at least the 4 points"):
        grid_positions(3, 4)


@pytest.mark.parametrize(
    ("schedule", "rho"),
    [("polynomial", 7.0), ("polynomial", 3.0), ("logsnr", 1.0), ("time_uniform", 1.0), ("discrete", 1.0)],
)
@pytest.mark.parametrize("teacher_steps", [1, 3, 8])
def test_teacher_passes_the_nodes_of_the_table(schedule, rho, teacher_steps):
    net, start = Mixture(), start_table(num_steps=6, schedule_type=schedule, schedule_rho=rho)
    plan, nodes = teacher_plan(start, DistillConfig(teacher_steps=teacher_steps)), table_schedule(start, net)
    fine = teacher_nodes(plan, nodes, net)
    assert len(fine) == 5 * teacher_steps + 1
    assert torch.equal(fine[::teacher_steps], nodes) and bool((fine.diff() < 0).all())


def test_a_teacher_that_passes_the_nodes_by_is_refused():
    """A schedule whose finer version has other nodes: the table's are of rho 7, the plan's of rho 3."""
    net, start = Mixture(), start_table(num_steps=6)
    plan = replace(teacher_plan(start, DistillConfig(teacher_steps=2)), schedule_rho=3.0)
    with pytest.raises(DistillError, match="its 6 nodes are not among its 11"):
        teacher_nodes(plan, table_schedule(start, net), net)


def test_flow_models_are_fitted_too():
    net = Mixture(is_flow=True)
    start = start_table(schedule_type="flowmatch", schedule_rho=1.0, sigma_min=0.05, sigma_max=0.9, flowmatch_shift=3.0)
    found = distill(net, start, PROMPTS, SEEDS, DistillConfig("dpm2", teacher_steps=8))
    sigmas = table_schedule(start, net)
    cold, fitted = (walk(net, "epd", sigmas, table=table)[-1] for table in (start, found.table))
    goal = walk(net, "dpm2", teacher_nodes(teacher_plan(start, DistillConfig("dpm2")), sigmas, net))[-1]
    assert (fitted - goal).norm() < 0.5 * (cold - goal).norm()


# ----------------------------------------------------------------------------
# What must not matter, and what is refused.


class LargestCall(Mixture):
    largest = 0

    def slope(self, x, sigma, cond=None):
        self.largest = max(self.largest, len(x))
        return super().slope(x, sigma, cond)


@pytest.mark.parametrize(("fit_scale", "tolerance"), [(False, 1e-5), (True, 1e-3)])
@pytest.mark.parametrize("num_points", [1, 2, 3])
def test_rows_of_a_call_do_not_matter(num_points, fit_scale, tolerance):
    """Free lengths make slopes that are much alike harder to tell apart: the weights agree less, the errors as well."""
    start = start_table(num_points=num_points)
    options = DistillConfig(teacher_steps=3, grid_points=9, fit_scale=fit_scale)
    whole, again = (distill(Mixture(), start, PROMPTS, SEEDS, options) for _ in range(2))
    assert whole.table.sha256() == again.table.sha256() and whole.errors == again.errors
    for max_rows in (1, 3, 10):
        net = LargestCall()
        found = distill(net, start, PROMPTS, SEEDS, replace(options, max_rows=max_rows))
        assert net.largest <= max_rows
        assert torch.equal(found.table.positions, whole.table.positions)
        assert (found.table.weights - whole.table.weights).abs().max() < tolerance
        assert found.errors == pytest.approx(whole.errors, rel=1e-6)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("teacher", ["ddim", "edm"])
def test_progress_counts_every_row(teacher, afs):
    net, seen = Mixture(), []
    start, options = start_table(afs=afs), DistillConfig(teacher, teacher_steps=3, grid_points=9, max_rows=10)
    distill(net, start, PROMPTS, SEEDS, options, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (net.rows, net.rows)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("teacher", ["epd", "epd_ipndm", "magic"])
def test_other_teachers_are_refused_before_the_first_call(teacher):
    net = Mixture()
    with pytest.raises(DistillError, match=f"distill.teacher={teacher} must be one of: ddim, dpm, .*unipc$"):
        distill(net, start_table(), PROMPTS, SEEDS, DistillConfig(teacher))
    assert net.calls == 0


def test_teachers_of_the_configuration_are_the_solvers_without_a_table():
    for name in SOLVERS:
        if name in CHOICES["distill.teacher"]:
            assert teacher_plan(start_table(), DistillConfig(name, teacher_steps=4)).num_steps == 13
        else:
            with pytest.raises(DistillError, match=", ".join(CHOICES["distill.teacher"])):
                teacher_plan(start_table(), DistillConfig(name))


def test_analytical_first_step_of_a_flow_model_is_refused():
    net = Mixture(is_flow=True)
    start = start_table(schedule_type="flowmatch", schedule_rho=1.0, sigma_max=0.9, afs=True)
    with pytest.raises(SolverError, match="afs"):
        distill(net, start, PROMPTS, SEEDS, DistillConfig())
    assert net.calls == 0


def test_states_that_are_no_numbers_end_it():
    class Broken(Mixture):
        def slope(self, x, sigma, cond=None):
            return super().slope(x, sigma, cond) * (math.nan if sigma.min() < 1 else 1)

    with pytest.raises(DistillError, match=r"interval 2: .* no finite numbers"):
        distill(Broken(), start_table(), PROMPTS, SEEDS, DistillConfig(teacher_steps=1))


# ----------------------------------------------------------------------------
# The command, on the embedded model.

CONFIG = """
run: {{output_root: {root}/exps}}
data: {{prompt_csv: {root}/prompts.txt}}
model: {{dataset_name: emoji, guidance_rate: 3.0, num_steps: 3, num_points: 2}}
reward: {{type: emoji_reward}}
evaluation: {{num_prompts: 2}}
distill: {{teacher_steps: 2, prompts: 2, grid_points: 5}}
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\na dog\na cat\na cow\nheld out\nheld out too\n")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    return path


def run_cli(*arguments):
    return CliRunner().invoke(distillation.main, [str(argument) for argument in arguments])


def files(root):
    return sorted(path for path in root.rglob("*"))


def test_command_writes_a_table_that_samples(config_file, tmp_path, monkeypatch):
    result = run_cli("--config", config_file, "--device", "cpu")
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.removesuffix("\n"))
    assert path == tmp_path / "exps/emoji-3-4-epd-distilled/table.safetensors"
    table = load_table(path)
    assert (table.dataset_name, table.guidance_rate, table.num_steps, table.num_points) == ("emoji", 3.0, 3, 2)
    assert set(table.positions.flatten().tolist()) <= set(torch.linspace(0.02, 0.98, 5, dtype=F64).tolist())
    assert "2 intervals of 2 points to ddim with 4 intervals, on 2 prompts" in result.stderr
    errors = [float(line.split()[4].rstrip(",")) for line in result.stderr.splitlines() if "interval " in line]
    assert len(errors) == 2 and all(0 < error < 0.9 for error in errors)
    SamplingPlan.of_table(table, None, "float32").check()

    monkeypatch.setattr(SamplingPlan, "load_model", lambda self, device: pytest.fail("the model was loaded"))
    before = path.read_bytes()
    again = run_cli("--config", config_file, "--device", "cpu")
    assert again.exit_code == 2 and f"{path} exists; name another file" in again.stderr
    assert path.read_bytes() == before


@pytest.mark.slow
def test_two_processes_are_refused(config_file, tmp_path):
    command = [sys.executable, *torchrun(2), "-m", "training.distill", "--config", config_file, "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "distillation runs in one process: start it with python, not with torchrun" in result.stderr
    assert not (tmp_path / "exps").exists()


def test_prompts_and_noise_come_from_the_seed_alone(config_file, tmp_path, monkeypatch):
    """Training prompts, none twice, none held out; another seed gives other noise."""
    calls = []

    def fake(net, start, prompts, seeds, options, progress):
        calls.append((prompts, seeds))
        return distillation.Distilled(start, [0.5, 0.25])

    monkeypatch.setattr(distillation, "distill", fake)
    monkeypatch.setattr(SamplingPlan, "load_model", lambda self, device: None)
    for number, seed in enumerate((0, 0, 1)):
        run_args = ("--config", config_file, "--device", "cpu", "--override", f"run.seed={seed}")
        output = tmp_path / f"{number}.json"
        result = run_cli(*run_args, "--override", "distill.prompts=3", "--output", output)
        assert result.exit_code == 0 and result.stdout == f"{output}\n", result.output
        assert load_table(output).num_steps == 3
    assert calls[0] == calls[1] and not set(calls[0][1]) & set(calls[2][1])
    for prompts, seeds in calls:
        assert sorted(prompts) == ["a cat", "a cow", "a dog"] and len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "{root}/taken.json"], "taken.json exists; name another file with --output, or delete it"),
        (["--output", "{root}/table.txt"], "unknown table format '.txt'; use .safetensors, .json, .pkl"),
        (["--output", "{root}/none/table.json"], "there is no folder {root}/none"),
        (["--output", "{root}/taken.json/table.json"], "there is no folder {root}/taken.json"),
        (["--override", "run.output_root={root}/taken.json"], "taken.json is no folder that files can be made in"),
        (["--override", "distill.teacher=magic"], "distill.teacher=magic must be one of: ddim, "),
        (["--override", "distill.teacher=epd"], "distill.teacher=epd must be one of: ddim, "),
        (["--override", "distill.teacher_steps=0"], "distill.teacher_steps=0 must be at least 1"),
        (["--override", "distill.prompts=4"], "distill.prompts=4, but there are 3 different training prompts"),
        (["--override", "model.num_points=6"], "distill.grid_points=5 must be at least the 6 points of the table"),
        (["--override", "model.model_path={root}/none"], "none does not exist"),
        (["--override", "model.schedule_type=flowmatch"], "schedule flowmatch is for flow models"),
        (["--override", "model.schedule_rho=0.001"], "schedule_rho must be"),
        (["--override", "data.prompt_csv={root}/none.txt"], "none.txt does not exist"),
        (["--override", "data.predictor_snapshot={root}/taken.json"], "taken.json"),
    ],
)
def test_mistakes_give_one_line_before_the_model_loads(config_file, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(SamplingPlan, "load_model", lambda self, device: pytest.fail("the model was loaded"))
    (tmp_path / "taken.json").write_text("precious")
    before = files(tmp_path)
    arguments = [argument.format(root=tmp_path) for argument in arguments]
    result = run_cli("--config", config_file, "--device", "cpu", *arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and words.format(root=tmp_path) in line
    assert files(tmp_path) == before and (tmp_path / "taken.json").read_text() == "precious"


def test_dry_run_prints_the_configuration(config_file, tmp_path):
    before = files(tmp_path)
    result = run_cli("--config", config_file, "--override", "distill.prompts=32", "--dry-run")
    assert result.exit_code == 0 and result.stderr == ""
    assert yaml.safe_load(result.stdout)["distill"] == {
        "teacher": "ddim",
        "teacher_steps": 2,
        "prompts": 32,
        "grid_points": 5,
        "max_rows": 64,
        "fit_scale": True,
    }
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert load_config(again) == load_config(config_file, ["distill.prompts=32"])
    again.unlink()
    assert files(tmp_path) == before


@pytest.mark.parametrize("arguments", [["--help"], ["--config", "CONFIG", "--dry-run"]])
def test_help_and_dry_run_do_not_wait_for_torch(config_file, arguments):
    arguments = [str(config_file) if argument == "CONFIG" else argument for argument in arguments]
    program = (
        "import sys; from training.distill import main;"
        f"main({arguments!r}, standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert time.perf_counter() - started < 2


def test_formats_are_those_of_save_table(tmp_path):
    for suffix in distillation.FORMATS:
        distillation.check_output(tmp_path / f"table{suffix}", may_make_folder=False)
        save_table(start_table(), tmp_path / f"table{suffix}")
