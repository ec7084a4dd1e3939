"""Score a folder of images with HPSv2 (Human Preference Score); v2.1 is the reward of PPO on Stable Diffusion.

--version embedded takes the embedded model's own judge of preference instead, for its pictures: nothing is downloaded,
and the scores are those of score_emoji.

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_hps --images samples/learned --output-json results/hps.json
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
    "--weights", metavar="FILE", type=FILE, show_default="fetched on first use", help="HPS_v2.1_compressed.pt"
)
@click.option("--version", type=click.Choice(["v2.1", "v2.0", "embedded"]), default="v2.1", help="of HPSv2")
@click.option("--architecture", default="ViT-H-14", help="open_clip model that the weights are for")
@amp_option
@user_errors
def main(request: ScoreRequest, weights: Path | None, version: str, architecture: str, amp: bool) -> None:
    from training.ppo.reward_hps import RewardHPS
    from training.ppo.reward_multi import create_reward
    from training.ppo.scoring import score_folder

    if version == "embedded":
        load_embedded = functools.partial(create_reward, "emoji_reward", weights=weights, amp=amp)
        score_folder(request, "emoji_reward", load_embedded)
        return
    load = functools.partial(RewardHPS, weights, amp=amp, architecture=architecture, version=version)
    score_folder(request, f"hps_{version}", load)


if __name__ == "__main__":
    main()
