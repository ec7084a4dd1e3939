"""The published metrics with random weights, in files laid out as published, and a folder of pictures to score."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sd15_measures import prompts
from HPSv2.model import ARCHITECTURE, build_model
from MPS.trainer.models.clip_model import MPSModel
from MPS.trainer.models.cross_modeling import CrossSizes
from torch_utils.checkpoint import atomic_write_text
from training.images import quantize, save_png
from training.manifest import MANIFEST, image_name
from training.ppo.reward_base import Reward
from training.ppo.reward_hps import RewardHPS
from training.ppo.reward_models.aesthetic import AestheticHead, RewardAesthetic
from training.ppo.reward_models.clip import RewardCLIP
from training.ppo.reward_models.clip_backbone import CLIP_H, CLIP_L, ClipSizes, Tower
from training.ppo.reward_models.imagereward import (
    BLIP_TOKENS,
    PUBLISHED_SIZES,
    ImageRewardNetwork,
    ImageRewardSizes,
    RewardImageReward,
)
from training.ppo.reward_models.mps import MPSSizes, RewardMPS
from training.ppo.reward_models.pick import RewardPick

# What `tiny` makes of the sizes, so that the whole benchmark runs on a CPU in seconds.
TINY_ARCHITECTURE = "ViT-S-32-alt"  # the smallest that open_clip knows
TINY_TOWERS = Tower(32, 2, 2, 64), Tower(16, 2, 2, 32)
TINY_CLIP = ClipSizes(*TINY_TOWERS, projection=16, activation="gelu", patch=56)
TINY_IMAGEREWARD = ImageRewardSizes(*TINY_TOWERS, patch=56)
TINY_MPS = MPSSizes(TINY_CLIP, CrossSizes(layers=2, heads=2, head_width=8))

# In bert-base-uncased, whose other tokens before these are [unused0] and so on.
SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}

# Standard deviation of each pixel, in [-1, 1]. PNGs of 512 x 512 then take 0.37 MB and 8 ms to decode; those of a
# photograph take 0.41 MB and 9 ms.
GRAIN = 0.016
WRITTEN_AT_ONCE = 100


def random_reward(metric: str, folder: Path, device: torch.device, amp: bool, tiny: bool) -> Reward:
    """`metric` of `PUBLISHED` on `device`. Its files are written to `folder` at the first call, and loaded from there.

    Half precision is stored where the published file has it.
    """
    clip_l, clip_h = (TINY_CLIP, TINY_CLIP) if tiny else (CLIP_L, CLIP_H)
    match metric:
        case "hps":
            architecture = TINY_ARCHITECTURE if tiny else ARCHITECTURE
            path = folder / "random_hps.pt"
            _write(path, device, lambda: {"state_dict": build_model(architecture, device).half().state_dict()})
            return RewardHPS(path, device=device, amp=amp, architecture=architecture)
        case "clip":
            return RewardCLIP(_clip(folder, clip_l, device), device=device, amp=amp, sizes=clip_l)
        case "aesthetic":
            head, backbone = folder / "random_aesthetic.pth", _clip(folder, clip_l, device)
            _write(head, device, lambda: AestheticHead(clip_l.projection).state_dict())
            return RewardAesthetic(head, backbone=backbone, device=device, amp=amp, sizes=clip_l)
        case "pick":
            path = folder / "random_pick.safetensors"
            _write(path, device, lambda: _clip_state(clip_h))
            return RewardPick(path, device=device, amp=amp, sizes=clip_h)
        case "imagereward":
            sizes = TINY_IMAGEREWARD if tiny else PUBLISHED_SIZES
            path, vocabulary = folder / "random_imagereward.pt", folder / "vocab.txt"
            _write(path, device, lambda: _imagereward_state(sizes))
            atomic_write_text(vocabulary, _vocabulary(sizes.embeddings - len(BLIP_TOKENS)))
            return RewardImageReward(path, vocabulary=vocabulary, device=device, amp=amp, sizes=sizes)
        case "mps":
            sizes = TINY_MPS if tiny else MPSSizes()
            path = folder / "random_mps.safetensors"
            _write(path, device, lambda: MPSModel(sizes.clip.config(), sizes.cross).half().state_dict())
            return RewardMPS(path, device=device, amp=amp, sizes=sizes)
    raise ValueError(f"no random weights are made for {metric}")


def _clip(folder: Path, sizes: ClipSizes, device: torch.device) -> Path:
    """The CLIP model that `clip` and `aesthetic` share."""
    path = folder / "random_clip.safetensors"
    _write(path, device, lambda: _clip_state(sizes))
    return path


def _clip_state(sizes: ClipSizes) -> dict[str, Tensor]:
    from transformers import CLIPModel

    return CLIPModel(sizes.config()).state_dict()


def _imagereward_state(sizes: ImageRewardSizes) -> dict[str, Tensor]:
    """Layers that keep the size of their input: with transformers' own start values of BLIP's image encoder, of 1e-10,
    all pictures score the same."""
    network = ImageRewardNetwork(sizes)
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return network.published_layout().state_dict()


def _write(path: Path, device: torch.device, content: Callable[[], dict]) -> None:
    """`content()`, whose random numbers are drawn on `device`, into the file `path`, unless that is there."""
    if path.exists():
        return
    from safetensors.torch import save_file

    torch.manual_seed(0)
    unfinished = path.with_suffix(".part")
    with torch.device(device):
        found = content()
    if path.suffix == ".safetensors":
        save_file(found, unfinished, metadata={"format": "pt"})
    else:
        torch.save(found, unfinished)
    unfinished.rename(path)


def _vocabulary(size: int) -> str:
    """Lines of a vocab.txt of `size` tokens: the special ones at BERT's places, then the words of our prompts."""
    tokens = [f"[unused{number}]" for number in range(size)]
    for token, place in SPECIAL_IDS.items():
        tokens[place] = token
    words = dict.fromkeys(word for prompt in prompts(100) for word in prompt.split())
    tokens[1000 : 1000 + len(words)] = words
    return "\n".join(tokens) + "\n"


def pictures(count: int, size: int, device: torch.device, seed: int = 0) -> Tensor:
    """`[count, 3, size, size]` on the 8-bit grid: smooth colours, coarse and fine, under a little grain."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(side: int) -> Tensor:
        return torch.randn(count, 3, side, side, generator=generator, device=device)

    images = GRAIN * noise(size)
    for side in (2, 4, 8, 16, 32):
        images += F.interpolate(noise(side), size=(size, size), mode="bicubic") / (2 * side**0.5)
    return quantize(images)


def write_pictures(folder: Path, count: int, size: int, device: torch.device) -> None:
    """`count` PNGs with a manifest, laid out as by `sample.py`, unless `folder` is there; zlib runs on all cores."""
    if folder.exists():
        return
    unfinished = folder.with_suffix(".part")
    names, texts = [image_name(seed) for seed in range(count)], prompts(count)
    for parent in {(unfinished / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, WRITTEN_AT_ONCE):
            few = names[start : start + WRITTEN_AT_ONCE]
            images = pictures(len(few), size, device, seed=start).cpu()
            list(pool.map(save_png, images, [unfinished / name for name in few]))
    lines = [{"file": name, "seed": seed, "prompt": texts[seed]} for seed, name in enumerate(names)]
    atomic_write_text(unfinished / MANIFEST, "".join(json.dumps(line) + "\n" for line in lines))
    unfinished.rename(folder)
