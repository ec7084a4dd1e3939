"""Backbones: `create_model` is the only factory; a new backbone is one new file here and one new entry in BACKBONES."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from torch_utils.download_util import check_file_by_key, locate
from training.denoisers.base import PRECISIONS, Denoiser, ModelError, TextCond
from training.denoisers.stable_diffusion import StableDiffusion, check_folder

__all__ = [
    "BACKBONES",
    "EMBEDDED",
    "Denoiser",
    "ModelError",
    "TextCond",
    "check_model",
    "check_model_schedule",
    "create_model",
    "find_model",
]

EMBEDDED = Path(__file__).resolve().parents[2] / "src" / "embedded"


@dataclass(frozen=True)
class Backbone:
    """`folder`: where the weights lie in the checkout; `asset`: or the key by which they are downloaded.

    `is_flow`: as of its Denoiser, known here before the weights are.
    """

    title: str
    folder: Path | None = None
    asset: str | None = None
    is_flow: bool = False


BACKBONES = {
    "emoji": Backbone("the embedded model", folder=EMBEDDED),
    "ms_coco": Backbone("Stable Diffusion v1.5", asset="ms_coco"),
}
GUIDANCE_TYPES = ("cfg",)


def check_model(
    dataset_name: str,
    guidance_type: str = "cfg",
    guidance_rate: float = 7.5,
    model_path: str | Path | None = None,
    precision: str = "float32",
) -> Path | None:
    """Raise `ModelError` for arguments that `create_model` cannot serve, without loading or downloading anything.

    Returns the model's folder, or None where it would have to be downloaded.
    """
    if dataset_name not in BACKBONES:
        raise ModelError(f"unknown dataset_name {dataset_name!r}; use one of {', '.join(BACKBONES)}")
    if guidance_type not in GUIDANCE_TYPES:
        raise ModelError(f"unknown guidance_type {guidance_type!r}; use one of {', '.join(GUIDANCE_TYPES)}")
    if not 0 <= guidance_rate < float("inf"):
        raise ModelError(f"guidance_rate {guidance_rate} must be a number from 0 on (1 is unguided)")
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    backbone = BACKBONES[dataset_name]
    folder = Path(model_path) if model_path is not None else backbone.folder or locate(backbone.asset)
    if folder is not None:
        check_folder(folder)
    return folder


def check_model_schedule(dataset_name: str, schedule_type: str) -> None:
    """Raise `ModelError` for the schedule type of flow models on a backbone of BACKBONES that is none."""
    backbone = BACKBONES[dataset_name]
    if schedule_type == "flowmatch" and not backbone.is_flow:
        raise ModelError(
            f"schedule flowmatch is for flow models; use discrete or polynomial for {dataset_name}, {backbone.title}"
        )


def find_model(
    dataset_name: str,
    guidance_type: str = "cfg",
    guidance_rate: float = 7.5,
    model_path: str | Path | None = None,
    precision: str = "float32",
) -> Path:
    """The folder that `create_model` will read, downloaded if need be; arguments and errors are the same."""
    folder = check_model(dataset_name, guidance_type, guidance_rate, model_path, precision)
    if folder is None:
        folder = check_file_by_key(BACKBONES[dataset_name].asset)
        check_folder(folder)
    return folder


def create_model(
    dataset_name: str,
    guidance_type: str = "cfg",
    guidance_rate: float = 7.5,
    device: torch.device | str = "cpu",
    model_path: str | Path | None = None,
    precision: str = "float32",
) -> Denoiser:
    """Load a frozen backbone.

    dataset_name   "ms_coco" (Stable Diffusion v1.5) or "emoji" (the embedded model).
    guidance_type  "cfg", classifier-free guidance.
    guidance_rate  guidance scale >= 0; 1 is unguided.
    model_path     a local folder in diffusers' layout; None: the checkout, the cache or a download.
    precision      of the network: float32, float16 or bfloat16.

    Raises `ModelError` or `DownloadError`, one line, when the weights or the arguments will not do.
    """
    folder = find_model(dataset_name, guidance_type, guidance_rate, model_path, precision)
    return StableDiffusion(folder, dataset_name, guidance_rate, torch.device(device), precision)
