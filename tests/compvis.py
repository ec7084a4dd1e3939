"""The original CompVis names of a Stable Diffusion model's tensors, written down from its module tree."""

from __future__ import annotations

import re

from torch import Tensor, nn

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
TIME = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0"}
TIME |= {"time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(unet: nn.Module) -> dict[str, str]:
    """Name in diffusers' UNet -> name in a CompVis file, without prefix.

    CompVis numbers the encoder's blocks through: block 0 is the first convolution, then for each level its residual
    blocks (.0, with attention .1) and one downsampling block (.0.op). The decoder has one residual block more a level,
    and its upsampling sits in the last of them, behind the attention if there is one.
    """
    depth = unet.config.layers_per_block
    places = dict(TIME)
    for level, down in enumerate(unet.down_blocks):
        for layer in range(depth):
            block = 1 + level * (depth + 1) + layer
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (depth + 1)}.0.op"
        assert len(down.resnets) == depth
    for index, place in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        places[f"mid_block.{place}"] = f"middle_block.{index}"
    for level, up in enumerate(unet.up_blocks):
        for layer in range(depth + 1):
            block = level * (depth + 1) + layer
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
        behind = 2 if "CrossAttn" in type(up).__name__ else 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{level * (depth + 1) + depth}.{behind}.conv"
    return {name: _moved(name, places, RESNET) for name in unet.state_dict()}


def vae_names(vae: nn.Module) -> dict[str, str]:
    """The same for the autoencoder, whose decoder CompVis numbers from the finest level up."""
    levels = len(vae.config.block_out_channels)
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, few, many in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        places |= {f"{side}.{conv}": f"{side}.{conv}" for conv in ("conv_in", "conv_out")}
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for index in (0, 1):
            places[f"{side}.mid_block.resnets.{index}"] = f"{side}.mid.block_{index + 1}"
        places[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        for level in range(levels):
            there = level if side == "encoder" else levels - 1 - level
            for layer in range(vae.config.layers_per_block + 1):
                places[f"{side}.{few}_blocks.{level}.resnets.{layer}"] = f"{side}.{few}.{there}.block.{layer}"
            places[f"{side}.{few}_blocks.{level}.{many}rs.0.conv"] = f"{side}.{few}.{there}.{many}.conv"
    return {name: _moved(name, places, {"conv_shortcut": "nin_shortcut"}) for name in vae.state_dict()}


def _moved(name: str, places: dict[str, str], resnet: dict[str, str]) -> str:
    place = max((place for place in places if name.startswith(f"{place}.")), key=len)
    rest = name.removeprefix(f"{place}.")
    inner, _, kind = rest.rpartition(".")
    if ".resnets." in name:
        inner = resnet.get(inner, inner)
    if re.search(r"^(en|de)coder\.mid_block\.attentions", name):
        inner = ATTENTION[inner]
    return ".".join(filter(None, (places[place], inner, kind)))


def compvis_state(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """All tensors under their names in a CompVis file; the autoencoder's attention as 1 x 1 convolutions."""
    state = {f"model.diffusion_model.{there}": unet.state_dict()[here] for here, there in unet_names(unet).items()}
    for here, there in vae_names(vae).items():
        tensor = vae.state_dict()[here]
        if ".mid.attn_1." in there and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        state[f"first_stage_model.{there}"] = tensor
    prefix = "cond_stage_model.transformer.text_model."
    return state | {prefix + name: tensor for name, tensor in text_encoder.state_dict().items()}
