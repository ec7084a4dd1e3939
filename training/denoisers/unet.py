"""The UNet of Stable Diffusion 1.x as a function of latents, noise levels and prompts, arranged for speed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.denoisers.base import ModelError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

# What the configuration of a Stable Diffusion 1.x UNet may choose; all else that diffusers' UNet can do belongs to
# other models.
SIZES = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("cross_attention_dim", "attention_head_dim"),
)
BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


class BranchedUNet(nn.Module):
    """The weights and the result of diffusers' `UNet2DConditionModel`, in an order that leaves less to do.

    What comes before the first cross-attention does not depend on the prompt, so the branches of guidance share it.
    What all layers take from the noise level is one matrix product, what they take from the prompt another, and so are
    queries, keys and values of a self-attention. Pictures are channels-last throughout: tokens are a view of them.
    """

    def __init__(self, unet: UNet2DConditionModel):
        """Raises `ModelError` for a UNet of another family. Its projections become views of the joined ones."""
        super().__init__()
        check_plain(unet)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.down, self.up = ([_pairs(block) for block in blocks] for blocks in (unet.down_blocks, unet.up_blocks))
        self.middle = _pairs(unet.mid_block)
        pairs = [pair for block in (*self.down, self.middle, *self.up) for pair in block]
        blocks = [block for _, transformer in pairs if transformer for block in transformer.transformer_blocks]
        self.of_time = Joined([resnet.time_emb_proj for resnet, _ in pairs])
        self.of_text = Joined([part for block in blocks for part in (block.attn2.to_k, block.attn2.to_v)])
        self.of_tokens = nn.ModuleList(
            Joined([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]) for block in blocks
        )

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Noise prediction `[R, C, H, W]` for the R rows of `text [R, length, width]`.

        `x [B, C, H, W]` and `timestep [B]` (float32, index into the noise table) have B = R rows, or B = R / 2: then
        row b stands for the rows b and B + b of the text.
        """
        unet = self.unet
        time = unet.time_embedding(unet.time_proj(timestep).to(x.dtype))
        times = iter(self.of_time(F.silu(time)))
        texts = _in_pairs(self.of_text(text))
        joined = iter(self.of_tokens)

        def layer(resnet: ResnetBlock2D, transformer: Transformer2DModel | None, h: Tensor) -> Tensor:
            h = _resnet(resnet, h, next(times))
            return h if transformer is None else _transformer(transformer, h, joined, texts)

        h = unet.conv_in(x)
        skips = [h]
        for block, pairs in zip(unet.down_blocks, self.down, strict=True):
            for pair in pairs:
                h = layer(*pair, h)
                skips.append(h)
            for downsampler in block.downsamplers or ():
                h = downsampler.conv(h)
                skips.append(h)
        for pair in self.middle:
            h = layer(*pair, h)
        for block, pairs in zip(unet.up_blocks, self.up, strict=True):
            for pair in pairs:
                h = layer(*pair, _beside(h, skips.pop()))
            for upsampler in block.upsamplers or ():
                h = upsampler.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return unet.conv_out(F.silu(unet.conv_norm_out(h)))


class Joined(nn.Module):
    """Linear layers of the same input as one: returns a list of what each would."""

    def __init__(self, layers: Sequence[nn.Linear]):
        """The layers' weights become views of the joined ones, so that no number is held twice."""
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self.bias = None
        for layer, part in zip(layers, self.weight.detach().split(self.sizes), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
        if layers[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[..., in]` => for every layer `[..., its out]`."""
        return list(F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1))


def check_plain(unet: UNet2DConditionModel) -> None:
    """Raise `ModelError` for a UNet with parts that Stable Diffusion 1.x does not have."""
    for name, parameter in inspect.signature(type(unet).__init__).parameters.items():
        if name in ("self", *SIZES):
            continue
        value = unet.config[name]
        if name in ("down_block_types", "up_block_types"):
            plain = all(kind in BLOCK_TYPES for kind in value)
        else:  # some models' files say null where the default is false
            plain = value == parameter.default or (value is None and parameter.default is False)
        if not plain:
            raise ModelError(f"the UNet has {name} {value!r}, which no Stable Diffusion 1.x has; choose another model")


def _pairs(block: nn.Module) -> list[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    """The layers of a block in order; the middle block ends with a lone ResNet, others may have no transformers."""
    parts = dict(block.named_children())
    return list(zip_longest(parts["resnets"], parts.get("attentions", ())))


def _in_pairs(parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(parts[::2], parts[1::2], strict=True)


def _as_many(h: Tensor, rows: int) -> Tensor:
    """`h [B, ...]` for `rows` rows, B or twice as many: the second half is the first again."""
    return h if len(h) == rows else h.repeat(rows // len(h), *[1] * (h.ndim - 1))


def _beside(h: Tensor, skip: Tensor) -> Tensor:
    """`[R, C1 + C2, H, W]`, channels last in memory."""
    join = _concatenated if torch.compiler.is_compiling() else partial(torch.cat, dim=-1)
    return join([part.permute(0, 2, 3, 1) for part in (h, _as_many(skip, len(h)))]).permute(0, 3, 1, 2)


# An operation of its own, which the compiler does not look into: it would not write the whole down, and the kernels
# that normalise it would pick it out of its parts again and again, at a tenth of the memory's speed.
@torch.library.custom_op("epd::concatenated", mutates_args=())
def _concatenated(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)


@_concatenated.register_fake
def _(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)


def _resnet(resnet: ResnetBlock2D, h: Tensor, time: Tensor) -> Tensor:
    out = resnet.conv1(F.silu(resnet.norm1(h))) + _as_many(time, len(h))[:, :, None, None]
    out = resnet.conv2(F.silu(resnet.norm2(out)))
    return out + (h if resnet.conv_shortcut is None else _pointwise(resnet.conv_shortcut, _tokens(h), h))


def _transformer(
    transformer: Transformer2DModel, h: Tensor, joined: Iterator[Joined], texts: Iterator[tuple[Tensor, Tensor]]
) -> Tensor:
    tokens = _tokens(transformer.norm(h))
    tokens = F.linear(tokens, transformer.proj_in.weight.flatten(1), transformer.proj_in.bias)
    for block in transformer.transformer_blocks:
        tokens = _block(block, tokens, next(joined), *next(texts))
    return _as_many(h, len(tokens)) + _pointwise(transformer.proj_out, tokens, h)


def _block(block: BasicTransformerBlock, tokens: Tensor, joined: Joined, k: Tensor, v: Tensor) -> Tensor:
    """Tokens `[B, T, C]` or `[R, T, C]` => `[R, T, C]`; `k` and `v [R, length, C]` of the prompts."""
    heads = block.attn1.heads
    tokens = tokens + block.attn1.to_out[0](_attend(*joined(block.norm1(tokens)), heads))
    tokens = _as_many(tokens, len(k))
    tokens = tokens + block.attn2.to_out[0](_attend(block.attn2.to_q(block.norm2(tokens)), k, v, heads))
    return tokens + block.ff(block.norm3(tokens))


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _tokens(h: Tensor) -> Tensor:
    """`[B, C, H, W]` => `[B, H W, C]`, a view where channels are last in memory."""
    return h.permute(0, 2, 3, 1).flatten(1, 2)


def _pointwise(conv: nn.Conv2d, tokens: Tensor, like: Tensor) -> Tensor:
    """A 1 x 1 convolution of `tokens [R, H W, C]` as a matrix product => `[R, C', H, W]` with the size of `like`."""
    out = F.linear(tokens, conv.weight.flatten(1), conv.bias)
    return out.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
