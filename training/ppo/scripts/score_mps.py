"""Score a folder of images with MPS (Multi-dimensional Preference Score), for the condition "overall".

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_mps --images samples/learned --weights weights/MPS_overall_checkpoint.pth
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
    metavar="FILE",
    type=FILE,
    show_default="in weights/ or cache",
    help="MPS_overall_checkpoint.pth (nothing in it is run), or a .safetensors of it",
)
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.mps import RewardMPS
    from training.ppo.scoring import score_folder

    score_folder(request, RewardMPS.name, functools.partial(RewardMPS, weights, amp=amp))


if __name__ == "__main__":
    main()
