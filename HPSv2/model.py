"""The CLIP model behind HPSv2, built by open_clip without fetching any pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_utils.checkpoint import CheckpointError, load_tensors
from torch_utils.errors import UserError
from training.ppo.reward_base import looks_like

if TYPE_CHECKING:
    from open_clip import CLIP

ARCHITECTURE = "ViT-H-14"


def build_model(architecture: str = ARCHITECTURE, device: torch.device | str = "cpu") -> CLIP:
    """Build an open_clip CLIP model with random float32 weights, in evaluation mode.

    Its `encode_image` and `encode_text` take `[N, 3, S, S]` float and `[N, context_length]` int64 tensors.
    Raises `UserError` for an architecture that open_clip does not know.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(f"open_clip knows no architecture {architecture!r}; the HPSv2 weights need {ARCHITECTURE!r}")
    # The random start values of the 986 million weights are drawn on the device: seconds faster than on the CPU.
    with torch.device(device):
        model = open_clip.CLIP(**config)
    return model.eval().requires_grad_(False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an HPSv2 checkpoint (a dict with the key `state_dict`) to the CPU; runs no code from it.

    Raises `CheckpointError` for a file that is damaged, would run code, or is the checkpoint of something else.
    """
    content = load_tensors(path, "an HPSv2 checkpoint")
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no HPSv2 checkpoint: it {looks_like(content)}")
    return state
