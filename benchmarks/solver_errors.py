"""Error of the solvers against the true end of the trajectory, by number of sequential network calls.

The error of one state is RMS(x - truth) / RMS(truth) over its elements: 0.01 is one per cent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.closed_form import MixtureDenoiser, reference_solution
from benchmarks.results import ROOT, Part
from benchmarks.variants import Variant, run_counted
from solver_utils import default_rho, get_schedule
from torch_utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from torch_utils.seeds import noise
from training.denoisers import Denoiser, create_model
from training.images import quantize
from training.ppo.reward_base import exact_float32
from training.ppo.reward_multi import create_reward
from training.prompts import load_prompts, prompts_for_seeds

CLOSED_FORM_SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
CLOSED_FORM_RANGE = (0.05, 10.0)  # noise levels of all but flowmatch, which runs over the flow model's own range
CLOSED_FORM_BATCH = 8
RUNGE_KUTTA_STEPS = 400  # of the true solution in closed form

EMBEDDED_SCHEDULES = ("discrete", "logsnr")
JUDGES = {"reward": "emoji_reward", "heldout": "emoji_heldout"}
GUIDANCE = 7.5
PROMPT_FILE = Path("src/prompts/emoji_test.txt")
MAX_BATCH = 256


def relative_error(x: Tensor, truth: Tensor) -> Tensor:
    """RMS(x - truth) / RMS(truth) of every row: `[B]` float64 on the CPU."""
    x, truth = x.double().flatten(1), truth.double().flatten(1)
    return ((x - truth).square().mean(1).sqrt() / truth.square().mean(1).sqrt()).cpu()


def mean_and_interval(errors: Tensor) -> tuple[float | None, float | None]:
    """Mean and half width of its 95 % interval (normal, over images); None for what is infinite or undefined."""
    mean = errors.mean().item()
    half = 1.96 * errors.std().item() / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
    return (mean if math.isfinite(mean) else None), (half if math.isfinite(half) else None)


def error_row(problem: str, variant: Variant, num_steps: int) -> dict:
    """What identifies a measurement and what it costs."""
    cost = variant.cost(num_steps)
    return {
        "problem": problem,
        "variant": variant.label,
        "solver": variant.solver,
        "options": variant.options,
        "num_steps": num_steps,
        "nfe": cost.nfe,
        "parallel_nfe": cost.parallel_nfe,
    }


def missing_rows(part: Part, problem: str, variants: Sequence[Variant], nfes: Sequence[int]) -> list[tuple]:
    """(variant, num_steps) of every measurement that is asked for, possible, and not in `part` yet."""
    wanted = []
    for variant in variants:
        for nfe in nfes:
            num_steps = variant.num_steps(nfe)
            if num_steps and not part.has(problem=problem, variant=variant.label, parallel_nfe=nfe):
                wanted.append((variant, num_steps))
    return wanted


# ----------------------------------------------------------------------------
# Closed form.


def closed_form_settings() -> dict:
    return {
        "model": "mixture of 3 Gaussians, 2 x 3 x 3 elements; the slope is known exactly",
        "state": "float64 on the CPU",
        "batch": CLOSED_FORM_BATCH,
        "sigma_range": list(CLOSED_FORM_RANGE),
        "sigma_range_flowmatch": [MixtureDenoiser(is_flow=True).sigma_min, 1.0],
        "truth": f"Runge-Kutta 4 with {RUNGE_KUTTA_STEPS} steps in log sigma",
        "error": "mean over the batch of RMS(x - truth) / RMS(truth)",
    }


@functools.cache
def closed_form_truth(is_flow: bool) -> tuple[Tensor, float]:
    """The true final states, whatever the schedule, and their own error, from the same with half the steps."""
    net, x, low, high = closed_form_problem(is_flow)
    truth = reference_solution(net, x, high, low, steps=RUNGE_KUTTA_STEPS)
    coarse = reference_solution(net, x, high, low, steps=RUNGE_KUTTA_STEPS // 2)
    return truth, relative_error(coarse, truth).mean().item() / 15  # order 4: a sixteenth is left, 15 are gone


def closed_form_problem(is_flow: bool) -> tuple[MixtureDenoiser, Tensor, float, float]:
    """(net, start state, lowest noise level, highest)"""
    net = MixtureDenoiser(is_flow=is_flow)
    low, high = (net.sigma_min, net.sigma_max) if is_flow else CLOSED_FORM_RANGE
    return net, net.start(CLOSED_FORM_BATCH, high), low, high


def measure_closed_form(part: Part, variants: Sequence[Variant], nfes: Sequence[int]) -> None:
    """Add the missing rows of every schedule, and each schedule's own `reference_error`."""
    for schedule in tqdm(CLOSED_FORM_SCHEDULES, desc="closed form", unit="schedule"):
        wanted = missing_rows(part, schedule, variants, nfes)
        if not wanted:
            continue
        is_flow = schedule == "flowmatch"
        net, x, low, high = closed_form_problem(is_flow)
        truth, doubt = closed_form_truth(is_flow)
        part.references[schedule] = {"reference_error": doubt}
        for variant, num_steps in wanted:
            sigmas = get_schedule(num_steps, low, high, None, schedule, default_rho(schedule), net)
            final = run_counted(variant, net, x, sigmas)
            part.add(error_row(schedule, variant, num_steps) | {"error": relative_error(final, truth).mean().item()})


