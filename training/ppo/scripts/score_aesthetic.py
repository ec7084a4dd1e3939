"""Score a folder of images with LAION's aesthetic predictor v2, which does not read the prompts.

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_aesthetic --images samples/learned --output-json results/aesthetic.json
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
@click.option("--weights", metavar="PATH", type=FILE, show_default="fetched", help="sac+logos+ava1-l14-linearMSE.pth")
@click.option("--backbone", metavar="PATH", type=FILE, show_default="fetched", help="CLIP ViT-L/14, file or folder")
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, backbone: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.aesthetic import RewardAesthetic
    from training.ppo.scoring import score_folder

    score_folder(request, RewardAesthetic.name, functools.partial(RewardAesthetic, weights, backbone=backbone, amp=amp))


if __name__ == "__main__":
    main()
