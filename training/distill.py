"""Fit a solver table to the trajectory of a fine teacher, with no reward: `python -m training.distill`.

Interval by interval, positions are searched on a grid, weights and a scale follow in closed form: the K slopes whose
weighted mean leads from the student's own state closest to the teacher's next one. The student then makes that step
itself, so that later intervals correct the errors of earlier ones.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_utils.errors import UserError, user_errors
from torch_utils.options import cache_dir_option, command
from torch_utils.progress import Progress
from training.ppo.config import Config, DistillConfig, check_files, check_names, load_config, to_yaml

# Heavy modules are imported where they are used: --help and --dry-run answer without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from training.denoisers.base import Denoiser, TextCond
    from training.generate import SamplingPlan
    from training.solver_table import SolverTable

OnRows = Callable[[int, int], None]  # (network rows so far, rows in all)

FORMATS = (".safetensors", ".json", ".pkl")  # training.table owns these, but needs torch
FIRST_POSITION, LAST_POSITION = 0.02, 0.98  # of the grid: nearer to a node, points can hardly be told apart
MIN_WEIGHT = 0.03  # a point with less is hardly used, and leaves PPO at the edge of the simplex
MAX_SCALE_CHANGE = 0.25  # a fitted scale farther from 1 makes up for slopes that all point elsewhere
MAX_SUBSETS = 20_000  # of grid positions that are tried in an interval
RIDGE = 1e-12  # a squared relative error that counts as none: keeps systems regular where slopes coincide


class DistillError(UserError):
    """A distillation that cannot be done as asked."""


@dataclass(frozen=True)
class Distilled:
    """A fitted table and how well it follows the teacher, by interval."""

    table: SolverTable  # metadata of the start table
    errors: list[float]  # [N-1]: distance to the teacher's state after the step / before it, rms over the images


def distill(
    net: Denoiser,
    start: SolverTable,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: DistillConfig,
    progress: OnRows | None = None,
) -> Distilled:
    """Fit a table under the conditions and in the shape of `start`, which is a table for `epd`, to a teacher.

    One image per (prompt, seed). In memory are the teacher's states at the N nodes, `[N, B, C, H, W]` (12 MB for 16
    images of Stable Diffusion v1.5 and 10 intervals), and some `options.max_rows` states more. Raises `UserError`
    subclasses before the first network call, and `DistillError` where the model or the teacher leaves the finite
    numbers.
    """
    import torch

    from solver_utils import check_nodes
    from solvers import SOLVERS, epd_sampler
    from training.generate import initial_latents, table_schedule
    from training.solver_table import SolverTable

    plan = teacher_plan(start, options)
    grid = grid_positions(options.grid_points, start.num_points)
    nodes = table_schedule(start, net)
    check_nodes("epd", nodes, net.is_flow, start.afs)
    fine = teacher_nodes(plan, nodes, net)
    watched = _Watched(net, progress, len(prompts) * rows_per_image(plan, start, len(grid)))
    max_rows = options.max_rows

    rows, errors = [], []
    with torch.no_grad():
        x, cond = initial_latents(net, list(prompts), list(seeds), nodes)
        states = teacher_states(SOLVERS[plan.solver], watched, x, fine, options.teacher_steps, cond, max_rows)
        x = states[0]
        for i, target in enumerate(states[1:]):
            interval, afs = nodes[i : i + 2], start.afs and i == 0
            gram = residual_gram(watched, x, target, interval, cond, grid, afs, max_rows)
            if not gram.isfinite().all():
                raise DistillError(f"interval {i + 1}: the states of model or teacher are no finite numbers")
            chosen, weights, scale = best_row(gram, start.num_points, options.fit_scale)
            row = SolverTable(grid[chosen][None], weights[None], torch.full_like(weights, scale)[None])
            reached = epd_sampler(watched, x, interval, cond, table=row, max_rows=max_rows, afs=afs)
            rows.append(row)
            errors.append(_relative_distance(reached, x, target))
            x = reached
    table = replace(
        start,
        positions=torch.cat([row.positions for row in rows]),
        weights=torch.cat([row.weights for row in rows]),
        scale_dir=torch.cat([row.scale_dir for row in rows]),
        scale_time=torch.cat([row.scale_time for row in rows]),
    )
    return Distilled(table, errors)


def teacher_plan(start: SolverTable, options: DistillConfig) -> SamplingPlan:
    """The teacher as a plan: `options.teacher_steps` times the intervals of `start` on its schedule, without AFS.

    Raises `DistillError` for a solver that is unknown or needs a table itself.
    """
    from solver_utils import SOLVER_OPTIONS
    from training.generate import SamplingPlan

    teachers = [name for name, accepted in SOLVER_OPTIONS.items() if "table" not in accepted]
    if options.teacher not in teachers:
        raise DistillError(f"distill.teacher={options.teacher} must be one of: {', '.join(teachers)}")
    plan = SamplingPlan.of_table(start, model_path=None, precision="float32")
    num_steps = (start.num_steps - 1) * options.teacher_steps + 1
    return replace(plan, solver=options.teacher, options={}, table=None, num_steps=num_steps, afs=False)


def grid_positions(grid_points: int, num_points: int) -> Tensor:
    """Candidate positions `[G]`, float64, equally spaced: `grid_points` of them, or as many as MAX_SUBSETS allows.

    25 stay 25 for up to 4 points in an interval; 5 points leave 20, 6 leave 18, 8 leave 16. Raises `DistillError` for
    fewer positions than points.
    """
    import torch

    if grid_points < num_points:
        raise DistillError(f"distill.grid_points={grid_points} must be at least the {num_points} points of the table")
    while math.comb(grid_points, num_points) > MAX_SUBSETS:
        grid_points -= 1
    return torch.linspace(FIRST_POSITION, LAST_POSITION, grid_points, dtype=torch.float64)


def teacher_nodes(plan: SamplingPlan, nodes: Tensor, net: Denoiser) -> Tensor:
    """The teacher's nodes, float64 `[(N-1) * teacher_steps + 1]`, the table's `nodes [N]` among them bit for bit.

    Every type of schedule is a function of i / (N-1), so that a multiple of N-1 intervals has the same nodes.
    """
    import torch

    fine = plan.sigmas(net)
    every = (len(fine) - 1) // (len(nodes) - 1)
    if not torch.allclose(fine[::every], nodes, rtol=1e-6, atol=0):
        raise DistillError(f"schedule {plan.schedule_type}: its {len(nodes)} nodes are not among its {len(fine)}")
    fine[::every] = nodes
    return fine


def rows_per_image(plan: SamplingPlan, start: SolverTable, grid_points: int) -> int:
    """Rows through the network that `distill` spends on an image."""
    # The slope at the node is taken twice, for the grid and for the step; AFS saves both in the first interval.
    student = (start.num_steps - 1) * (2 + grid_points + start.num_points) - 2 * start.afs
    return plan.nfe().nfe + student


class _Watched:
    """`net` as solvers see it, reporting the rows that went through it."""

    def __init__(self, net: Denoiser, progress: OnRows | None, total: int):
        self.net, self.progress, self.total, self.done = net, progress, total, 0
        self.is_flow = net.is_flow

    def slope(self, x: Tensor, sigma: Tensor, cond: TextCond) -> Tensor:
        slope = self.net.slope(x, sigma, cond)
        self.done += len(x)
        if self.progress is not None:
            self.progress(self.done, self.total)
        return slope

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        return self.net.sigma_inv(sigma)


def teacher_states(
    solver: Callable[..., Tensor],
    net: Denoiser | _Watched,
    x: Tensor,
    fine: Tensor,
    every: int,
    cond: TextCond,
    max_rows: int,
) -> list[Tensor]:
    """The states `[B, C, H, W]` that `solver` passes at every `every`-th node, the first included, from x at node 0."""
    import torch

    parts = []
    for rows in _parts(len(x), max_rows):
        passed: list[Tensor] = []
        solver(net, x[rows], fine, cond[rows], callback=lambda i, state, sigma, passed=passed: passed.append(state))
        parts.append(passed[::every])
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def residual_gram(
    net: Denoiser | _Watched,
    x: Tensor,
    target: Tensor,
    interval: Tensor,
    cond: TextCond,
    grid: Tensor,
    afs: bool,
    max_rows: int,
) -> Tensor:
    """Gram matrix `[G+1, G+1]` (float64, CPU) of the residuals of one slope each, and of the slope wanted, last.

    The residual of position r is E_r = D_r - T: D_r the slope at that point of `interval` (two nodes), reached from
    `x [B, C, H, W]`, and T the slope that leads from x to `target`. Each image is divided by its norm of T, so that
    none dominates; entries are means over images. Weights w with sum s have the residual sum_r w_r E_r + (s - 1) T.
    """
    import torch

    from solvers import epd_slopes
    from training.solver_table import SolverTable

    candidates = SolverTable(grid[None], torch.full_like(grid, 1 / len(grid))[None])
    t, u = interval
    gram = torch.zeros(len(grid) + 1, len(grid) + 1, dtype=torch.float64, device=x.device)
    for rows in _parts(len(x), max(1, max_rows // len(grid))):
        slopes = epd_slopes(net, x[rows], interval, cond[rows], table=candidates, max_rows=max_rows, afs=afs)
        wanted = (target[rows].double() - x[rows].double()) / (u - t)
        wanted = wanted.flatten(1)[:, None]  # [b, 1, CHW]
        residual = torch.cat([slopes.double().flatten(2) - wanted, wanted], dim=1)
        residual = residual / wanted.norm(dim=2, keepdim=True)
        stacked = residual.transpose(0, 1).flatten(1)  # [G+1, b*CHW]
        gram += stacked @ stacked.T / len(x)
    return gram.cpu()


def best_row(gram: Tensor, num_points: int, fit_scale: bool) -> tuple[Tensor, Tensor, float]:
    """The positions, weights (sum 1) and common scale_dir of the K points whose step has the least error.

    `gram [G+1, G+1]` as `residual_gram` gives it; returns indices and weights `[K]` and the scale, which is 1 unless
    `fit_scale` asks for the best one within MAX_SCALE_CHANGE. No weight is below MIN_WEIGHT (half a fair share where
    that is less). Choices of positions whose best weights include a smaller one are passed over. Where that leaves
    none, as happens with three points, the small weights of every choice are raised to MIN_WEIGHT and its others found
    anew, at scale 1.
    """
    import torch

    lowest = min(MIN_WEIGHT, 0.5 / num_points)
    subsets = torch.tensor(list(itertools.combinations(range(len(gram) - 1), num_points)))  # [S, K]
    grams = gram[subsets[:, :, None], subsets[:, None, :]]  # [S, K, K]
    if fit_scale:
        extended = torch.nn.functional.pad(subsets, (0, 1), value=len(gram) - 1)
        weights, scales, errors = best_scaled_weights(gram[extended[:, :, None], extended[:, None, :]])
        errors[(weights < lowest).any(1) | ((scales - 1).abs() > MAX_SCALE_CHANGE)] = math.inf
        best = errors.argmin()
        if errors[best].isfinite():
            return subsets[best], weights[best], scales[best].item()
    pinned = torch.zeros_like(subsets, dtype=torch.bool)
    weights = best_weights(grams, pinned, lowest)
    if not (weights >= lowest).all(1).any():
        # Ends after K - 1 rounds at most: the mean of the free weights is above `lowest`, so one always stays free.
        while (weights < lowest).any():
            pinned |= weights < lowest
            weights = best_weights(grams, pinned, lowest)
    errors = (weights[:, None] @ grams @ weights[..., None]).flatten()
    errors[(weights < lowest).any(1)] = math.inf
    best = errors.argmin()
    return subsets[best], weights[best], 1.0


def best_scaled_weights(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of sum 1 `[S, K]`, scales `[S]` and squared errors `[S]` of the best steps whose length is free.

    `grams [S, K+1, K+1]` of K residuals and T. A step of the weights v with sum s has the residual sum_k v_k E_k + c T
    with c = s - 1: of all coefficients (v, c) with sum(v) - c = 1 the best are, as in `best_weights`, gram^-1 a /
    (a^T gram^-1 a) with a = (1, ..., 1, -1).
    """
    import torch

    ends = torch.ones(grams.shape[-1], dtype=grams.dtype)
    ends[-1] = -1
    coefficients = torch.linalg.solve(_ridged(grams), ends.expand(len(grams), -1))
    coefficients = coefficients / (coefficients @ ends)[:, None]
    errors = (coefficients[:, None] @ grams @ coefficients[..., None]).flatten()
    scales = coefficients[:, :-1].sum(1)
    return coefficients[:, :-1] / scales[:, None], scales, errors


