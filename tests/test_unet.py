"""The UNet in its own order of work against diffusers' forward."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from training.denoisers import BACKBONES, EMBEDDED, ModelError
from training.denoisers.unet import BranchedUNet

V1_CONFIG = BACKBONES["ms_coco"].configs / "unet"
SMALL = {"block_out_channels": [32, 64, 64, 96], "cross_attention_dim": 24, "sample_size": 16}


def v1_unet(**changes) -> UNet2DConditionModel:
    """Stable Diffusion v1.5's four levels with few channels, all weights random, those of the norms too."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(V1_CONFIG) | SMALL | changes)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet.eval().requires_grad_(False)


def embedded_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(EMBEDDED / "unet", low_cpu_mem_usage=False).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [v1_unet, embedded_unet])
@pytest.mark.parametrize("branches", [1, 2])
def test_equals_diffusers(make, branches):
    unet = make()
    reference, branched = copy.deepcopy(unet), BranchedUNet(unet)
    x = torch.randn(3, 4, 16, 16)
    timestep = torch.tensor([3.25, 500.5, 999.0])
    text = torch.randn(3 * branches, 77, unet.config.cross_attention_dim)
    many = x.repeat(branches, 1, 1, 1)
    with torch.no_grad():
        expected = reference(many, timestep.repeat(branches), text).sample
        torch.testing.assert_close(branched(x, timestep, text), expected, atol=1e-5, rtol=1e-5)
        # Given a row for each branch, as ranks that share out the branches do, nothing is shared.
        torch.testing.assert_close(branched(many, timestep.repeat(branches), text), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    assert (expected[:3] - expected[-3:]).abs().max() > (1e-3 if branches == 2 else -1)  # the prompt matters


def test_null_is_no_for_a_switch():
    """As some published models' files have it."""
    unet = v1_unet(upcast_attention=None, use_linear_projection=None)
    x, timestep, text = torch.randn(1, 4, 16, 16), torch.tensor([20.0]), torch.randn(1, 77, 24)
    with torch.no_grad():
        expected = copy.deepcopy(unet)(x, timestep, text).sample
        torch.testing.assert_close(BranchedUNet(unet)(x, timestep, text), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_equals_diffusers():
    """What the compiler is given, whole, without its kernels: those are for a GPU."""
    unet = v1_unet()
    reference, branched = copy.deepcopy(unet), BranchedUNet(unet)
    x, timestep = 3 + 2 * torch.randn(2, 4, 16, 16), torch.tensor([20.0, 700.0])
    text = torch.randn(4, 77, 24)
    compiled = torch.compile(branched, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        expected = reference(x.repeat(2, 1, 1, 1), timestep.repeat(2), text).sample
        torch.testing.assert_close(compiled(x, timestep, text), expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_diffusers():
    unet = v1_unet()
    reference, branched = copy.deepcopy(unet), BranchedUNet(unet)
    x, timestep = torch.randn(2, 4, 16, 16), torch.tensor([20.0, 700.0])
    text = torch.randn(4, 77, 24)
    gradients = []
    for forward in (
        lambda x, t: branched(x, t, text),
        lambda x, t: reference(x.repeat(2, 1, 1, 1), t.repeat(2), text).sample,
    ):
        leaves = x.clone().requires_grad_(), timestep.clone().requires_grad_()
        gradients.append(torch.autograd.grad(forward(*leaves).square().sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


def test_no_weight_is_held_twice():
    """What was joined or multiplied out replaces what it was made of."""
    unet = v1_unet()
    config, before = unet.config, sum(parameter.numel() for parameter in unet.parameters())
    branched = BranchedUNet(unet)
    first, *deeper = config.block_out_channels
    # Kernels of 4 x 4 for 3 x 3 in the upsamplings, and one bias for two at the end of each of the transformers: two on
    # the way down and three on the way up, of all levels but the last, and one in the middle.
    grown = sum((16 - 9) * channels**2 for channels in deeper) - 5 * (first + sum(deeper[:-1])) - deeper[-1]
    assert sum(parameter.numel() for parameter in branched.parameters()) == before + grown
    places = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in branched.parameters()}
    assert sum(places.values()) == 4 * (before + grown)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"use_linear_projection": True}, "use_linear_projection"),
        ({"class_embed_type": "timestep", "num_class_embeds": None}, "class_embed_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3 + ["DownBlock2D"]}, "down_block_types"),
    ],
)
def test_a_unet_of_another_family_is_refused(changes, name):
    with pytest.raises(ModelError, match=f"the UNet has {name} "):
        BranchedUNet(v1_unet(**changes))
