"""The transformer in which MPS's image tokens look at the prompt.

Structure, names and arithmetic are those of `trainer/models/cross_modeling.py` in Kwai-Kolors/MPS, read off the copies
in aigc-apps/EasyAnimate, modelscope/DiffSynth-Studio and the `imscore` package, which agree. It is made of the parallel
blocks of PaLM (arXiv 2204.02311): attention and feed-forward read the same normalised input, there are no biases, and
all heads share one key and one value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CrossSizes:
    """The shape of the transformer; the defaults are the published model's. Its width is that of CLIP's embeddings."""

    layers: int = 4
    heads: int = 16
    head_width: int = 64
    expansion: int = 4  # width of the feed-forward networks, in widths


class CrossModel(nn.Module):
    """Layers of two blocks: attention from the image to the prompt, then among the image's own tokens."""

    def __init__(self, width: int, sizes: CrossSizes) -> None:
        super().__init__()
        # Lists and dicts of blocks, because the checkpoint calls the two blocks of a layer `0.fn` and `1.fn`.
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"fn": block(width, sizes)}) for block in (CrossBlock, SelfBlock))
            for _ in range(sizes.layers)
        )

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """`image [N, I, W]`, `text [N, T, W]`, bool `mask [N, T]` of the text tokens to look at => `[N, I, W]`.

        No row of `mask` may be all False.
        """
        for layer in self.layers:
            cross_block, self_block = (block.get_submodule("fn") for block in layer.children())
            image = image + cross_block(image, text, mask)
            image = image + self_block(image)
        return image


class CrossBlock(nn.Module):
    """Attention from the image to the prompt, beside a feed-forward network; the prompt's tokens are not normalised."""

    def __init__(self, width: int, sizes: CrossSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        inner, hidden = sizes.heads * sizes.head_width, sizes.expansion * width
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * sizes.head_width, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        image = self.norm(image)
        key, value = self.to_kv(text).chunk(2, dim=-1)
        attended = attend(split_heads(self.to_q(image), self.heads), key, value, mask)
        return self.to_out(attended) + self.ff(image)


class SelfBlock(nn.Module):
    """Attention among the image's tokens with rotary positions, beside a feed-forward network."""

    def __init__(self, width: int, sizes: CrossSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        inner, hidden = sizes.heads * sizes.head_width, sizes.expansion * width
        self.parts = (inner, sizes.head_width, sizes.head_width, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = RotaryEmbedding(sizes.head_width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(hidden, width, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        query, key, value, hidden = self.fused_attn_ff_proj(self.norm(image)).split(self.parts, dim=-1)
        query, key = self.rotary_emb(split_heads(query, self.heads)), self.rotary_emb(key)
        return self.attn_out(attend(query, key, value, None)) + self.ff_out(hidden)


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864) that pair channel c with channel c + half. The frequencies are stored."""

    inv_freq: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10_000.0 ** -(torch.arange(0, width, 2).float() / width))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., T, width]`, its rows at the positions 0 to T - 1."""
        angles = torch.arange(x.shape[-2], device=x.device).float()[:, None] * self.inv_freq
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SwiGLU(nn.Module):
    """The first half of the channels times the SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[N, T, heads * width]` => `[N, heads, T, width]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`query [N, H, I, W]`, one `key` and `value [N, T, W]` for all heads, bool `mask [N, T]` => `[N, I, H * W]`."""
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1).to(query.dtype) for x in (key, value))
    seen = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)
