"""Score a folder of images with ImageReward v1.0, on its authors' scale: roughly -2 to 2.

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_imagereward --images samples/learned --output-json results/imagereward.json
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
@click.option("--weights", metavar="PATH", type=FILE, show_default="fetched", help="ImageReward.pt, or its folder")
@click.option(
    "--vocabulary",
    metavar="PATH",
    type=FILE,
    show_default="beside the weights, or fetched",
    help="vocab.txt of google-bert/bert-base-uncased, or its folder",
)
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, vocabulary: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.imagereward import RewardImageReward
    from training.ppo.scoring import score_folder

    score_folder(
        request, RewardImageReward.name, functools.partial(RewardImageReward, weights, vocabulary=vocabulary, amp=amp)
    )


if __name__ == "__main__":
    main()
