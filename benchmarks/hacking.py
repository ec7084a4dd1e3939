"""Train on a reward that can be hacked, the pictures' saturation, and watch a held-out metric fall.

The embedded model's table is trained with free scales, so that steps can overshoot: colours grow louder than the
model's own, and the pictures worse. Writes hacking.json (the evaluations) and hacking.png (both metrics over the
steps; the pictures of the best, the first flagged and the last evaluation) to --outdir, and the run folder below it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from torch import Tensor

from benchmarks.results import ROOT, machine
from benchmarks.solvers import parse_device
from torch_utils import distributed
from torch_utils.checkpoint import atomic_file, atomic_write_text
from torch_utils.errors import UserError, user_errors
from training.ppo.config import Config, check_files, flatten, load_config
from training.ppo.inputs import Inputs, split_prompts, start_table
from training.ppo.launch import Models, load_backbone, train
from training.ppo.reward_base import check_inputs
from training.ppo.reward_mix import RewardMix
from training.ppo.reward_multi import create_reward
from training.ppo.run_dir import RunDirectory

PRESET = ROOT / "training" / "ppo" / "cfgs" / "embedded.yaml"
HELD_OUT = "emoji_reward"
EVALUATIONS = 10  # after the one of the start table, spread evenly over the run
COLOURS = {"reward": "#d62728", HELD_OUT: "#1f77b4"}
DPI = 120


class SaturationReward:
    """Mean over the pixels of the largest minus the smallest channel: 0 for grey, 1 for pure colours.

    Differentiable, and blind to the prompt and to what the picture shows.
    """

    name, version, weights_sha256, preprocessing, dtype = "saturation", "1", "none", "none", "float32"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; in [0, 1]. Gradients reach `images`."""
        check_inputs(images, prompts)
        images = images.float()
        return (images.amax(1) - images.amin(1)).flatten(1).mean(1)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """None: prompts are not read."""
        return 0


def hacking_config(outdir: Path, steps: int, start: Path | None, overrides: Sequence[str]) -> Config:
    """The embedded preset with the hackable reward; `start` is a table file, `overrides` come last."""
    config = load_config(
        PRESET,
        [
            "run.run_name=hacking",
            "reward.type=saturation",
            f"evaluation.metrics=[{HELD_OUT}]",
            f"evaluation.interval={max(steps // EVALUATIONS, 1)}",
            "ppo.train_scale_dir=true",
            f"ppo.steps={steps}",
            *(["model.num_steps=null", "model.num_points=null", "data.predictor_snapshot=given"] if start else []),
            *overrides,
        ],
    )
    config.run.output_root = str(outdir / "run")
    if start is not None:
        config.data.predictor_snapshot = str(start)  # not as an override, which would read the name as YAML
    check_files(config)
    if not config.evaluation.interval or not config.evaluation.grid_images:
        raise UserError("evaluation.interval and evaluation.grid_images must be above 0: there is nothing to show")
    return config


def train_hacked(config: Config, device: str) -> int:
    """Train in a new run folder; returns the number of the signal that ended the run early, or 0."""
    with distributed.joined(device):
        where, batch_size = distributed.device(), config.reward.batch_size
        net = load_backbone(config)
        held_out = create_reward(HELD_OUT, device=where, batch_size=batch_size)
        models = Models(net, RewardMix.of(SaturationReward()), [held_out])
        return train(config, Inputs(start_table(config), *split_prompts(config)), models, "never")


def summary(directory: RunDirectory, device: str) -> dict:
    """What `hacking.json` holds of a run on `device`, cpu or cuda.

    `best_step` is that of the first evaluation with the highest held-out mean.
    """
    config, start = directory.read()
    records = [json.loads(line) for line in directory.evaluations.read_text(encoding="utf-8").splitlines()]
    kept = ("step", "images", "prompts", "reward_mean", f"{HELD_OUT}_mean", "diverging")
    evaluations = [{name: record[name] for name in kept} for record in records]
    return {
        "trained": SaturationReward.name,
        "held_out": HELD_OUT,
        "best_step": max(evaluations, key=lambda record: record[f"{HELD_OUT}_mean"])["step"],
        "evaluations": evaluations,
        "machine": machine(device),
        "start_table_sha256": start.sha256(),
        "settings": {name: value for name, value in flatten(config).items() if name.startswith(("model.", "ppo."))},
    }


def draw_curve(axes, evaluations: Sequence[dict], field: str, label: str, best_step: int) -> None:
    steps = [record["step"] for record in evaluations]
    values = [record[f"{field}_mean"] for record in evaluations]
    axes.plot(steps, values, color=COLOURS[field], marker="o", linewidth=1.5, markersize=4)
    axes.axvline(best_step, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_title(label, fontsize=10, color=COLOURS[field])
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(found: dict, directory: RunDirectory, path: Path) -> None:
    """Curves on the left, the sample grids of the best, the first flagged and the last evaluation beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    evaluations, best_step = found["evaluations"], found["best_step"]
    by_step = {record["step"]: record for record in evaluations}
    flagged = [record["step"] for record in evaluations if record["diverging"]]
    shown = {"best held-out": best_step}
    if flagged:
        shown["first flagged"] = flagged[0]
    shown["last"] = evaluations[-1]["step"]
    figure = pyplot.figure(figsize=(15.5, 4.6), layout="constrained")
    layout = figure.add_gridspec(2, 4, width_ratios=[1.1, 1, 1, 1])
    upper = figure.add_subplot(layout[0, 0])
    lower = figure.add_subplot(layout[1, 0], sharex=upper)
    draw_curve(upper, evaluations, "reward", f"{found['trained']} (trained)", best_step)
    draw_curve(lower, evaluations, HELD_OUT, f"{HELD_OUT} (held out)", best_step)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("step (dashed: best held-out)")
    for column, (caption, step) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(layout[:, column])
        with Image.open(directory.sample_grid(step)) as grid:
            axes.imshow(grid.convert("RGB"), interpolation="none")
        record = by_step[step]
        means = f"{found['trained']} {record['reward_mean']:.4f}, {HELD_OUT} {record[f'{HELD_OUT}_mean']:.4f}"
        axes.set_title(f"{caption}: step {step}\n{means}", fontsize=10)
        axes.axis("off")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    pyplot.close(figure)


@click.command(help=__doc__, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--outdir", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--steps", metavar="INT", type=click.IntRange(1), default=100, help="Training steps of 32 images")
@click.option(
    "--start",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Table to start from",
    show_default="the cold-start table",
)
@click.option(
    "--override", "overrides", metavar="KEY=VALUE", multiple=True, help="Change one key of the preset; repeatable"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the models run")
@user_errors
def main(outdir: Path, steps: int, start: Path | None, overrides: tuple[str, ...], device: str) -> None:
    config, device = hacking_config(outdir, steps, start, overrides), parse_device(device)
    signum = train_hacked(config, device)
    if signum:
        sys.exit(128 + signum)
    newest = max(path for path in Path(config.run.output_root).iterdir() if path.is_dir())  # names begin with the time
    directory = RunDirectory(newest)
    found = summary(directory, device)
    atomic_write_text(outdir / "hacking.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    save_figure(found, directory, outdir / "hacking.png")
    click.echo(f"{outdir / 'hacking.json'}, hacking.png: best held-out at step {found['best_step']}")


if __name__ == "__main__":
    main()
