"""Score a folder of images with the embedded model's reward, or with the held-out judge that training never saw.

The summary goes to stdout. Example:

\b
  python -m training.ppo.scripts.score_emoji --metric heldout --images samples/learned --output-json held.json
"""

from __future__ import annotations

import functools
from pathlib import Path

import click

from torch_utils.errors import user_errors
from torch_utils.options import command
from training.ppo.scorer_options import FILE, GROUPS, ScoreRequest, scorer_options


@command(GROUPS, help=__doc__)
@scorer_options
@click.option("--metric", type=click.Choice(["reward", "heldout"]), default="reward", help="which judge")
@click.option(
    "--weights", metavar="DIR", type=FILE, show_default="src/embedded/reward or .../heldout", help="CLIP folder"
)
@user_errors
def main(request: ScoreRequest, metric: str, weights: Path | None) -> None:
    from training.ppo.reward_multi import create_reward
    from training.ppo.scoring import score_folder

    reward_type = f"emoji_{metric}"
    score_folder(request, reward_type, functools.partial(create_reward, reward_type, weights=weights))


if __name__ == "__main__":
    main()