# ----------------------------------------------------------------------------
# The embedded model.


def embedded_settings(images: int, reference_steps: int) -> dict:
    return {
        "model": "emoji",
        "guidance_rate": GUIDANCE,
        "state": "float32",
        "tf32": False,
        "images": images,
        "prompts": f"the first {images} lines of {PROMPT_FILE}; seeds 0-{images - 1}",
        "truth": f"DDIM with {reference_steps} intervals on the same schedule type",
        "limit": f"dpm2 with {max(reference_steps // 2, 1)} intervals on the same schedule type",
        "error": "mean over images of RMS(x - truth) / RMS(truth), final latents; error_to_limit: the same against "
        "`limit`; reference_error: the distance between the two",
        "scores": "mean cosine of picture and prompt by the two embedded judges, 8-bit pictures: "
        + ", ".join(f"{name} is {judge}" for name, judge in JUDGES.items()),
    }


@functools.cache
def embedded_model(device: str) -> Denoiser:
    return create_model("emoji", guidance_rate=GUIDANCE, device=device)


class EmbeddedProblem:
    """The embedded model with fixed prompts and noise, and solvers run on it in batches."""

    def __init__(self, device: str, images: int):
        self.net = embedded_model(device)
        self.seeds = list(range(images))
        self.prompts = prompts = prompts_for_seeds(load_prompts(ROOT / PROMPT_FILE), self.seeds)
        self.judges = {name: create_reward(judge, device=device) for name, judge in JUDGES.items()}
        self.batches = []
        for first in range(0, images, MAX_BATCH):
            part = slice(first, first + MAX_BATCH)
            shape = (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
            noises = noise(self.seeds[part], shape).to(self.net.device)
            self.batches.append((noises, self.net.encode_prompts(prompts[part])))

    def run(self, variant: Variant, schedule: str, num_steps: int, bar: tqdm) -> Tensor:
        """Final latents `[images, C, H, W]` on the CPU; the bar moves by one for every network call."""
        net, per_interval = self.net, variant.cost(2).parallel_nfe
        sigmas = get_schedule(num_steps, net.sigma_min, net.sigma_max, net.device, schedule, default_rho(schedule), net)

        def progress(i: int, x: Tensor, sigma: Tensor) -> None:
            bar.update(per_interval if i else 0)

        finals = []
        for noises, cond in self.batches:
            x = net.initial_state(noises, sigmas[0])
            finals.append(run_counted(variant, net, x, sigmas, cond, progress).cpu())
        return torch.cat(finals)

    @torch.no_grad()
    def scores(self, latents: Tensor) -> dict[str, float | None]:
        """`<judge>` and `<judge>_ci95` of the pictures of final `latents [images, C, H, W]`."""
        pictures = torch.cat([quantize(self.net.decode(part.to(self.net.device))) for part in latents.split(MAX_BATCH)])
        found = {}
        for name, judge in self.judges.items():
            scores = judge.score(pictures, self.prompts).double().cpu()
            found[name], found[f"{name}_ci95"] = mean_and_interval(scores)
        return found


def reference(
    problem: EmbeddedProblem, schedule: str, intervals: int, solver: str, path: Path, key: str, bar: tqdm
) -> Tensor:
    """Final latents of `solver` with `intervals`: those in `path` if made for `key`, else made and written there."""
    try:
        stored = load_checkpoint(path) if path.exists() else {}
    except CheckpointError:
        stored = {}
    if stored.get("key") == key:
        return stored["latents"]
    bar.set_description(f"embedded {schedule}, {solver} with {intervals} intervals")
    latents = problem.run(Variant(solver, solver), schedule, intervals + 1, bar)
    save_checkpoint(path, {"key": key, "latents": latents})
    return latents


def measure_embedded(
    part: Part,
    variants: Sequence[Variant],
    nfes: Sequence[int],
    device: str,
    images: int,
    reference_steps: int,
    work: Path,
) -> None:
    """Add the missing rows of both schedules; the true latents are kept in `work` for the next run."""
    wanted = {schedule: missing_rows(part, schedule, variants, nfes) for schedule in EMBEDDED_SCHEDULES}
    if not any(wanted.values()):
        return
    with exact_float32(), tqdm(unit="call", desc="embedded") as bar:
        problem = EmbeddedProblem(device, images)
        for schedule, rows in wanted.items():
            if not rows:
                continue
            key = part.fingerprint()
            truth = reference(problem, schedule, reference_steps, "ddim", work / f"{schedule}-ddim.pt", key, bar)
            halved = max(reference_steps // 2, 1)
            limit = reference(problem, schedule, halved, "dpm2", work / f"{schedule}-dpm2.pt", key, bar)
            mean, interval = mean_and_interval(relative_error(truth, limit))
            part.references[schedule] = {
                "reference_error": mean,
                "reference_error_ci95": interval,
                **problem.scores(truth),
            }
            for variant, num_steps in rows:
                bar.set_description(f"embedded {schedule}, {variant.label}")
                final = problem.run(variant, schedule, num_steps, bar)
                mean, interval = mean_and_interval(relative_error(final, truth))
                to_limit, _ = mean_and_interval(relative_error(final, limit))
                errors = {"error": mean, "error_ci95": interval, "error_to_limit": to_limit}
                part.add(error_row(schedule, variant, num_steps) | errors | problem.scores(final))
