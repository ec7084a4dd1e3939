"""The UNet of Stable Diffusion 1.x as a function of latents, noise levels and prompts, arranged for speed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.denoisers.base import ModelError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
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
    """The function of diffusers' `UNet2DConditionModel`, in an order that leaves less to do.

    What comes before the first cross-attention does not depend on the prompt, so the branches of guidance share it.
    What all layers take from the noise level is one matrix product, what they take from the prompt another, and so are
    queries, keys and values of a self-attention; products that follow each other with nothing between are multiplied
    out beforehand. Pictures are channels-last throughout: tokens are a view of them.
    """

    def __init__(self, unet: UNet2DConditionModel):
        """Takes the weights out of `unet`. Raises `ModelError` for a UNet of another family."""
        super().__init__()
        check_plain(unet)
        unet.to(memory_format=torch.channels_last)
        self.config = unet.config
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.conv_in, self.norm_out, self.conv_out = unet.conv_in, unet.conv_norm_out, unet.conv_out
        self.down, self.up = _levels(unet.down_blocks), _levels(unet.up_blocks)
        self.middle = Level(unet.mid_block)
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        self.of_time = Joined([resnet.time_emb_proj for block in blocks for resnet in block.resnets])
        attentions = [part.transformer_blocks[0].attn2 for block in blocks for part in _children(block, "attentions")]
        self.of_text = Joined([layer for attention in attentions for layer in (attention.to_k, attention.to_v)])

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Noise prediction `[R, C, H, W]` for the R rows of `text [R, length, width]`.

        `x [B, C, H, W]` and `timestep [B]` (float32, index into the noise table) have B = R rows, or B = R / 2: then
        row b stands for the rows b and B + b of the text.
        """
        time = self.time_embedding(self.time_proj(timestep).to(x.dtype))
        times = iter(self.of_time(F.silu(time)))
        texts = _in_pairs(self.of_text(text))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for layer in level.layers:
                h = layer(h, times, texts)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(h)
                skips.append(h)
        for layer in self.middle.layers:
            h = layer(h, times, texts)
        for level in self.up:
            for layer in level.layers:
                h = layer(_beside(h, skips.pop()), times, texts)
            if level.resize is not None:
                h = level.resize(h)
        return self.conv_out(F.silu(_normalized(self.norm_out, h)))


class Level(nn.Module):
    """The layers of a block and what halves or doubles the resolution after them, if anything does."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # The middle block ends with a lone ResNet, others may have no transformers.
        pairs = zip_longest(_children(block, "resnets"), _children(block, "attentions"))
        self.layers = nn.ModuleList(Layer(*pair) for pair in pairs)
        self.resize: nn.Module | None = None
        for downsampler in _children(block, "downsamplers"):
            self.resize = downsampler.conv
        for upsampler in _children(block, "upsamplers"):
            self.resize = Enlarged(upsampler.conv)


class Layer(nn.Module):
    """A ResNet and the transformer after it, if there is one."""

    def __init__(self, resnet: ResnetBlock2D, transformer: Transformer2DModel | None):
        super().__init__()
        self.resnet = ResNet(resnet)
        self.transformer = None if transformer is None else Transformer(transformer)

    def forward(self, h: Tensor, times: Iterator[Tensor], texts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Takes the next of `times`, and with a transformer the next of `texts`."""
        h = self.resnet(h, next(times))
        return h if self.transformer is None else self.transformer(h, *next(texts))


