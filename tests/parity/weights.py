"""Random checkpoints in the layouts of the published ones.

Names and shapes are written out here from the papers' sizes; no model class is asked, ours or theirs, so that both are
tested on them. Scores vary with image and prompt about a mean that is not 0. The size "real" takes 10 GB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]
METRICS = ("hps", "clip", "aesthetic", "pick", "imagereward")
VOCABULARY = 49408
CONTEXT = 77


@dataclass(frozen=True)
class Sizes:
    """Shape of a CLIP model. A head has `head` channels in the vision tower and 64 in the text tower."""

    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    embedding: int
    patch: int
    head: int = 64
    image: int = 224

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


# OpenAI's code takes heads of 64 channels for granted, and the aesthetic head embeddings of 768 numbers.
SIZES = {
    ("clip", "tiny"): Sizes(128, 2, 128, 2, 768, 28),
    ("clip", "real"): Sizes(1024, 24, 768, 12, 768, 14),
    ("hps", "tiny"): Sizes(160, 2, 128, 2, 256, 28, head=80),
    ("hps", "real"): Sizes(1280, 32, 1024, 24, 1024, 14, head=80),
}


class Random:
    """Seeded tensors of the kinds that networks hold."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=self.generator)

    def linear(self, outputs: int, inputs: int, gain: float = 1.0) -> State:
        """Keeps unit variance, but for `gain`."""
        return {"weight": self.normal(outputs, inputs, std=gain / math.sqrt(inputs)), "bias": self.normal(outputs) / 10}

    def norm(self, width: int) -> State:
        return {"weight": 1 + self.normal(width) / 10, "bias": self.normal(width) / 5}


def placed(name: str, parts: State) -> State:
    """`parts` under `name`."""
    return {f"{name}.{key}": value for key, value in parts.items()}


def openai_tower(random: Random, prefix: str, width: int, layers: int) -> State:
    """A transformer in OpenAI's layout. Its branches add up to twice the variance that they are added to."""
    state, gain = {}, math.sqrt(1 / layers)
    for index in range(layers):
        block = f"{prefix}transformer.resblocks.{index}"
        state |= placed(f"{block}.ln_1", random.norm(width))
        packed = random.linear(3 * width, width)
        packed["weight"][: 2 * width] *= 1.5  # queries and keys: attention picks, rather than averages
        state |= {f"{block}.attn.in_proj_{key}": value for key, value in packed.items()}
        # The attention's average shrinks its values; hidden units after the activation are smaller as well.
        state |= placed(f"{block}.attn.out_proj", random.linear(width, width, 3 * gain))
        state |= placed(f"{block}.ln_2", random.norm(width))
        state |= placed(f"{block}.mlp.c_fc", random.linear(4 * width, width))
        state |= placed(f"{block}.mlp.c_proj", random.linear(width, 4 * width, 1.5 * gain))
    return state


def openai_state(sizes: Sizes, seed: int) -> State:
    """A CLIP model in the layout of OpenAI and open_clip, float32."""
    random = Random(seed)
    width = sizes.vision_width
    state = {
        "visual.class_embedding": random.normal(width),
        "visual.positional_embedding": random.normal(sizes.patches + 1, width, std=0.5),
        "visual.conv1.weight": random.normal(width, 3, sizes.patch, sizes.patch, std=1 / sizes.patch),
        "positional_embedding": random.normal(CONTEXT, sizes.text_width, std=0.5),
        "token_embedding.weight": random.normal(VOCABULARY, sizes.text_width),
        "logit_scale": torch.tensor(math.log(100.0)),
    }
    state |= placed("visual.ln_pre", random.norm(width)) | placed("visual.ln_post", random.norm(width))
    state |= placed("ln_final", random.norm(sizes.text_width))
    state |= openai_tower(random, "visual.", width, sizes.vision_layers)
    state |= openai_tower(random, "", sizes.text_width, sizes.text_layers)
    # The bias of the last norm is in all features: turned into one direction for both towers, it lifts the cosine.
    shared = random.normal(sizes.embedding)
    for projection, norm in (("visual.proj", "visual.ln_post"), ("text_projection", "ln_final")):
        bias = state[f"{norm}.bias"]
        matrix = random.normal(len(bias), sizes.embedding, std=1 / math.sqrt(len(bias)))
        state[projection] = matrix + torch.outer(bias / bias.square().sum(), shared)
    return state


