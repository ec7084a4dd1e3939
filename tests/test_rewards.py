"""The reward models against independent computations, and against bad weights and inputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_equations import (
    cosine,
    gelu,
    image_embedding,
    layer_norm,
    open_clip_layers,
    patches,
    quick_gelu,
    text_embedding,
    transformer,
)
from launchers import NEEDS_A_GPU
from safetensors.torch import save_file
from tiny_rewards import EMOJI_SIZE, TINY_HPS, register_tiny_hps, write_emoji_folder, write_hps_checkpoint

from HPSv2.preprocess import preprocess
from torch_utils.checkpoint import CheckpointError, sha256_file
from torch_utils.errors import UserError
from training.ppo.reward_base import cosine_scores
from training.ppo.reward_hps import RewardHPS
from training.ppo.reward_models.emoji import REWARD_FOLDERS, RewardEmoji
from training.ppo.reward_models.pixels import MEAN, STD, antialiased
from training.ppo.reward_multi import check_reward_weights, create_reward

PROMPTS = ["a red apple", "blue star on a teal background", "", "a cat of green"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """(weights file, tensors) of a tiny HPSv2."""
    folder = tmp_path_factory.mktemp("hps")
    register_tiny_hps(folder)
    return folder / "tiny.pt", write_hps_checkpoint(folder / "tiny.pt")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """(folder, tensors) of a tiny emoji reward."""
    folder = tmp_path_factory.mktemp("emoji")
    return folder, write_emoji_folder(folder)


@pytest.fixture(params=["hps", "emoji"])
def reward(request, hps, emoji):
    if request.param == "hps":
        return RewardHPS(hps[0], architecture=TINY_HPS, batch_size=3)
    return RewardEmoji("emoji_reward", emoji[0], batch_size=3)


def some_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


def test_hps_equals_the_equations(hps):
    path, tensors = hps
    state = {key: value.double().numpy() for key, value in tensors.items()}
    reward = RewardHPS(path, architecture=TINY_HPS)
    images = some_images(4, 28, 28)
    expected = []
    for image, tokens in zip(images.double().numpy(), reward.tokenizer(PROMPTS).numpy(), strict=True):
        pixels = (image - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
        x = patches(pixels, 7) @ state["visual.conv1.weight"].reshape(32, -1).T
        x = np.concatenate([state["visual.class_embedding"][None], x]) + state["visual.positional_embedding"]
        x = layer_norm(x, state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
        x = transformer(x, open_clip_layers(state, "visual.transformer.", 2), 2, gelu, causal=False)[0]
        x = layer_norm(x, state["visual.ln_post.weight"], state["visual.ln_post.bias"])
        image_vector = x @ state["visual.proj"]
        x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
        x = transformer(x, open_clip_layers(state, "transformer.", 2), 2, gelu, causal=True)
        x = layer_norm(x, state["ln_final.weight"], state["ln_final.bias"])
        expected.append(cosine(image_vector, x[list(tokens).index(49407)] @ state["text_projection"]))
    scores = reward.score(images, PROMPTS)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-6)
    assert np.ptp(expected) > 0.01


def test_emoji_equals_the_equations(emoji):
    folder, tensors = emoji
    state = {key: value.double().numpy() for key, value in tensors.items()}
    images = some_images(4, EMOJI_SIZE, EMOJI_SIZE)
    # <s> words </s>, in the order of the vocabulary that write_emoji_folder makes.
    tokens = [[0, 4, 5, 8, 1], [0, 7, 10, 11, 4, 13, 14, 1], [0, 1], [0, 4, 9, 12, 6, 1]]
    expected = []
    for image, ids in zip(images.double().numpy(), tokens, strict=True):
        pixels = (image - np.array([[[0.5]], [[0.4]], [[0.3]]])) / np.array([[[0.2]], [[0.25]], [[0.3]]])
        image_vector = image_embedding(state, pixels, 8, 2, 2, quick_gelu)
        expected.append(cosine(image_vector, text_embedding(state, ids, 2, 2, quick_gelu)))
    scores = RewardEmoji("emoji_reward", folder).score(images, PROMPTS)
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-6)
    assert np.ptp(expected) > 0.01


def test_rows_do_not_depend_on_their_batch(reward):
    images, prompts = some_images(7, 40, 24), [PROMPTS[i % 4] for i in range(7)]
    together = reward.score(images, prompts)
    single = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, single, rtol=0, atol=2e-6)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward.score(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=2e-6)
    assert reward.score(images[:0], []).shape == (0,)


def test_a_careless_backbone_does_not_reach_the_scores():
    seen = []

    def embed(rows):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return torch.ones(len(rows), 2)

    torch.set_float32_matmul_precision("medium")
    try:
        tf32 = torch.backends.cudnn.allow_tf32
        cosine_scores(some_images(1, 8, 8), ["a"], 1, embed, embed)
        assert seen == [("highest", False)] * 2
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", tf32)
    finally:
        torch.set_float32_matmul_precision("highest")


@NEEDS_A_GPU
def test_a_gpu_gives_the_same_scores(hps, emoji):
    images = some_images(8, 60, 40)
    prompts = [PROMPTS[i % 4] for i in range(8)]
    exact = RewardHPS(hps[0], architecture=TINY_HPS).score(images, prompts)
    torch.testing.assert_close(
        RewardHPS(hps[0], architecture=TINY_HPS, device="cuda").score(images, prompts), exact, rtol=0, atol=1e-5
    )
    half = RewardHPS(hps[0], architecture=TINY_HPS, device="cuda", amp=True).score(images.cuda(), prompts)
    assert (half.is_cuda, half.dtype) == (True, torch.float32)
    torch.testing.assert_close(half.cpu(), exact, rtol=0, atol=5e-3)
    assert torch.equal(half, half.half().float())
    one, other = (RewardEmoji("emoji_reward", emoji[0], device=d).score(images, prompts) for d in ("cpu", "cuda"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width", [(1, 1), (64, 64), (17, 50), (50, 17), (1, 200)])
def test_any_image_size(reward, height, width):
    scores = reward.score(some_images(2, height, width), PROMPTS[:2])
    assert torch.isfinite(scores).all()
    assert scores.abs().max() <= 1


def test_a_nan_image_spoils_only_its_own_score(reward):
    images = some_images(4, 28, 28)
    clean = reward.score(images, PROMPTS)
    images[2, 0, 3, 3] = math.nan
    scores = reward.score(images, PROMPTS)
    assert torch.isnan(scores).tolist() == [False, False, True, False]
    torch.testing.assert_close(scores[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=2e-6)


def test_scores_can_enter_a_loss(reward):
    """Tensors made under inference mode could not."""
    weight = torch.ones(4, requires_grad=True)
    (weight * reward.score(some_images(4, 28, 28), PROMPTS)).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.zeros(2, 3, 8, 8), ["a"], "2 images but 1 prompts"),
        (torch.zeros(1, 8, 8, 3), ["a"], r"\[N, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "torch.uint8"),
        (torch.full((1, 3, 8, 8), -1.0), ["a"], r"in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), 255.0), ["a"], r"in \[0, 1\]"),
    ],
)
def test_wrong_inputs_are_refused(reward, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        reward.score(images, prompts)


def test_long_prompts_keep_their_end_token(hps, emoji):
    images = some_images(2, 28, 28)
    reward = RewardHPS(hps[0], architecture=TINY_HPS)
    long, cut = "apple " * 10_000, "apple " * 75
    scores = reward.score(images, [long, cut])
    torch.testing.assert_close(scores, reward.score(images, [cut, cut]))
    assert reward.count_truncated([long, cut, "apple " * 76, "a"]) == 2
    reward = RewardEmoji("emoji_reward", emoji[0])
    long, cut = "apple " * 10_000, "apple " * 10
    torch.testing.assert_close(reward.score(images, [long, cut]), reward.score(images, [cut, cut]))
    assert reward.count_truncated([long, cut, "apple " * 11, "a"]) == 2


def test_the_logit_scale_does_not_enter(hps, tmp_path):
    path, tensors = hps
    torch.save({"state_dict": {**tensors, "logit_scale": torch.tensor(9.0)}}, tmp_path / "scaled.pt")
    images = some_images(4, 28, 28)
    one, other = (RewardHPS(p, architecture=TINY_HPS).score(images, PROMPTS) for p in (path, tmp_path / "scaled.pt"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("height, width", [(512, 512), (300, 512), (512, 301), (224, 100), (64, 64), (1, 1)])
def test_hps_preprocessing_equals_torchvision(height, width):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    images = some_images(2, height, width)
    scale = 224 / max(height, width)
    new = [round(height * scale), round(width * scale)]
    expected = vision.resize(images, new, InterpolationMode.BICUBIC, antialias=True)
    rows, columns = 224 - new[0], 224 - new[1]
    expected = vision.pad(expected, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0)
    expected = vision.normalize(expected, MEAN, STD)
    torch.testing.assert_close(preprocess(images, 224), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "height, width, size", [(64, 64, (28, 28)), (40, 31, (50, 12)), (9, 20, (9, 10)), (1, 7, (3, 1))]
)
def test_the_gradient_of_resizing_is_pytorchs(height, width, size):
    """Which is added up in no fixed order on a GPU."""
    images = some_images(2, height, width)
    weights = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))

    def gradient(resize):
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad((weights * resize(leaf)).sum(), leaf)[0]

    theirs = gradient(lambda leaf: F.interpolate(leaf, size=size, mode="bicubic", antialias=True, align_corners=False))
    torch.testing.assert_close(gradient(lambda leaf: antialiased(leaf, *size)), theirs, rtol=0, atol=1e-5)
    assert antialiased(images, height, width) is images


def test_black_and_white_pixels_have_a_gradient(reward):
    """Of pictures in the model's own size: as many pixels of a picture are as dark or bright as can be."""
    side = reward.image_size
    images = some_images(4, side, side).round().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    assert (gradient != 0).float().mean() > 0.99


