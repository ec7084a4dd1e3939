"""Score a folder of images with ImageReward v1.0, on its authors' scale: roughly -2 to 2."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import user_errors
from training.ppo.scorer_options import FILE, ScoreRequest, amp_option, scorer_options


@click.command(help=__doc__)
@scorer_options
@click.option("--weights", metavar="PATH", type=FILE, help="ImageReward.pt, or its folder  [default: fetched]")
@click.option(
    "--vocabulary",
    metavar="PATH",
    type=FILE,
    help="vocab.txt of google-bert/bert-base-uncased, or its folder  [default: beside the weights, or fetched]",
)
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, vocabulary: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.imagereward import RewardImageReward
    from training.ppo.scoring import score_folder

    options = {"vocabulary": vocabulary, "batch_size": request.batch_size, "amp": amp}
    score_folder(request, RewardImageReward.name, lambda device: RewardImageReward(weights, device=device, **options))


if __name__ == "__main__":
    main()
