"""Measure the published metrics with random weights of the real sizes, on one GPU or the CPU.

Writes scorers.json (every number) and scorers.md (the table, beside what is to be reached) to --outdir, and prints the
table. What is measured is kept, of speed metric by metric; --overwrite measures the chosen parts anew.

\b
speed   8 images of 512 x 512 with 8 prompts, on the device already, by every metric; what half precision changes
folder  1,000 PNGs of 512 x 512 through what score_hps does
none    nothing: only write the table again

Half precision (amp) is measured on a GPU only.
"""

from __future__ import annotations

import contextlib
import io
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.results import Benchmark, Results, choose, figures_table, make_folder, open_results, reached
from torch_utils.errors import UserError, user_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BENCHMARK = Benchmark(
    name="scorers",
    module="benchmarks.scorers",
    code=(
        *("HPSv2/model.py", "HPSv2/preprocess.py"),
        *("MPS/trainer/models/clip_model.py", "MPS/trainer/models/cross_modeling.py"),
        *("training/images.py", "training/ppo/scoring.py", "training/ppo/reward_base.py", "training/ppo/reward_hps.py"),
        *(
            f"training/ppo/reward_models/{name}.py"
            for name in ("aesthetic", "clip", "clip_backbone", "imagereward", "mps", "pick", "pixels", "tokens")
        ),
        *("benchmarks/scorers.py", "benchmarks/scorer_models.py"),
    ),
)
PARTS = ("speed", "folder")
TIMED_IMAGES = 8
SPREAD_IMAGES = 32
FOLDER_BATCH = 32  # the default of score_hps
TO_REACH_MS = {"hps": 36.0}  # with amp, on an H100


@click.command(help=__doc__, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--parts", metavar="LIST", default="all", help="What to measure: all, none, or some of the above")
@click.option("--repeats", metavar="INT", type=click.IntRange(1), default=10, help="speed: runs of each median")
@click.option("--tiny", is_flag=True, help="Tiny networks and pictures, and few of these, to try the benchmark itself")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--models",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the random weights and the pictures, 12 GB",
    default=Path("results/scorers/models"),
)
@click.option("--outdir", metavar="DIR", type=click.Path(path_type=Path), default=Path("results/scorers"))
@click.option("--overwrite", is_flag=True, help="Measure the chosen parts anew")
@click.option("--check", is_flag=True, help="Exit code 1 unless everything is reached")
@user_errors
def main(
    parts: str, repeats: int, tiny: bool, device: str, models: Path, outdir: Path, overwrite: bool, check: bool
) -> None:
    names = choose("--parts", parts, PARTS)
    from benchmarks.solvers import parse_device
    from torch_utils.checkpoint import atomic_write_text

    device = parse_device(device)
    with contextlib.ExitStack() as locks:
        results = open_results(outdir, BENCHMARK, locks)
        if names:
            measure(results, names, {"tiny": tiny, "repeats": repeats}, device, models, overwrite)
        table = figures_table({name: results.parts[name] for name in PARTS if name in results.parts}, settings_text)
        atomic_write_text(outdir / "scorers.md", table)
        click.echo(table)
    missed = [row["figure"] for part in results.parts.values() for row in part["rows"] if not reached(row)]
    if check and (missed or not results.parts):
        raise UserError(f"--check: not reached: {', '.join(missed) or 'nothing is measured'}")


def measure(results: Results, names: list[str], settings: dict, device: str, models: Path, overwrite: bool) -> None:
    """Add what the parts do not hold yet; the file is saved after every metric."""
    import torch

    from training.ppo.reward_multi import PUBLISHED

    found = {name: results.part(name, device, settings, overwrite) for name in names}
    folder = models / "tiny" if settings["tiny"] else models
    make_folder("--models", folder)
    for name, part in found.items():
        rows_of, metrics = (speed_rows, tuple(PUBLISHED)) if name == "speed" else (folder_rows, ("hps",))
        for metric in metrics:
            if not part.has(metric=metric):
                for row in rows_of(metric, folder, torch.device(device), settings):
                    part.add({"metric": metric, **row})
                results.save()
                click.echo(f"{name}: {metric} measured", err=True)


