"""Checkpoints of one file in the CompVis layout: the same model as its folder, and what is wrong with a bad one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from compvis import compvis_state, unet_names, vae_names
from safetensors.torch import save_file

from training.denoisers import BACKBONES, EMBEDDED, ModelError, check_model, create_model
from training.denoisers.single_file import clip_tokenizer, load_single_file
from training.denoisers.stable_diffusion import load_folder

PROMPTS = ["a 3d emoji of bat on a red background", ""]
SIGMA = torch.tensor(2.5, dtype=torch.float64)
TINY = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "attention_head_dim": 4},
    "vae": {"block_out_channels": [32, 32, 64, 64]},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.fixture(scope="module")
def net():
    return create_model("emoji")


@pytest.fixture(scope="module")
def state():
    parts = compvis_state(*load_folder(EMBEDDED, torch.float32))
    return {name: tensor.contiguous().clone() for name, tensor in parts.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "emoji.safetensors"
    save_file(state, path)
    return path


def assert_same_model(first, second):
    """The three networks are asked the same."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditions = [model.encode_prompts(PROMPTS) for model in (first, second)]
    assert torch.equal(conditions[0].text, conditions[1].text)
    assert torch.equal(first.slope(x, SIGMA, conditions[0]), second.slope(x, SIGMA, conditions[1]))
    assert torch.equal(first.decode(x), second.decode(x))


def test_a_file_is_the_model_of_its_folder(net, file):
    single = create_model("emoji", model_path=file)
    assert_same_model(net, single)
    assert (single.sigma_max, single.img_resolution) == (net.sigma_max, net.img_resolution)


def test_an_old_checkpoint_with_more_in_it(net, state, tmp_path):
    """Position ids, the noise schedule, averaged weights and training state are passed over; fp16 is read too."""
    extra = {
        "betas": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(4),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
    }
    halved = {name: tensor.half() for name, tensor in state.items()}  # the embedded weights are fp16 to begin with
    torch.save({"state_dict": halved | extra, "global_step": 1, "epoch": 0}, tmp_path / "model.ckpt")
    assert_same_model(net, create_model("emoji", model_path=tmp_path / "model.ckpt"))


def test_half_precision_leaves_the_decoder_alone(file):
    single = create_model("emoji", model_path=file, precision="bfloat16")
    for network, dtype in (
        (single.unet, torch.bfloat16),
        (single.text_encoder, torch.bfloat16),
        (single.vae, torch.float32),
    ):
        assert all((part.dtype, part.requires_grad) == (dtype, False) for part in network.parameters())


def tiny_configs(folder: Path) -> Path:
    """Stable Diffusion's configurations with few channels."""
    for part, small in TINY.items():
        config = json.loads((BACKBONES["ms_coco"].configs / part / "config.json").read_text())
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config | small))
    return folder


def test_random_stable_diffusion_of_four_levels(tmp_path):
    """A random CompVis state of the real one's shape makes the networks that it was written down from."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = tiny_configs(tmp_path / "configs")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet")).eval()
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae")).eval()
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")).eval()
    state = {name: tensor.contiguous().clone() for name, tensor in compvis_state(unet, vae, text).items()}
    save_file(state, tmp_path / "sd.safetensors")
    loaded = load_single_file(tmp_path / "sd.safetensors", configs, torch.float32)
    latents, pixels, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32, 32), torch.arange(77)[None]
    with torch.no_grad():
        embedded = text(tokens).last_hidden_state
        pairs = (
            (loaded[2].eval()(tokens).last_hidden_state, embedded),
            (loaded[0].eval()(latents, 7.5, embedded).sample, unet(latents, 7.5, embedded).sample),
            (loaded[1].eval().decode(latents).sample, vae.decode(latents).sample),
            (loaded[1].encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean),
        )
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)


def test_the_configurations_are_those_of_stable_diffusion_v1():
    """Names, shapes and numbers of tensors as in v1-5-pruned-emaonly: 686 + 248 + 196."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = BACKBONES["ms_coco"].configs
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))
    names = {there: unet.state_dict()[here] for here, there in unet_names(unet).items()}
    assert len(names) == 686 and len(vae_names(vae)) == 248 and len(text.state_dict()) == 196
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in text.parameters()) == 123_060_480
    for name, shape in {
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    }.items():
        assert tuple(names[name].shape) == shape
    assert vae.config.scaling_factor == 0.18215 and unet.config.sample_size == 64


def test_the_tokenizer_is_clips():
    """Ids that are widely printed, and those of open_clip's own tokenizer for all test prompts."""
    import open_clip

    tokenizer, other = clip_tokenizer(77), open_clip.SimpleTokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    prompts = Path("src/prompts/test.txt").read_text(encoding="utf-8").splitlines()
    prompts += ["", "naïve café 你好 🙂 it's the 12th", "don't,we'll I'm x_y-z 3.14", "many words " * 60]
    for prompt, theirs in zip(prompts, other(prompts), strict=True):
        end = theirs.tolist().index(49407)
        ours = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert ours == [*theirs[: end + 1].tolist(), *[49407] * (76 - end)]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bad_files(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """File -> what must be said of it."""
    good = {name: tensor[:1] if tensor.dim() > 3 else tensor for name, tensor in state.items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    unet = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    save_file(unet, folder / "unet.safetensors")
    save_file(state, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-1000])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "model.bin").write_bytes(b"")
    torch.save({"state_dict": state, "callbacks": Evil()}, folder / "evil.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    (folder / "junk.ckpt").write_bytes(b"junk\n")
    (folder / "folder.ckpt").mkdir(exist_ok=True)
    torch.save({"state_dict": unet}, folder / "unet.ckpt")
    save_file({name: value for name, value in state.items() if name != first}, folder / "lacking.safetensors")
    save_file(state | {first: good[first].clone()}, folder / "shape.safetensors")
    return {
        "none.safetensors": "does not exist",
        "model.bin": "must end in .safetensors or .ckpt",
        "unet.safetensors": "lacks a VAE (first_stage_model.*), a CLIP text encoder (cond_stage_model.transformer",
        "cut.safetensors": "cannot be read as safetensors",
        "empty.safetensors": "cannot be read as safetensors",
        "evil.ckpt": "cannot be read as a checkpoint of tensors",
        "list.ckpt": "it holds a list",
        "junk.ckpt": "it is damaged, or holds something other than tensors",
        "folder.ckpt": "lacks scheduler/scheduler_config.json",
        "unet.ckpt": "lacks a VAE",
        "lacking.safetensors": "UNet lacks conv_in.weight; Stable Diffusion 1.x needed",
        "shape.safetensors": "UNet has another shape of conv_in.weight",
    }


def test_bad_files_are_named(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in bad_files(tmp_path, state).items():
        with pytest.raises(ModelError) as caught:
            create_model("emoji", model_path=tmp_path / name)
        assert name in str(caught.value) and message in " ".join(str(caught.value).split()), name
        assert len(str(caught.value).splitlines()) == 1 and "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_what_can_be_known_early_is(state, tmp_path):
    """Before anything is loaded."""
    bad_files(tmp_path, state)
    for name in ("none.safetensors", "model.bin", "unet.safetensors", "cut.safetensors", "empty.safetensors"):
        with pytest.raises(ModelError):
            check_model("emoji", model_path=tmp_path / name)


def test_another_models_file(file):
    with pytest.raises(ModelError, match=r"emoji.safetensors: its .*; Stable Diffusion 1.x needed"):
        create_model("ms_coco", model_path=file)


def test_the_embedded_folder_is_its_own_configuration():
    assert BACKBONES["emoji"].configs == EMBEDDED
