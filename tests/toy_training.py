"""A toy that trains in seconds: a backbone whose slope is known exactly, and a reward that wants the data's mean.

As a program, `toy_training.py CONFIG auto|never|RUN_DIR [override ...]` trains it, alone or under torchrun.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_utils import distributed
from training.ppo.config import Config, load_config
from training.ppo.inputs import Inputs, split_prompts, start_table
from training.ppo.launch import Models, train
from training.ppo.reward_mix import RewardMix

STD = 0.1

CONFIG = """
run: {{output_root: {root}/exps, run_name: toy}}
data: {{prompt_csv: {root}/prompts.txt}}
model: {{dataset_name: toy, schedule_type: polynomial, schedule_rho: 3.0, num_steps: 4, num_points: 2}}
ppo: {{steps: 4, rollout_batch_size: 16, rloo_k: 4}}
evaluation: {{interval: 2, prompt_file: {root}/held_out.txt, num_prompts: 6, grid_images: 4, metrics: [toy_spread]}}
logging: {{save_interval: 2, tensorboard: false}}
"""


def colour(prompt: str) -> list[float]:
    """Three numbers in [-0.5, 0.5] that stand for what the prompt asks for."""
    return [byte / 255 - 0.5 for byte in hashlib.sha256(prompt.encode()).digest()[:3]]


@dataclass(frozen=True)
class ToyCond:
    means: Tensor  # [B, 3]

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, rows: slice) -> ToyCond:
        return ToyCond(self.means[rows])

    def repeat_interleave(self, k: int) -> ToyCond:
        return ToyCond(self.means.repeat_interleave(k, dim=0))


class ToyDenoiser:
    """Data N(colour of the prompt, STD^2) in every pixel; latents are the pixels."""

    sigma_min, sigma_max = 0.02, 20.0
    img_channels, img_resolution = 3, 4
    is_flow = False
    guidance_rate = 1.0

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)
        self.calls = self.rows = 0

    def slope(self, x: Tensor, sigma: Tensor, cond: ToyCond) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        return sigma * (x - cond.means[:, :, None, None]) / (STD**2 + sigma**2)

    def encode_prompts(self, prompts: list[str]) -> ToyCond:
        return ToyCond(torch.tensor([colour(prompt) for prompt in prompts], dtype=torch.float32, device=self.device))

    def initial_state(self, noise: Tensor, sigma0: float) -> Tensor:
        return noise * sigma0

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()

    def compile_calls(self, compiling: bool) -> None:
        pass


class ToyReward:
    """Minus the mean distance from the prompt's colour: what a solver that leaves noise behind loses."""

    version, weights_sha256, preprocessing, dtype = "1", "0" * 64, "none", "float32"

    def __init__(self, name: str = "toy_reward", power: int = 1):
        self.name = name
        self.power = power

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        wanted = torch.tensor([colour(prompt) for prompt in prompts], dtype=torch.float64, device=images.device)
        distance = (images.double() * 2 - 1 - wanted[:, :, None, None]).abs()
        return -distance.pow(self.power).flatten(1).mean(1).float()

    def count_truncated(self, prompts: list[str]) -> int:
        return 0


def write_files(root: Path) -> Path:
    """The prompt files and the configuration of a toy run below `root`; returns the configuration's path."""
    (root / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(10)))
    (root / "held_out.txt").write_text("".join(f"held out {n}\n" for n in range(6)))
    path = root / "toy.yaml"
    path.write_text(CONFIG.format(root=root))
    return path


def toy_inputs(config: Config) -> Inputs:
    return Inputs(start_table(config), *split_prompts(config))


def toy_models(device: str = "cpu") -> Models:
    return Models(ToyDenoiser(device), RewardMix.of(ToyReward()), [ToyReward("toy_spread", power=2)])


def run_toy(path: Path, resume: str, overrides: list[str], models: Models | None = None, device: str = "cpu") -> int:
    """Train in this process, on "cpu" or "cuda"; returns the number of the signal that ended it, or 0."""
    config = load_config(path, overrides)
    with distributed.joined(device, config.run.timeout_minutes):
        return train(config, toy_inputs(config), models or toy_models(str(distributed.device())), resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signum = run_toy(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.exit(128 + signum if signum else 0)