def test_hps_preprocessing_pads_with_black():
    black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    result = preprocess(torch.ones(1, 3, 50, 100), 224)
    torch.testing.assert_close(result[0, :, :56], black[:, None, None].expand(3, 56, 224))
    assert (result[0, :, 56:168] > 1).all()
    assert preprocess(torch.ones(1, 3, 1, 1000), 224).shape == (1, 3, 224, 224)


def test_emoji_resizes_as_pillow_does(emoji):
    """Against PIL, whose result is rounded to 8 bits: half a grey level in pixels, far less in the score."""
    from PIL import Image

    reward = RewardEmoji("emoji_reward", emoji[0])
    images = some_images(4, 50, 70)
    resized = []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture = picture.resize((EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.BICUBIC)
        resized.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    torch.testing.assert_close(
        reward.score(images, PROMPTS), reward.score(torch.stack(resized), PROMPTS), rtol=0, atol=5e-3
    )


def changed(state, **tensors):
    return {"state_dict": {**state, **tensors}}


def without(state, key):
    return {"state_dict": {name: value for name, value in state.items() if name != key}}


BAD_CHECKPOINTS = {
    "nan": (lambda s: changed(s, text_projection=torch.full((16, 16), math.nan)), "text_projection holds NaN"),
    "inf": (lambda s: changed(s, logit_scale=torch.tensor(math.inf)), "logit_scale holds NaN or infinite"),
    "shape": (lambda s: changed(s, text_projection=torch.zeros(4, 16)), r"text_projection is \[4, 16\] instead of"),
    "missing": (lambda s: without(s, "ln_final.bias"), r"1 missing \(first: ln_final.bias\)"),
    "extra": (lambda s: changed(s, score_head=torch.zeros(1)), r"1 unknown \(first: score_head\)"),
    "bare": (lambda s: s, "plain open_clip model"),
    "image_reward": (lambda s: {"blip.visual_encoder.cls_token": torch.zeros(1)}, "looks like ImageReward"),
    "aesthetic": (lambda s: {"layers.0.weight": torch.zeros(1)}, "aesthetic"),
    "list": (lambda s: [1, 2], "holds a list"),
    "empty": (lambda s: {}, "is empty"),
    "code": (lambda s: {"state_dict": Path("x")}, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_hps_checkpoints_are_refused(hps, tmp_path, case):
    damage, message = BAD_CHECKPOINTS[case]
    path = tmp_path / "bad.pt"
    torch.save(damage(hps[1]), path)
    with pytest.raises(CheckpointError, match=message) as error:
        RewardHPS(path, architecture=TINY_HPS)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_hps_checkpoint_is_refused(hps, tmp_path, keep):
    data = hps[0].read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        RewardHPS(path, architecture=TINY_HPS)


def test_the_published_name_needs_the_published_bytes(hps, tmp_path):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    path.write_bytes(hps[0].read_bytes())
    with pytest.raises(CheckpointError, match="is damaged: SHA-256"):
        RewardHPS(path, architecture=TINY_HPS)


def test_weights_are_recorded(hps, emoji):
    reward = RewardHPS(hps[0], architecture=TINY_HPS)
    assert (reward.name, reward.version, reward.dtype) == ("hps_v2.1", "custom", "float32")
    assert reward.weights_sha256 == sha256_file(hps[0])
    reward = RewardEmoji("emoji_heldout", emoji[0])
    assert (reward.name, reward.dtype) == ("emoji_heldout", "float32")
    assert reward.weights_sha256 == sha256_file(emoji[0] / "model.safetensors")


def test_bad_emoji_weights_are_refused(emoji, tmp_path):
    _, state = emoji
    folder = tmp_path / "bad"
    write_emoji_folder(folder)
    weights = folder / "model.safetensors"
    spoilt = {**state, "logit_scale": torch.tensor(math.nan)}
    reshaped = {**state, "visual_projection.weight": torch.zeros(3, 3)}
    lacking = {key: value for key, value in state.items() if key != "text_projection.weight"}
    for tensors, message in ((spoilt, "NaN"), (reshaped, r"\[3, 3\] instead of"), (lacking, "1 missing")):
        save_file(tensors, weights)
        with pytest.raises(CheckpointError, match=message):
            RewardEmoji("emoji_reward", folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        RewardEmoji("emoji_reward", folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        RewardEmoji("emoji_reward", folder)


def test_the_factory_and_its_door(emoji, hps, tmp_path):
    reward = create_reward("emoji_heldout", weights=emoji[0], batch_size=2)
    assert reward.name == "emoji_heldout"
    assert check_reward_weights("emoji_heldout", emoji[0]) == emoji[0]
    assert check_reward_weights("hps", hps[0]) == hps[0]
    with pytest.raises(UserError, match=r"unknown reward 'clap': choose one of hps, .*, emoji_reward, emoji_heldout"):
        check_reward_weights("clap")
    with pytest.raises(UserError, match=r"HPS_v2\.1_compressed\.pt .*xswu/HPSv2\S* and put it into"):
        check_reward_weights("hps", tmp_path / "HPS_v2.1_compressed.pt")  # not there, and no network to fetch it
    with pytest.raises(UserError, match=r"mine\.pt is missing: download HPS_v2\.1_compressed\.pt from \S* into"):
        check_reward_weights("hps", tmp_path / "mine.pt")
    with pytest.raises(UserError, match=r"config\.json is missing: emoji_reward needs"):
        check_reward_weights("emoji_reward", tmp_path)
    with pytest.raises(UserError, match="float32 only"):
        create_reward("emoji_reward", weights=emoji[0], amp=True)
    with pytest.raises(UserError, match="needs a GPU"):
        create_reward("hps", weights=hps[0], amp=True)
    with pytest.raises(UserError, match="open_clip knows no architecture 'ViT-none'"):
        RewardHPS(hps[0], architecture="ViT-none")


@pytest.mark.skipif(not REWARD_FOLDERS["emoji_reward"].is_dir(), reason="the embedded weights are not there")
def test_the_embedded_rewards_load():
    for name in REWARD_FOLDERS:
        images = some_images(2, 64, 64)
        scores = create_reward(name).score(images, ["a 3d emoji of red apple on a teal background", ""])
        assert torch.isfinite(scores).all()
        assert scores.abs().max() < 1
