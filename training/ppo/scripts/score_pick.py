"""Score a folder of images with PickScore v1.

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_pick --images samples/learned --output-json results/pick.json
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
    help="model.safetensors of yuvalkirstain/PickScore_v1, or its folder",
)
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, amp: bool) -> None:
    from training.ppo.reward_models.pick import RewardPick
    from training.ppo.scoring import score_folder

    score_folder(request, RewardPick.name, functools.partial(RewardPick, weights, amp=amp))


if __name__ == "__main__":
    main()
