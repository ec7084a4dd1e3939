"""Stable Diffusion 1.x from one file in the original CompVis layout, into the modules of diffusers and transformers.

The names are converted by diffusers' own functions; what is checked here is that every tensor finds its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_utils.checkpoint import WEIGHT_TYPES, CheckpointError, load_tensors
from training.denoisers.base import DECODER_DTYPES, ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

SUFFIXES = (".safetensors", ".ckpt")
# Part -> what the names of its tensors begin with.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
TITLES = {"unet": "UNet", "vae": "VAE", "text_encoder": "CLIP text encoder"}
POSITION_IDS = "embeddings.position_ids"  # 0 to 76: stored in old files, made anew by transformers


def check_single_file(path: Path) -> None:
    """Raise `ModelError`, one line, for what cannot be a Stable Diffusion 1.x checkpoint.

    Of a .safetensors file the names of the tensors are read, of a .ckpt nothing: that would mean to load it.
    """
    if not path.is_file():
        raise ModelError(f"model file {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise ModelError(f"model file {path} must end in {' or '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
        _check_parts(path, names)


def _check_parts(path: Path, names: list[str]) -> None:
    lacking = [part for part, prefix in PREFIXES.items() if not any(name.startswith(prefix) for name in names)]
    if lacking:
        wanted = ", ".join(f"a {TITLES[part]} ({PREFIXES[part]}*)" for part in lacking)
        raise ModelError(f"{path} lacks {wanted}: no Stable Diffusion 1.x checkpoint in the CompVis layout")


def load_single_file(
    path: Path, configs: Path, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The three networks on the CPU, in `dtype`, the VAE in that of `DECODER_DTYPES`.

    `configs` has their configurations in diffusers' folder layout. Where a file holds averaged (EMA) weights beside the
    trained ones, the trained ones are taken. Raises `ModelError` for a file that is damaged, would run code, or has
    other tensors than the configurations say.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    state = _read(path)
    _check_parts(path, list(state))

    def part(name: str) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key.startswith(PREFIXES[name])}

    def network(name: str, kind: type[ModelMixin], convert: Callable[[dict, dict], dict]) -> torch.nn.Module:
        with torch.device("meta"):  # drawing random weights first would take longer than reading the file
            empty = kind.from_config(kind.load_config(configs / name, local_files_only=True))
        try:
            converted = convert(part(name), dict(empty.config))
        except Exception as error:  # whatever a tensor that is missing or of another shape leads to in there
            raise ModelError(f"{path}: its {TITLES[name]} is none of Stable Diffusion 1.x: {error}") from error
        return _fill(empty, converted, DECODER_DTYPES[dtype] if name == "vae" else dtype, path, name)

    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder", local_files_only=True))
    text = {key.removeprefix(PREFIXES["text_encoder"]): value for key, value in part("text_encoder").items()}
    text.pop(POSITION_IDS, None)
    return (
        network("unet", UNet2DConditionModel, convert_ldm_unet_checkpoint),
        network("vae", AutoencoderKL, convert_ldm_vae_checkpoint),
        _fill(text_encoder, text, dtype, path, "text_encoder"),
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        content = load_tensors(path, "a checkpoint of tensors")
    except CheckpointError as error:
        raise ModelError(f"{error}; take the model's .safetensors file") from error
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds no tensors by name; Stable Diffusion 1.x needed")
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _fill(
    network: torch.nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, path: Path, name: str
) -> torch.nn.Module:
    """`network` with the tensors of `state` as its own, every one used. Raises `ModelError`."""
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    odd = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    untyped = [key for key in wanted if key in state and str(state[key].dtype) not in WEIGHT_TYPES]
    faults = (
        (missing, "lacks"),
        (extra, "has the unknown"),
        (odd, "has another shape of"),
        (untyped, "has no numbers in"),
    )
    for keys, fault in faults:
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"{path}: its {TITLES[name]} {fault} {keys[0]}{more}; Stable Diffusion 1.x needed")
    network.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    return network


def clip_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's tokenizer, which is not in a checkpoint of one file, from the vocabulary that open_clip ships.

    Ids, padding with the end token and lower case as in Stable Diffusion's own folder; cuts at `length` tokens.
    """
    import open_clip
    from transformers import CLIPTokenizer

    source = open_clip.SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {"<start_of_text>": start, "<end_of_text>": end}
    vocab = {names.get(token, token): index for token, index in source.encoder.items()}
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.get)
    return CLIPTokenizer(
        vocab, merges, unk_token=end, bos_token=start, eos_token=end, pad_token=end, model_max_length=length
    )