def _ridged(grams: Tensor) -> Tensor:
    """`grams [S, K, K]` with RIDGE of their largest diagonal entry (of 1, if that is more) added to the diagonals."""
    import torch

    ridge = RIDGE * max(1.0, grams.diagonal(dim1=1, dim2=2).max().item())
    return grams + ridge * torch.eye(grams.shape[-1], dtype=grams.dtype)


def best_weights(grams: Tensor, pinned: Tensor, lowest: float) -> Tensor:
    """The weights `[S, K]` of least w^T gram w with sum 1, for each of `grams [S, K, K]`; those `pinned` are `lowest`.

    In the free rows gram w = lambda 1 (Lagrange), in the others w = lowest; lambda makes the sum 1. With nothing pinned
    this is gram^-1 1 / (1^T gram^-1 1).
    """
    import torch

    eye = torch.eye(grams.shape[-1], dtype=grams.dtype)
    system = torch.where(pinned[..., None], eye, _ridged(grams))
    sides = torch.stack([~pinned, pinned], -1).to(grams.dtype)
    free, fixed = torch.linalg.solve(system, sides).unbind(-1)
    weights = lowest * fixed + (1 - lowest * fixed.sum(1, keepdim=True)) / free.sum(1, keepdim=True) * free
    return weights.masked_fill(pinned, lowest)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


