"""Compares our scorers with the original packages: python -m tests.parity.compare --oracle FOLDER, from the repository.

FOLDER is the environment that setup.sh made. Images and random checkpoints are written as needed, both sides score
them, and a Markdown table of the differences is printed; the exit code is 1 where one is above `TOLERANCE`. A
checkpoint of one's own can be put in the data folder under the name of the random one (see `CASES`), to the same end
with published weights. `--size real` writes 10 GB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parity.images import write_images
from tests.parity.weights import METRICS, SIZES, Sizes, write_weights
from training.images import load_image
from training.ppo.reward_base import Reward
from training.ppo.reward_models.clip_backbone import ClipSizes, Tower

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "open_clip_torch", "numpy", "pillow", "ftfy")
# Of the original's score or, where that is nearer to 0, of the spread of its scores.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """How both sides read one metric's checkpoints; the files' names begin with "tiny-" or "real-"."""

    files: dict[str, str]  # option of oracle.py => file
    ours: Callable[[Path, str, Path], Reward]  # from the folder of the checkpoints, the size and the environment
    sizes: tuple[str, ...] = ("tiny", "real")


def clip_sizes(sizes: Sizes, activation: str) -> ClipSizes:
    """The same in our scorers' terms."""
    vision = Tower(sizes.vision_width, sizes.vision_layers, sizes.vision_width // sizes.head, 4 * sizes.vision_width)
    text = Tower(sizes.text_width, sizes.text_layers, sizes.text_width // 64, 4 * sizes.text_width)
    return ClipSizes(vision, text, sizes.embedding, activation, sizes.patch, sizes.image)


def our_hps(folder: Path, size: str, environment: Path) -> Reward:
    import open_clip

    from training.ppo.reward_hps import RewardHPS

    if size == "real":
        return RewardHPS(folder / "real-hps.pt")
    open_clip.add_model_config(folder / "tiny-hps.json")
    return RewardHPS(folder / "tiny-hps.pt", architecture="tiny-hps")


def our_clip(folder: Path, size: str, environment: Path) -> Reward:
    from training.ppo.reward_models.clip import RewardCLIP

    sizes = clip_sizes(SIZES["clip", size], "quick_gelu")
    return RewardCLIP(folder / f"{size}-clip.safetensors", sizes=sizes)


def our_aesthetic(folder: Path, size: str, environment: Path) -> Reward:
    from training.ppo.reward_models.aesthetic import RewardAesthetic

    sizes = clip_sizes(SIZES["clip", size], "quick_gelu")
    backbone = folder / f"{size}-clip.safetensors"
    return RewardAesthetic(folder / f"{size}-aesthetic.pth", backbone=backbone, sizes=sizes)


def our_pick(folder: Path, size: str, environment: Path) -> Reward:
    from training.ppo.reward_models.pick import RewardPick

    return RewardPick(folder / f"{size}-pick.safetensors", sizes=clip_sizes(SIZES["hps", size], "gelu"))


def our_imagereward(folder: Path, size: str, environment: Path) -> Reward:
    from training.ppo.reward_models.imagereward import RewardImageReward

    return RewardImageReward(folder / f"{size}-imagereward.pt", vocabulary=environment / "vocab.txt")


CASES = {
    "hps": Case({"weights": "hps.pt", "model-config": "hps.json"}, our_hps),
    "clip": Case({"weights": "clip.pt"}, our_clip),
    "aesthetic": Case({"weights": "aesthetic.pth", "backbone": "clip.pt"}, our_aesthetic),
    "pick": Case({"weights": "pick.safetensors", "model-config": "pick.json"}, our_pick),
    "imagereward": Case({"weights": "imagereward.pt"}, our_imagereward, ("real",)),
}


def ask_oracle(environment: Path, metric: str, size: str, data: Path, pixels: Path) -> dict:
    """What oracle.py writes about the images in `data`; the folder `pixels` takes the resized ones."""
    weights = data / "weights"
    command = [environment / "bin" / "python", Path(__file__).with_name("oracle.py"), "--metric", metric]
    for option, name in CASES[metric].files.items():
        command += [f"--{option}", weights / f"{size}-{name}"]
    if metric == "imagereward":
        command += ["--bert-vocabulary", environment / "vocab.txt"]
    command += ["--images", data / "images", "--prompts", data / "prompts.json", "--pixels", pixels]
    output = pixels.with_suffix(".json")
    # The oracle must not find this project, nor the packages of this interpreter.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*command, "--output", output], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"oracle.py failed for {metric}:\n{done.stderr}")
    return json.loads(output.read_text(encoding="utf-8"))


def our_scores(scorer: Reward, folder: Path, pairs: list[dict]) -> list[float]:
    """One pair at a time, as the images have different sizes; NaN where `folder` lacks the image."""
    scores = []
    for pair in pairs:
        path = folder / pair["image"]
        with torch.inference_mode():
            known = scorer.score(load_image(path)[None], [pair["prompt"]]).item() if path.exists() else math.nan
        scores.append(known)
    return scores


@dataclass(frozen=True)
class Comparison:
    """Both sides' scores of one metric.

    `ours_resized` are our scores of the pictures as the original resized them, None where it resizes tensors.
    """

    metric: str
    size: str
    oracle: dict
    ours: list[float]
    ours_resized: list[float] | None

    def differences(self, ours: list[float]) -> list[tuple[dict, float, float, float]]:
        """Pair, the original's score, ours and their relative difference, where the original has a score."""
        scored = [(pair, pair["score_rgb"], own) for pair, own in zip(self.oracle["pairs"], ours, strict=True)]
        scored = [(pair, his, own) for pair, his, own in scored if his is not None]
        spread = statistics.pstdev(his for _, his, _ in scored)
        return [(pair, his, own, abs(own - his) / max(abs(his), spread)) for pair, his, own in scored]

    def largest(self, ours: list[float]) -> float:
        """The largest relative difference."""
        return max(relative for _, _, _, relative in self.differences(ours))

    @property
    def agrees(self) -> bool:
        """Whether no difference is above `TOLERANCE`."""
        return self.largest(self.ours) <= TOLERANCE

    def table_row(self) -> str:
        """A row of the Markdown table."""
        rows = self.differences(self.ours)
        scores = [his for _, his, _, _ in rows]
        resized = f"{self.largest(self.ours_resized):.1e}" if self.ours_resized else "the same"
        cells = [self.metric, self.size, f"{len(rows)} of {len(self.ours)}", f"{min(scores):.4f} to {max(scores):.4f}"]
        return f"| {' | '.join([*cells, f'{self.largest(self.ours):.1e}', resized])} |"

    def notes(self) -> list[str]:
        """What the table has no place for: how the original loaded, where it fails, what conversion changes."""
        notes = [f"loaded with {json.dumps(self.oracle['loading'])}"]
        for pair, own in zip(self.oracle["pairs"], self.ours, strict=True):
            if pair["error"]:
                notes.append(f"original fails on {pair['image']} ({pair['error']}); ours {own:.6f}")
            elif pair["score"] != pair["score_rgb"]:
                notes.append(f"original of {pair['image']}: {pair['score']:.6f}, as RGB {pair['score_rgb']:.6f}")
        worst = sorted(self.differences(self.ours), key=lambda row: -row[3])[:3]
        notes += [
            f"{pair['image']}, original {his:.7f}, ours {own:.7f}, relative {relative:.1e}"
            for pair, his, own, relative in worst
        ]
        return [f"{self.metric}: {note}" for note in notes]


def compare(environment: Path, metric: str, size: str, data: Path) -> Comparison:
    """Score with both sides; images and weights are written to the folder `data` where it lacks them."""
    weights = data / "weights"
    if not (data / "prompts.json").exists():
        write_images(data)
    if not all((weights / f"{size}-{name}").exists() for name in CASES[metric].files.values()):
        write_weights(weights, size, [metric])
    with tempfile.TemporaryDirectory() as temporary:
        pixels = Path(temporary) / "pixels"
        pixels.mkdir()
        oracle = ask_oracle(environment, metric, size, data, pixels)
        scorer = CASES[metric].ours(weights, size, environment)
        ours = our_scores(scorer, data / "images", oracle["pairs"])
        resized = our_scores(scorer, pixels, oracle["pairs"]) if any(pixels.iterdir()) else None
    return Comparison(metric, size, oracle, ours, resized)


def report(comparisons: list[Comparison]) -> str:
    """Table, versions and notes in Markdown."""
    lines = [
        "| metric | weights | pairs scored | original scores | largest relative difference | with its resized pixels |",
        "|" + "---|" * 6,
        *(comparison.table_row() for comparison in comparisons),
        "",
    ]
    own = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    for who, versions in (("Original", comparisons[0].oracle["versions"]), ("Ours", own)):
        lines += [f"{who}: {', '.join(f'{name} {version}' for name, version in versions.items())}.", ""]
    lines += [f"- {note}" for comparison in comparisons for note in comparison.notes()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--oracle", type=Path, required=True, help="environment that setup.sh made")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "epd-parity-data")
    parser.add_argument("--size", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--metric", choices=METRICS, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    metrics = arguments.metric or [metric for metric in METRICS if arguments.size in CASES[metric].sizes]
    for metric in metrics:
        if arguments.size not in CASES[metric].sizes:
            parser.error(f"{metric} has no {arguments.size} size")
    comparisons = []
    for metric in metrics:
        comparisons.append(compare(arguments.oracle, metric, arguments.size, arguments.data))
        print(comparisons[-1].table_row(), file=sys.stderr, flush=True)
    print(report(comparisons), end="")
    if not all(comparison.agrees for comparison in comparisons):
        sys.exit(1)


if __name__ == "__main__":
    main()
