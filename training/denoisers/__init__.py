"""Backbones: `create_model` is the only factory; a new backbone is one new file here and one new entry in BACKBONES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_utils.download_util import check_file_by_key, is_hub_id, locate
from torch_utils.resources import SOURCES
from training.denoisers.base import PRECISIONS, Denoiser, ModelError, TextCond
from training.denoisers.replay import COMPILE_MODES
from training.denoisers.single_file import SUFFIXES
from training.denoisers.stable_diffusion import (
    NoiseTable,
    StableDiffusion,
    check_source,
    picture_size,
    read_noise,
    weight_files,
)

__all__ = [
    "BACKBONES",
    "EMBEDDED",
    "Denoiser",
    "Family",
    "ModelError",
    "TextCond",
    "check_model",
    "check_model_schedule",
    "create_model",
    "find_model",
    "model_weights",
    "note_resolution",
]

EMBEDDED = SOURCES / "embedded"


@dataclass(frozen=True)
class Family:
    """A kind of model.

    denoiser      (source, configs, dataset_name, guidance_rate, device, precision, compile_mode) -> its `Denoiser`; the
                  first is the folder or file of the weights, the second see `Backbone`.
    is_flow       as of the `Denoiser`, known here before the weights are.
    check         raises `ModelError` for a folder or file that holds no weights of this kind.
    weight_files  the files of a folder or file of weights.
    noise         the noise levels by the configurations; None: the loaded model alone knows them.
    pixels        the side of its pictures by the configurations; None: the loaded model alone knows it.
    """

    denoiser: Callable[..., Denoiser]
    is_flow: bool = False
    check: Callable[[Path], None] = lambda source: None
    weight_files: Callable[[Path], list[Path]] = lambda source: []
    noise: Callable[[Path], NoiseTable] | None = None
    pixels: Callable[[Path], int] | None = None


STABLE_DIFFUSION = Family(
    StableDiffusion, check=check_source, weight_files=weight_files, noise=read_noise, pixels=picture_size
)


@dataclass(frozen=True)
class Backbone:
    """`configs`: the configurations for weights in a single file, in diffusers' folder layout.

    `asset`: the key by which the weights are downloaded; None where they lie beside the configurations.
    """

    title: str
    configs: Path
    asset: str | None = None
    family: Family = STABLE_DIFFUSION

    def noise(self) -> NoiseTable | None:
        """The noise levels that the configurations tell."""
        return None if self.family.noise is None else self.family.noise(self.configs)


BACKBONES = {
    "emoji": Backbone("the embedded model", EMBEDDED),
    "ms_coco": Backbone("Stable Diffusion v1.5", SOURCES / "stable-diffusion-v1", asset="ms_coco"),
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

    Returns the model's folder or file, or None where it would have to be downloaded.
    """
    _check_arguments(dataset_name, guidance_type, guidance_rate, precision)
    weights = model_weights(dataset_name, model_path)
    source = locate(weights) if isinstance(weights, str) else weights
    if source is not None:
        BACKBONES[dataset_name].family.check(source)
    return source


def _check_arguments(dataset_name: str, guidance_type: str, guidance_rate: float, precision: str) -> None:
    if dataset_name not in BACKBONES:
        raise ModelError(f"unknown dataset_name {dataset_name!r}; use one of {', '.join(BACKBONES)}")
    if guidance_type not in GUIDANCE_TYPES:
        raise ModelError(f"unknown guidance_type {guidance_type!r}; use one of {', '.join(GUIDANCE_TYPES)}")
    if not 0 <= guidance_rate < float("inf"):
        raise ModelError(f"guidance_rate {guidance_rate} must be a number from 0 on (1 is unguided)")
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")


def model_weights(dataset_name: str, model_path: str | Path | None) -> Path | str:
    """The folder or file of this machine that the weights are in, or their key for `check_file_by_key`."""
    if model_path is None:
        backbone = BACKBONES[dataset_name]
        return backbone.asset or backbone.configs
    path = Path(model_path)
    is_id = is_hub_id(str(model_path)) and path.suffix not in SUFFIXES and not path.exists()
    return str(model_path) if is_id else path


def check_model_schedule(dataset_name: str, schedule_type: str) -> None:
    """Raise `ModelError` for the schedule type of flow models on a backbone of BACKBONES that is none."""
    backbone = BACKBONES[dataset_name]
    if schedule_type == "flowmatch" and not backbone.family.is_flow:
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
    """The folder or file that `create_model` will read, downloaded if need be; arguments and errors are the same."""
    _check_arguments(dataset_name, guidance_type, guidance_rate, precision)
    weights = model_weights(dataset_name, model_path)
    source = check_file_by_key(weights) if isinstance(weights, str) else weights
    BACKBONES[dataset_name].family.check(source)
    return source


def note_resolution(dataset_name: str, source: Path, claimed: int | None) -> str | None:
    """One line where a table's `img_resolution` is not the model's in pixels, known from its configurations alone.

    `source` is what `find_model` gave. The published Stable Diffusion v1.5 tables claim 1024 and were made at 512.
    """
    backbone = BACKBONES[dataset_name]
    if claimed is None or backbone.family.pixels is None:
        return None
    pixels = backbone.family.pixels(source if source.is_dir() else backbone.configs)
    if claimed == pixels:
        return None
    return f"note: the table says {claimed} pixels, the model makes {pixels}: pictures of {pixels} are made"


def create_model(
    dataset_name: str,
    guidance_type: str = "cfg",
    guidance_rate: float = 7.5,
    device: torch.device | str = "cpu",
    model_path: str | Path | None = None,
    precision: str = "float32",
    compile_mode: str = "off",
) -> Denoiser:
    """Load a frozen backbone.

    dataset_name   "ms_coco" (Stable Diffusion v1.5) or "emoji" (the embedded model).
    guidance_type  "cfg", classifier-free guidance.
    guidance_rate  guidance scale >= 0; 1 is unguided.
    model_path     a local folder in diffusers' layout; a .safetensors or .ckpt file in the original CompVis layout
                   (`load_single_file`); owner/name[@revision] of the Hugging Face hub (`check_file_by_key`); None: the
                   checkout, the cache or a download of the pinned revision.
    precision      of the network: float32, float16 or bfloat16.
    compile_mode   off, default or max: torch.compile on a GPU, see `Replayed`; changes results by rounding only.

    Raises `ModelError` or `DownloadError`, one line, when the weights or the arguments will not do.
    """
    if compile_mode not in COMPILE_MODES:
        raise ModelError(f"unknown compile_mode {compile_mode!r}; use one of {', '.join(COMPILE_MODES)}")
    source = find_model(dataset_name, guidance_type, guidance_rate, model_path, precision)
    backbone, device = BACKBONES[dataset_name], torch.device(device)
    model = source, backbone.configs, dataset_name, guidance_rate, device, precision, compile_mode
    try:
        return backbone.family.denoiser(*model)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{device} has not the memory that the model itself takes in {precision}; choose float16 or bfloat16, or "
            "another GPU, or end what else runs there"
        ) from error