def _relative_distance(reached: Tensor, x: Tensor, target: Tensor) -> float:
    """|reached - target| / |x - target|, rms over images `[B, C, H, W]`."""
    after, before = ((state.double() - target.double()).flatten(1).norm(dim=1) for state in (reached, x))
    return (after / before).square().mean().sqrt().item()


# ----------------------------------------------------------------------------
# The command.


def distill_config(config: Config, output: Path | None, device: str) -> Path:
    """Check everything, load the backbone, distill, write; returns the table's path (`output`, or `default_output`).

    `device` is auto, cpu or cuda. Raises `UserError` subclasses before the backbone loads, where that can be known.
    """
    import torch

    from torch_utils import distributed
    from torch_utils.seeds import derive_seed
    from training.generate import SamplingPlan
    from training.ppo.inputs import start_table
    from training.table import save_table

    with distributed.joined(device):
        if distributed.world_size() > 1:
            raise DistillError("distillation runs in one process: start it with python, not with torchrun")
        model, options = config.model, config.distill
        start = start_table(config)
        path = default_output(config, start) if output is None else output
        check_output(path, may_make_folder=output is None)
        plan = SamplingPlan.of_table(start, model.model_path, model.precision)
        plan.check()
        teacher = teacher_plan(start, options)
        grid = grid_positions(options.grid_points, start.num_points)
        prompts = choose_prompts(config)
        if len(grid) < options.grid_points:
            distributed.print0(f"note: {len(grid)} of distill.grid_points={options.grid_points}, to try all choices")
        net = plan.load_model(distributed.device())
        distributed.print0(
            f"fitting {start.num_steps - 1} intervals of {start.num_points} points to {options.teacher} with "
            f"{teacher.num_steps - 1} intervals, on {len(prompts)} prompts"
        )
        seeds = [derive_seed(config.run.seed, "distill-noise", index) for index in range(len(prompts))]
        display = Progress("distilling", total=None, unit="network row")

        def show(done: int, total: int) -> None:
            display.total = total
            display.advance(done - display.done)

        try:
            distilled = distill(net, start, prompts, seeds, options, show)
        except torch.OutOfMemoryError as error:
            raise DistillError(
                f"the GPU's memory does not suffice for {options.max_rows} rows in a network call; lower "
                "distill.max_rows, for the same table"
            ) from error
        finally:
            display.close()
        for line in summary(distilled):
            distributed.print0(line)
        save_table(distilled.table, path)
        return path