def speed_rows(metric: str, folder: Path, device: torch.device, settings: dict) -> list[dict]:
    """Times of `metric`, and on a GPU what half precision does to its scores."""
    from benchmarks.scorer_models import pictures, random_reward
    from benchmarks.sd15_measures import milliseconds, prompts
    from HPSv2.preprocess import preprocess

    images = pictures(SPREAD_IMAGES, picture_size(settings), device)
    few, amps, rows, scores = images[:TIMED_IMAGES], precisions(device), [], []
    for amp in amps:
        reward = random_reward(metric, folder, device, amp, settings["tiny"])
        took = milliseconds(partial(reward.score, few, prompts(TIMED_IMAGES)), device, settings["repeats"])
        to_reach = TO_REACH_MS.get(metric) if amp else None
        figure = f"{metric}: {TIMED_IMAGES} images, {reward.dtype}"
        rows.append(figure_row(figure, took, "ms", to_reach, f"{1000 * TIMED_IMAGES / took:.0f} images/s"))
        if metric == "hps" and not amp:
            took = milliseconds(partial(preprocess, few, reward.image_size), device, settings["repeats"])
            rows.append(figure_row(f"{metric}: {TIMED_IMAGES} images, preprocessing alone", took, "ms", None, ""))
        if len(amps) > 1:
            # Of one prompt, since these scores compare images of one prompt.
            scores.append(reward.score(images, prompts(1) * len(images)))
    if len(amps) > 1:
        rows.append(precision_row(metric, *scores))
    return rows


def precision_row(metric: str, exact: Tensor, half: Tensor) -> dict:
    """How far scores of half precision are from those of float32, both `[N]`, in their standard deviations."""
    largest, spread = (half.double() - exact.double()).abs().max().item(), exact.double().std().item()
    note = f"{largest:.2g} over {spread:.2g}, {len(exact)} images of one prompt"
    return figure_row(f"{metric}: largest change by amp, over the spread", largest / spread, "", None, note)


def folder_rows(metric: str, folder: Path, device: torch.device, settings: dict) -> list[dict]:
    """What `score_<metric>` does once the model is loaded: images found, decoded, scored, summarised."""
    from benchmarks.scorer_models import pictures, random_reward, write_pictures
    from benchmarks.sd15_measures import prompts, seconds
    from training.ppo.scorer_options import ScoreRequest
    from training.ppo.scoring import score_folder

    size, count = picture_size(settings), 6 if settings["tiny"] else 1000
    write_pictures(folder / "pictures", count, size, device)
    request = ScoreRequest(folder / "pictures", "**/*.png", None, None, FOLDER_BATCH, device.type)
    rows = []
    for amp in precisions(device):
        reward = random_reward(metric, folder, device, amp, settings["tiny"])
        reward.score(pictures(FOLDER_BATCH, size, device), prompts(FOLDER_BATCH))  # the first call, which warms up
        log = io.StringIO()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            took = seconds(
                partial(score_folder, request, reward.name, lambda device, batch_size, reward=reward: reward), device
            )
        waited = re.search(r"(\d+)% of it waiting for files", log.getvalue())
        if waited is None:
            raise UserError(f"the scorer does not say how long it waited for files: {log.getvalue()[-200:]!r}")
        label = f"{metric}: folder, {reward.dtype}"
        rows.append(figure_row(label, count / took, "images/s", None, f"{count} in {took:.4g} s"))
        rows.append(figure_row(f"{label}: waiting for files", float(waited[1]), "%", None, "of the time"))
    return rows


def precisions(device: torch.device) -> tuple[bool, ...]:
    """The values of `amp` that the device has."""
    return (False, True) if device.type == "cuda" else (False,)


def picture_size(settings: dict) -> int:
    return 64 if settings["tiny"] else 512


def figure_row(figure: str, value: float, unit: str, to_reach: float | None, note: str) -> dict:
    return {"figure": figure, "value": value, "unit": unit, "to_reach": to_reach, "note": note}


def settings_text(settings: dict) -> str:
    return ", tiny networks" if settings["tiny"] else ""


if __name__ == "__main__":
    main()
