"""Tiny random reward models in the layouts of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TINY_HPS = "tiny-hps"
EMOJI_SIZE = 32
WORDS = ["a", "red", "green", "blue", "apple", "cat", "star", "on", "of", "teal", "background"]


def _shaken(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Fresh layers have zero biases and unit norms, which would hide a mix-up: move every weight."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + 0.2 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def write_clip_file(path: Path, sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """A CLIP model of the shape `sizes` in transformers' layout, fp16, with the buffers of old files; its tensors."""
    from safetensors.torch import save_file
    from transformers import CLIPModel

    torch.manual_seed(seed)
    state = {key: value.half() for key, value in _shaken(CLIPModel(sizes.config()).state_dict(), seed).items()}
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    save_file(state | positions, path, metadata={"format": "pt"})
    return state


def register_tiny_hps(folder: Path) -> None:
    """Make open_clip know the architecture `TINY_HPS`."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / f"{TINY_HPS}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{TINY_HPS}.json")


def write_hps_checkpoint(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint as published: fp16 tensors under `state_dict`; returns the tensors."""
    from HPSv2.model import build_model

    torch.manual_seed(seed)
    state = {key: value.half() for key, value in _shaken(build_model(TINY_HPS).state_dict(), seed).items()}
    torch.save({"state_dict": state}, path)
    return state


def write_emoji_folder(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A CLIP folder in transformers' layout with fp16 weights and a word-level tokenizer; returns the tensors."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = CLIPConfig(
        text_config={**layers, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 12},
        vision_config={**layers, "image_size": EMOJI_SIZE, "patch_size": 8},
        projection_dim=8,
    )
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    state = {key: value.half() for key, value in _shaken(CLIPModel(config).state_dict(), seed).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return state
