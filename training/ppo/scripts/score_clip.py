"""Score a folder of images with CLIPScore: the cosine of OpenAI's CLIP ViT-L/14.

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_clip --images samples/learned --output-json results/clip.json
"""

from __future__ import annotations

import functools
from pathlib import Path

import click

from torch_utils.errors import user_errors
from torch_utils.options import command
from training.ppo.scorer_options import FILE, GROUPS, ScoreRequest, amp_option, scorer_options


@command(GROUPS, help=__doc__)
@scorer_options
@click.option(
    "--weights",
    metavar="PATH",
    type=FILE,
    show_default="fetched",
    help="model.safetensors of openai/clip-vit-large-patch14, or its folder",
)
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.clip import RewardCLIP
    from training.ppo.scoring import score_folder

    score_folder(request, RewardCLIP.name, functools.partial(RewardCLIP, weights, amp=amp))


if __name__ == "__main__":
    main()
