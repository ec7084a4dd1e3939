"""Score a folder of images with MPS (Multi-dimensional Preference Score), for the condition "overall"."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import user_errors
from training.ppo.scorer_options import FILE, ScoreRequest, amp_option, scorer_options


@click.command(help=__doc__)
@scorer_options
@click.option(
    "--weights",
    metavar="FILE",
    type=FILE,
    help="MPS_overall_checkpoint.pth (nothing in it is run), or a .safetensors of it  [default: in weights/ or cache]",
)
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.mps import RewardMPS
    from training.ppo.scoring import score_folder

    options = {"batch_size": request.batch_size, "amp": amp}
    score_folder(request, RewardMPS.name, lambda device: RewardMPS(weights, device=device, **options))


if __name__ == "__main__":
    main()
