"""Stable Diffusion v1.5 and HPSv2.1 with random weights: the real shapes, and so the real times and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from torch_utils import distributed
from training.denoisers import BACKBONES
from training.denoisers.stable_diffusion import StableDiffusion
from training.ppo.reward_base import Reward
from training.ppo.reward_hps import RewardHPS
from training.ppo.reward_models.emoji import RewardEmoji

CONFIGS = BACKBONES["ms_coco"].configs
# What `tiny` makes of the sizes, so that the whole benchmark runs on a CPU in seconds.
TINY = {
    "unet": {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32, "sample_size": 8},
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    },
}


def random_backbone(
    folder: Path, device: torch.device, precision: str, compile_mode: str, tiny: bool
) -> StableDiffusion:
    """Guided by 7.5. Written to `folder` at the first call and loaded from there, as real weights are."""
    configs = folder / ("configs-tiny" if tiny else "configs")
    networks = folder / ("tiny" if tiny else "sd15")
    distributed.on_main(lambda: _write_networks(configs, networks, device, tiny))
    return StableDiffusion(networks, configs, "ms_coco", 7.5, device, precision, compile_mode)


def _write_networks(configs: Path, folder: Path, device: torch.device, tiny: bool) -> None:
    """Unless they are there."""
    if folder.exists():
        return
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shutil.copytree(CONFIGS, configs, dirs_exist_ok=True)
    for part, changes in TINY.items() if tiny else ():
        path = configs / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    unfinished = folder.with_suffix(".part")
    for name, network in (("unet", unet.half()), ("vae", vae), ("text_encoder", text_encoder)):
        network.save_pretrained(unfinished / name)
    shutil.copytree(configs / "scheduler", unfinished / "scheduler")
    unfinished.rename(folder)


def random_reward(folder: Path, device: torch.device, tiny: bool) -> Reward:
    """HPSv2.1, or with `tiny` the embedded model's reward (its real weights), in float32."""
    if tiny:
        return RewardEmoji("emoji_reward", device=device)
    path = folder / "random_hps.pt"
    distributed.on_main(lambda: _write_hps(path, device))
    return RewardHPS(path, device=device)


def _write_hps(path: Path, device: torch.device) -> None:
    """Unless it is there."""
    if path.exists():
        return
    from HPSv2.model import build_model

    torch.manual_seed(0)
    model = build_model(device=device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    unfinished = path.with_suffix(".part")
    torch.save({"state_dict": model.half().state_dict()}, unfinished)
    unfinished.rename(path)