class ResNet(nn.Module):
    def __init__(self, resnet: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = resnet.norm1, resnet.conv1, resnet.norm2, resnet.conv2
        self.shortcut = None if resnet.conv_shortcut is None else _pointwise(resnet.conv_shortcut)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """`h [R, C, H, W]` and `time [R, C']` or `[R / 2, C']` => `[R, C', H, W]`."""
        out = self.conv1(F.silu(_normalized(self.norm1, h))) + _as_many(time, len(h))[:, :, None, None]
        out = self.conv2(F.silu(_normalized(self.norm2, out)))
        return out + (h if self.shortcut is None else _picture(self.shortcut(_tokens(h)), h))


class Transformer(nn.Module):
    """Self-attention, attention to the prompt and a gated feed-forward network."""

    def __init__(self, transformer: Transformer2DModel):
        super().__init__()
        (block,) = transformer.transformer_blocks
        self.heads = block.attn1.heads
        self.norm, self.proj_in = transformer.norm, _pointwise(transformer.proj_in)
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.of_tokens = Joined([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v])
        self.out1, self.query2, self.out2 = block.attn1.to_out[0], block.attn2.to_q, block.attn2.to_out[0]
        self.gated = block.ff.net[0].proj
        # proj_out(tokens + feed_forward), multiplied out, for nothing lies between the two.
        last, inner = _pointwise(transformer.proj_out), block.ff.net[2]
        weight = last.weight.double()
        self.of_gated = _linear((weight @ inner.weight.double()).to(last.weight), None)
        self.of_rest = _linear(last.weight, (weight @ inner.bias.double() + last.bias.double()).to(last.bias))

    def forward(self, h: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`h [B, C, H, W]` or `[R, C, H, W]` => `[R, C, H, W]`; `k` and `v [R, length, C]` of the prompts."""
        start = _as_many(_tokens(h), len(k))
        tokens = self.proj_in(_tokens(_normalized(self.norm, h)))
        tokens = tokens + self.out1(_attend(*self.of_tokens(self.norm1(tokens)), heads=self.heads))
        tokens = _as_many(tokens, len(k))
        tokens = tokens + self.out2(_attend(self.query2(self.norm2(tokens)), k, v, heads=self.heads))
        value, gate = self.gated(self.norm3(tokens)).chunk(2, dim=-1)
        return _picture(start + self.of_rest(tokens) + self.of_gated(value * F.gelu(gate)), h)


class Joined(nn.Module):
    """Linear layers of the same input as one: returns a list of what each would."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers]
        weight = torch.cat([layer.weight for layer in layers])
        self.layer = _linear(weight, None if biases[0] is None else torch.cat(biases))

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[..., in]` => for every layer `[..., its out]`."""
        return list(self.layer(x).split(self.sizes, dim=-1))


class Enlarged(nn.Module):
    """Nearest-neighbour upsampling by 2 and the 3 x 3 convolution after it, in one.

    An output pixel sees a 3 x 3 window of doubled pixels, so 2 x 2 different ones. Weights of the same pixel are added
    up beforehand, which makes a transposed convolution of 4 of the 9 products.
    """

    # Row y of the 4 x 4 kernel is a sum of these rows of the 3 x 3 one.
    SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        sums = torch.tensor(self.SUMS, dtype=torch.float32, device=conv.weight.device)
        kernel = torch.einsum("yi,xj,ocij->coyx", sums, sums, conv.weight.float()).to(conv.weight.dtype)
        self.weight = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = conv.bias

    def forward(self, h: Tensor) -> Tensor:
        """`[R, C, H, W]` => `[R, C', 2 H, 2 W]`."""
        return F.conv_transpose2d(h, self.weight, self.bias, stride=2, padding=1)


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


def _levels(blocks: Iterable[nn.Module]) -> Iterable[Level]:
    """A ModuleList."""
    return cast("Iterable[Level]", nn.ModuleList(map(Level, blocks)))  # torch types its items as mere modules


def _children(block: nn.Module, name: str) -> Iterable[Any]:
    """The block's modules of that kind, of diffusers' classes; not every kind of block has them."""
    children = dict(block.named_children()).get(name)
    return children if isinstance(children, nn.ModuleList) else ()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _pointwise(conv: nn.Conv2d) -> nn.Linear:
    """A 1 x 1 convolution as a product with tokens."""
    return _linear(conv.weight.flatten(1), conv.bias)


def _in_pairs(parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(parts[::2], parts[1::2], strict=True)


def _as_many(h: Tensor, rows: int) -> Tensor:
    """`h [B, ..., C]` for `rows` rows, B or twice as many: the second half is the first again."""
    return h if len(h) == rows else torch.cat([h] * (rows // len(h)))


def _beside(h: Tensor, skip: Tensor) -> Tensor:
    """`[R, C1 + C2, H, W]`, channels last in memory."""
    join = _concatenated if torch.compiler.is_compiling() else partial(torch.cat, dim=-1)
    return join([_as_many(part.permute(0, 2, 3, 1), len(h)) for part in (h, skip)]).permute(0, 3, 1, 2)


# An operation of its own, which the compiler does not look into: it would not write the whole down, and the kernels
# that normalise it would pick it out of its parts again and again, at a tenth of the memory's speed.
@torch.library.custom_op("epd::concatenated", mutates_args=())
def _concatenated(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)


@_concatenated.register_fake
def _(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)


def _normalized(norm: nn.GroupNorm, h: Tensor) -> Tensor:
    """`norm(h)` for `h [R, C, H, W]`, channels last in memory.

    Of a group there are a few numbers for each pixel, which the kernel that the compiler makes of the whole picks out
    at a fraction of the memory's speed. So when compiling, every channel is summed up first.
    """
    if not torch.compiler.is_compiling():
        return norm(h)
    groups = (norm.num_groups, -1)
    inside, mean = (part.unflatten(1, groups) for part in torch.var_mean(h.float(), dim=(2, 3), correction=0))
    between, mean = torch.var_mean(mean, dim=2, correction=0, keepdim=True)  # [R, groups, 1]
    deviation = (inside.mean(dim=2, keepdim=True) + between + norm.eps).sqrt()
    scale = norm.weight.float().unflatten(0, groups) / deviation  # [R, groups, channels of a group]
    shift = norm.bias.float().unflatten(0, groups) - mean * scale
    return (h.float() * scale.view(len(h), -1, 1, 1) + shift.view(len(h), -1, 1, 1)).to(h.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _tokens(h: Tensor) -> Tensor:
    """`[B, C, H, W]` => `[B, H W, C]`, a view where channels are last in memory."""
    return h.permute(0, 2, 3, 1).flatten(1, 2)


def _picture(tokens: Tensor, like: Tensor) -> Tensor:
    """`[R, H W, C]` => `[R, C, H, W]`, a view, with the size of `like`."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
