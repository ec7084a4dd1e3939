"""Judging the mean table: always the same held-out prompts and the same noise, so that evaluations compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils import distributed
from torch_utils.seeds import derive_seed
from training.denoisers.base import Denoiser
from training.images import to_uint8
from training.ppo.config import EvaluationConfig
from training.ppo.reward_base import Reward
from training.ppo.reward_mix import RewardMix
from training.ppo.rl_runner import ImageScorer
from training.table import SolverTable


@dataclass(frozen=True)
class Evaluation:
    """Scores of M held-out prompts, the same on every rank."""

    # [M] float64 by metric: "reward" is what is trained on; of a mix the raw scores and of the metrics all, by their
    # names. They may be NaN or infinite.
    scores: dict[str, Tensor]
    images: Tensor  # [G, 3, H, W] float32 in [0, 1] on the CPU: the first G pictures


class MeanTableEvaluator:
    """Makes and scores one image per held-out prompt; the ranks share out the prompts."""

    def __init__(
        self,
        net: Denoiser,
        mix: RewardMix,
        metrics: Sequence[Reward],
        prompts: Sequence[str],
        start: SolverTable,
        evaluation: EvaluationConfig,
        micro_batch: int | None,
    ):
        """`mix` is what is trained on, with statistics of its own; `metrics` are only reported."""
        self.mix = mix
        self.scorer = ImageScorer(net, mix, start, micro_batch, metrics)
        self.names = [reward.name for reward in self.scorer.rewards]
        self.prompts = list(prompts)
        self.seeds = [derive_seed(evaluation.seed, "evaluation-noise", index) for index in range(len(prompts))]
        self.grid_images = evaluation.grid_images

    def evaluate(self, table: SolverTable) -> Evaluation:
        """Scores and pictures of `table`."""
        scores = [torch.zeros(0, len(self.names), dtype=torch.float64)]
        pictures = []
        for batch in self.scorer.batches(distributed.shard(len(self.prompts))):
            rows = slice(batch.start, batch.stop)
            images = self.scorer.images(table, self.prompts[rows], self.seeds[rows])
            scores.append(self.scorer.scores(images, self.prompts[rows]))
            wanted = images[: max(self.grid_images - batch.start, 0)]
            if len(wanted):
                pictures.append(to_uint8(wanted).cpu())
        # Parts of unequal length, so as objects; shards follow each other in rank order.
        gathered = distributed.all_gather_objects((torch.cat(scores), pictures))
        whole = torch.cat([part for part, _ in gathered])
        trained = whole[:, : len(self.mix.rewards)]
        if not self.mix.has_observed:
            self.mix.observe(trained)
        named = dict(zip(self.names, whole.unbind(1), strict=True))
        if self.mix.is_plain:
            named.pop(self.names[0])
        grid = [batch.permute(0, 3, 1, 2).float() / 255 for _, part in gathered for batch in part]
        return Evaluation(
            scores={"reward": self.mix.combine(trained), **named},
            images=torch.cat(grid) if grid else torch.zeros(0, 3, 1, 1),
        )
