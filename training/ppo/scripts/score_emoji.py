"""Score a folder of images with the embedded model's reward, or with the held-out judge that training never saw."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import user_errors
from training.ppo.scorer_options import FILE, ScoreRequest, scorer_options


@click.command(help=__doc__)
@scorer_options
@click.option("--metric", type=click.Choice(["reward", "heldout"]), default="reward", show_default=True)
@click.option("--weights", metavar="DIR", type=FILE, help="CLIP folder  [default: src/embedded/reward or .../heldout]")
@user_errors
def main(request: ScoreRequest, metric: str, weights: Path | None) -> None:
    from training.ppo.reward_multi import create_reward
    from training.ppo.scoring import score_folder

    reward_type = f"emoji_{metric}"
    score_folder(
        request,
        reward_type,
        lambda device: create_reward(reward_type, weights=weights, device=device, batch_size=request.batch_size),
    )


if __name__ == "__main__":
    main()