def default_output(config: Config, start: SolverTable) -> Path:
    """`<run.output_root>/<model>-<nodes>-<parallel calls>-epd-distilled/table.safetensors`."""
    from training.generate import SamplingPlan

    calls = SamplingPlan.of_table(start, model_path=None, precision="float32").nfe().parallel_nfe
    folder = f"{start.dataset_name}-{start.num_steps}-{calls}-epd-distilled"
    return Path(config.run.output_root) / folder / "table.safetensors"


def check_output(path: Path, may_make_folder: bool) -> None:
    """Raise `DistillError` unless a table can be written as the new file `path`. Makes nothing."""
    if path.suffix.lower() not in FORMATS:
        raise DistillError(f"{path}: unknown table format {path.suffix!r}; use {', '.join(FORMATS)}")
    if os.path.lexists(path):
        raise DistillError(f"{path} exists; name another file with --output, or delete it")
    if not may_make_folder and not os.path.isdir(path.parent):
        raise DistillError(f"{path} cannot be written: there is no folder {path.parent}")
    nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise DistillError(f"{path} cannot be written: {nearest} is no folder that files can be made in")


def choose_prompts(config: Config) -> list[str]:
    """`distill.prompts` different training prompts, drawn by `run.seed`. Raises `DistillError` for too few."""
    from training.ppo.inputs import split_prompts
    from training.ppo.rl_runner import PromptOrder

    training, _ = split_prompts(config)
    different = list(dict.fromkeys(training))
    wanted = config.distill.prompts
    if wanted > len(different):
        raise DistillError(f"distill.prompts={wanted}, but there are {len(different)} different training prompts")
    return PromptOrder(different, config.run.seed).take(1, wanted)