def rounded_as_published(state: State) -> State:
    """OpenAI's dtypes: half precision for what multiplies, single for norms, token embedding and scale."""
    single = ("ln_", "token_embedding", "positional_embedding", "class_embedding", "logit_scale")
    return {key: value if any(part in key for part in single) else value.half() for key, value in state.items()}


def in_transformers_layout(state: State, sizes: Sizes) -> State:
    """OpenAI's layout => that of transformers' CLIPModel, float32, with the buffers that published files hold."""
    fixed = {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    in_blocks = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed = {
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "text_model.embeddings.position_ids": torch.arange(CONTEXT)[None],
        "vision_model.embeddings.position_ids": torch.arange(sizes.patches + 1)[None],
    }
    for key, value in state.items():
        tower, middle, rest = key.rpartition("transformer.resblocks.")
        if key in fixed:
            renamed[fixed[key]] = value
        elif middle:
            index, _, name = rest.partition(".")
            block = f"{'vision' if tower else 'text'}_model.encoder.layers.{index}"
            if name.startswith("attn.in_proj_"):
                kind = name.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{block}.self_attn.{letter}_proj.{kind}"] = part
            else:
                layer, _, kind = name.rpartition(".")
                renamed[f"{block}.{in_blocks[layer]}.{kind}"] = value
    return {key: (value.float() if value.is_floating_point() else value).contiguous() for key, value in renamed.items()}


def open_clip_config(sizes: Sizes) -> dict:
    """open_clip's description of the model."""
    vision = {"image_size": sizes.image, "layers": sizes.vision_layers, "width": sizes.vision_width}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": sizes.text_width}
    return {
        "embed_dim": sizes.embedding,
        "vision_cfg": {**vision, "head_width": sizes.head, "patch_size": sizes.patch},
        "text_cfg": {**text, "heads": sizes.text_width // 64, "layers": sizes.text_layers},
    }


def transformers_config(sizes: Sizes, activation: str) -> dict:
    """transformers' description of the model."""
    towers = {
        "text_config": (sizes.text_width, sizes.text_layers, 64),
        "vision_config": (sizes.vision_width, sizes.vision_layers, sizes.head),
    }
    config: dict = {"model_type": "clip", "projection_dim": sizes.embedding}
    for name, (width, layers, head) in towers.items():
        config[name] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // head,
            "hidden_act": activation,
            "projection_dim": sizes.embedding,
        }
    config["text_config"] |= {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    config["vision_config"] |= {"patch_size": sizes.patch, "image_size": sizes.image}
    return config


def linear_head(random: Random, gain: float) -> State:
    """The five linear layers of the aesthetic predictor and of ImageReward."""
    state, inputs = {}, 768
    for place, outputs in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
        state |= placed(f"layers.{place}", random.linear(outputs, inputs, gain))
        inputs = outputs
    return state


def aesthetic_state(seed: int) -> State:
    """LAION's head. Embeddings have the norm 1, so that the first layer must make up for the root of 768."""
    state = linear_head(Random(seed), 1.0)
    state["layers.0.weight"] *= math.sqrt(768)
    state["layers.7.bias"] += 5
    return state


def imagereward_state(seed: int) -> State:
    """ImageReward.pt: BLIP with ViT-L/16 and BERT-base, and the head; with the extras that a score does not need."""
    random, width, text, layers = Random(seed), 1024, 768, 24
    vision: State = {
        "cls_token": random.normal(1, 1, width),
        "pos_embed": random.normal(1, 14 * 14 + 1, width, std=0.5),
        "patch_embed.proj.weight": random.normal(width, 3, 16, 16, std=1 / 16),
        "patch_embed.proj.bias": random.normal(width) / 10,
    }
    gain = math.sqrt(1 / layers)
    for index in range(layers):
        block = f"blocks.{index}"
        qkv = random.linear(3 * width, width)
        qkv["weight"][: 2 * width] *= 1.5
        vision |= placed(f"{block}.norm1", random.norm(width)) | placed(f"{block}.attn.qkv", qkv)
        vision |= placed(f"{block}.attn.proj", random.linear(width, width, 3 * gain))
        vision |= placed(f"{block}.norm2", random.norm(width))
        vision |= placed(f"{block}.mlp.fc1", random.linear(4 * width, width))
        vision |= placed(f"{block}.mlp.fc2", random.linear(width, 4 * width, 1.5 * gain))
    vision |= placed("norm", random.norm(width))

    bert: State = {
        "embeddings.position_ids": torch.arange(512)[None],
        "embeddings.word_embeddings.weight": random.normal(30524, text),
        "embeddings.position_embeddings.weight": random.normal(512, text, std=0.5),
    }
    bert |= placed("embeddings.LayerNorm", random.norm(text))
    for index in range(12):
        layer = f"encoder.layer.{index}"
        for attention, inputs in (("attention", text), ("crossattention", width)):
            bert |= placed(f"{layer}.{attention}.self.query", random.linear(text, text, 1.5))
            bert |= placed(f"{layer}.{attention}.self.key", random.linear(text, inputs, 1.5))
            bert |= placed(f"{layer}.{attention}.self.value", random.linear(text, inputs))
            bert |= placed(f"{layer}.{attention}.output.dense", random.linear(text, text, 2))
            bert |= placed(f"{layer}.{attention}.output.LayerNorm", random.norm(text))
        bert |= placed(f"{layer}.intermediate.dense", random.linear(4 * text, text))
        bert |= placed(f"{layer}.output.dense", random.linear(text, 4 * text))
        bert |= placed(f"{layer}.output.LayerNorm", random.norm(text))

    blip = placed("visual_encoder", vision) | placed("text_encoder", bert)
    blip |= placed("vision_proj", random.linear(256, width)) | placed("text_proj", random.linear(256, text))
    return placed("blip", blip) | placed("mlp", linear_head(random, 1.0))


def write_weights(folder: Path, size: str, metrics: Sequence[str] = METRICS, seed: int = 0) -> None:
    """Write the checkpoints of `metrics` at `size`, "tiny" or "real".

    There is one ImageReward: its package fixes BLIP's sizes. The aesthetic head has one size as well.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    small, large = SIZES["clip", size], SIZES["hps", size]
    if "hps" in metrics:
        state = {key: value.half() for key, value in openai_state(large, seed + 1).items()}
        torch.save({"state_dict": state}, folder / f"{size}-hps.pt")
        (folder / f"{size}-hps.json").write_text(json.dumps(open_clip_config(large)))
    if "clip" in metrics or "aesthetic" in metrics:
        state = rounded_as_published(openai_state(small, seed + 2))
        save_file(in_transformers_layout(state, small), folder / f"{size}-clip.safetensors", metadata={"format": "pt"})
        counts = {"input_resolution": small.image, "context_length": CONTEXT, "vocab_size": VOCABULARY}
        torch.save(state | {key: torch.tensor(value) for key, value in counts.items()}, folder / f"{size}-clip.pt")
    if "aesthetic" in metrics:
        torch.save(aesthetic_state(seed + 3), folder / f"{size}-aesthetic.pth")
    if "pick" in metrics:
        state = in_transformers_layout(openai_state(large, seed + 4), large)
        save_file(state, folder / f"{size}-pick.safetensors", metadata={"format": "pt"})
        (folder / f"{size}-pick.json").write_text(json.dumps(transformers_config(large, "gelu")))
    if "imagereward" in metrics and size == "real":
        torch.save(imagereward_state(seed + 5), folder / "real-imagereward.pt")
