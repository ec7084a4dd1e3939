"""Score a folder of images with LAION's aesthetic predictor v2, which does not read the prompts."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import user_errors
from training.ppo.scorer_options import FILE, ScoreRequest, amp_option, scorer_options


@click.command(help=__doc__)
@scorer_options
@click.option("--weights", metavar="PATH", type=FILE, help="sac+logos+ava1-l14-linearMSE.pth  [default: fetched]")
@click.option("--backbone", metavar="PATH", type=FILE, help="CLIP ViT-L/14, file or folder  [default: fetched]")
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, backbone: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.aesthetic import RewardAesthetic
    from training.ppo.scoring import score_folder

    options = {"backbone": backbone, "batch_size": request.batch_size, "amp": amp}
    score_folder(request, RewardAesthetic.name, lambda device: RewardAesthetic(weights, device=device, **options))


if __name__ == "__main__":
    main()