def summary(distilled: Distilled) -> list[str]:
    """A line for each interval: how well the step fits, and its row."""
    lines = []
    for i, error in enumerate(distilled.errors):
        positions, weights = (
            " ".join(f"{value:.3f}" for value in array[i].tolist())
            for array in (distilled.table.positions, distilled.table.weights)
        )
        scale = distilled.table.scale_dir[i, 0].item()
        numbers = f"positions {positions}, weights {weights}, scale {scale:.3f}"
        lines.append(f"interval {i + 1}: relative error {error:.4f}, {numbers}")
    return lines


@command({"Table": ("config_path", "overrides", "output", "dry_run"), "Machine": ("device", "cache_dir")})
@click.option(
    "--config",
    "config_path",
    help="YAML file of the run, or a preset: embedded, sd15_single, sd15_parallel",
    metavar="FILE",
    type=Path,
    required=True,
)
@click.option(
    "--override",
    "overrides",
    help="Change one key, e.g. distill.prompts=32; repeatable",
    metavar="KEY=VALUE",
    multiple=True,
)
@click.option(
    "--output",
    help="The table to write: .safetensors, .json or .pkl, in a folder that exists",
    metavar="FILE",
    type=Path,
    show_default="<run.output_root>/<model>-<nodes>-<calls>-epd-distilled/table.safetensors",
)
@cache_dir_option
@click.option("--device", help="Where the model runs", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("-n", "--dry-run", help="Check, print the resolved configuration, and stop", is_flag=True)
@user_errors
def main(config_path: Path, overrides: tuple[str, ...], output: Path | None, device: str, dry_run: bool) -> None:
    """Fit a solver table to a fine teacher's trajectory, without a reward: a start for PPO, or a table to sample with.

    Uses model.*, data.*, run.seed and distill.* of a PPO configuration. The table's path goes to stdout. Example
    (installed: epd-distill):

    \b
    python -m training.distill --config training/ppo/cfgs/embedded.yaml --output exps/distilled.safetensors
    """
    config = load_config(config_path, overrides)
    check_names(config)
    check_files(config)
    if dry_run:
        if output is not None:
            check_output(output, may_make_folder=False)
        click.echo(to_yaml(config), nl=False)
        return
    click.echo(distill_config(config, output, device))


if __name__ == "__main__":
    main()
