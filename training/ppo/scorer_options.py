"""The command line options that all `score_*` commands share; imports click only, so that `--help` is quick."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import click

from torch_utils.options import cache_dir_option

P = ParamSpec("P")
R = TypeVar("R")

FILE = click.Path(path_type=Path)
pattern_option = click.option("--pattern", metavar="GLOB", default="**/*.png", help="which files below the folder")
prompts_option = click.option(
    "--prompts", metavar="FILE", type=FILE, help="prompts, for folders without a manifest.jsonl"
)
batch_size_option = click.option("--batch-size", type=click.IntRange(min=1), default=32, help="images per forward")
device_option = click.option("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, ...")
amp_option = click.option(
    "--amp",
    is_flag=True,
    help="half precision on a GPU; changes the fourth digit; published scores of HPSv2 and CLIPScore have it",
)
GROUPS = {
    "What to score": ("images", "pattern", "prompts", "output_json"),
    "Metric": ("metric", "version", "architecture", "weights", "backbone", "vocabulary", "amp"),
    "Machine": ("batch_size", "cache_dir", "device"),
}
OPTIONS = (
    click.option("--images", metavar="DIR", type=FILE, required=True, help="folder of images to score"),
    pattern_option,
    prompts_option,
    click.option("--output-json", metavar="FILE", type=FILE, help="write the summary and the score of each image here"),
    batch_size_option,
    cache_dir_option,
    device_option,
)


@dataclass(frozen=True)
class ScoreRequest:
    """The options that all `score_*` commands share."""

    images: Path
    pattern: str
    prompts: Path | None
    output_json: Path | None
    batch_size: int
    device: str


def scorer_options(command: Callable[Concatenate[ScoreRequest, P], R]) -> Callable[..., R]:
    """Give a click command the shared options; it gets them as its first argument, and its own ones by name."""

    @functools.wraps(command)
    def with_request(
        images: Path,
        pattern: str,
        prompts: Path | None,
        output_json: Path | None,
        batch_size: int,
        device: str,
        *args: P.args,
        **own: P.kwargs,
    ) -> R:
        return command(ScoreRequest(images, pattern, prompts, output_json, batch_size, device), *args, **own)

    for option in reversed(OPTIONS):
        with_request = option(with_request)
    return with_request
