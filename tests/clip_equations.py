"""A CLIP model in numpy float64, written from its equations."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def attention(x, layer, heads, causal):
    rows, width = x.shape
    q, k, v = ((x @ layer[f"{n}.weight"].T + layer[f"{n}.bias"]).reshape(rows, heads, -1).swapaxes(0, 1) for n in "qkv")
    logits = q @ k.swapaxes(1, 2) / math.sqrt(width // heads)
    if causal:
        logits = np.where(np.tril(np.ones((rows, rows), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(rows, width)
    return mixed @ layer["o.weight"].T + layer["o.bias"]


def transformer(x, layers, heads, activation, causal):
    for layer in layers:
        x = x + attention(layer_norm(x, layer["norm1.weight"], layer["norm1.bias"]), layer, heads, causal)
        hidden = layer_norm(x, layer["norm2.weight"], layer["norm2.bias"]) @ layer["up.weight"].T + layer["up.bias"]
        x = x + activation(hidden) @ layer["down.weight"].T + layer["down.bias"]
    return x


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def patches(pixels, size):
    """[3, S, S] -> [(S / size)^2, 3 * size * size], row by row."""
    side = pixels.shape[1] // size
    return pixels.reshape(3, side, size, side, size).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)


def cosine(a, b):
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def renamed(state, prefix, names):
    return {new + end: state[prefix + old + end] for old, new in names.items() for end in (".weight", ".bias")}


def open_clip_layers(state, prefix, count):
    names = {"ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "up", "mlp.c_proj": "down", "attn.out_proj": "o"}
    layers = []
    for index in range(count):
        start = f"{prefix}resblocks.{index}."
        layer = renamed(state, start, names)
        for part in ("weight", "bias"):
            packed = np.split(state[f"{start}attn.in_proj_{part}"], 3)
            layer |= {f"{n}.{part}": value for n, value in zip("qkv", packed, strict=True)}
        layers.append(layer)
    return layers


def transformers_layers(state, prefix, count):
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "up", "mlp.fc2": "down"}
    names |= {f"self_attn.{n}_proj": n for n in "qkv"} | {"self_attn.out_proj": "o"}
    return [renamed(state, f"{prefix}layers.{index}.", names) for index in range(count)]


def image_embedding(state, pixels, patch, layers, heads, activation):
    """Of one normalised picture `[3, S, S]`, by a state dict in transformers' layout; not normalised."""
    width = len(state["vision_model.embeddings.class_embedding"])
    x = patches(pixels, patch) @ state["vision_model.embeddings.patch_embedding.weight"].reshape(width, -1).T
    x = np.concatenate([state["vision_model.embeddings.class_embedding"][None], x])
    x = x + state["vision_model.embeddings.position_embedding.weight"]
    x = layer_norm(x, state["vision_model.pre_layrnorm.weight"], state["vision_model.pre_layrnorm.bias"])
    x = transformer(x, transformers_layers(state, "vision_model.encoder.", layers), heads, activation, causal=False)[0]
    x = layer_norm(x, state["vision_model.post_layernorm.weight"], state["vision_model.post_layernorm.bias"])
    return state["visual_projection.weight"] @ x


def text_embedding(state, ids, layers, heads, activation):
    """Of one row of token ids that ends with its end-of-text token; not normalised."""
    x = state["text_model.embeddings.token_embedding.weight"][ids]
    x = x + state["text_model.embeddings.position_embedding.weight"][: len(ids)]
    x = transformer(x, transformers_layers(state, "text_model.encoder.", layers), heads, activation, causal=True)
    x = layer_norm(x, state["text_model.final_layer_norm.weight"], state["text_model.final_layer_norm.bias"])
    return state["text_projection.weight"] @ x[-1]
