"""CLIPScore, PickScore and the aesthetic predictor against their equations, and against bad weights and inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from clip_equations import cosine, gelu, image_embedding, quick_gelu, text_embedding
from launchers import NEEDS_A_GPU
from PIL import Image
from safetensors.torch import save_file
from tiny_rewards import write_clip_file

from torch_utils.checkpoint import CheckpointError, sha256_file
from torch_utils.errors import UserError
from training.ppo.reward_models.aesthetic import AestheticHead, RewardAesthetic
from training.ppo.reward_models.clip import RewardCLIP
from training.ppo.reward_models.clip_backbone import ClipSizes, Tower
from training.ppo.reward_models.pick import RewardPick
from training.ppo.reward_models.pixels import (
    MEAN,
    STD,
    pillow_pass,
    shortest_side,
    torchvision_offset,
    transformers_offset,
)
from training.ppo.reward_models.tokens import OpenAITokenizer, OpenClipTokenizer, TransformersTokenizer

TINY_L = ClipSizes(Tower(32, 2, 2, 48), Tower(16, 2, 2, 24), 8, "quick_gelu", patch=56)
TINY_H = ClipSizes(Tower(32, 2, 2, 48), Tower(16, 2, 2, 24), 8, "gelu", patch=56)
PROMPTS = ["a red apple", "Blue STAR on a teal background", "", "ein Käse für 5 € 🧀"]
START, END = 49406, 49407


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(path, tensors) of a CLIP file for each of the shapes, and of a head."""
    folder = tmp_path_factory.mktemp("clip")
    head = {key: value + 0.1 for key, value in AestheticHead(8).state_dict().items()}
    torch.save(head, folder / "head.pth")
    found = {"head": (folder / "head.pth", head)}
    for name, sizes in (("l", TINY_L), ("h", TINY_H)):
        found[name] = folder / f"{name}.safetensors", write_clip_file(folder / f"{name}.safetensors", sizes)
    return found


def make(kind: str, files, **options):
    if kind == "clip":
        return RewardCLIP(files["l"][0], sizes=TINY_L, **options)
    if kind == "pick":
        return RewardPick(files["h"][0], sizes=TINY_H, **options)
    return RewardAesthetic(files["head"][0], backbone=files["l"][0], sizes=TINY_L, **options)


@pytest.fixture(params=["clip", "pick", "aesthetic"])
def reward(request, files):
    return make(request.param, files, batch_size=3)


def some_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


def as_picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def normalised_pixels(image: torch.Tensor) -> np.ndarray:
    return (image.double().numpy() - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


def expected_scores(kind: str, files, images, prompts) -> list[float]:
    """By the equations, of images of 224 x 224, with ids from the library that the published scores were made with."""
    name, activation = ("h", gelu) if kind == "pick" else ("l", quick_gelu)
    state = {key: value.double().numpy() for key, value in files[name][1].items()}
    tokens = (TransformersTokenizer() if kind == "pick" else OpenAITokenizer())(prompts).tolist()
    scores = []
    for image, ids in zip(images, tokens, strict=True):
        vector = image_embedding(state, normalised_pixels(image), 56, 2, 2, activation)
        if kind == "aesthetic":
            vector = vector / np.sqrt(vector @ vector)
            for layer in (0, 2, 4, 6, 7):
                head = {
                    part: files["head"][1][f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias")
                }
                vector = head["weight"] @ vector + head["bias"]
            scores.append(vector.item())
            continue
        value = cosine(vector, text_embedding(state, ids[: ids.index(END) + 1], 2, 2, activation))
        scores.append(value * (np.exp(state["logit_scale"]) if kind == "pick" else 1))
    return scores


@pytest.mark.parametrize("kind", ["clip", "pick", "aesthetic"])
def test_scores_equal_the_equations(kind, files):
    images = some_images(4, 224, 224)
    expected = expected_scores(kind, files, images, PROMPTS)
    scores = make(kind, files).score(images, PROMPTS)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=2e-6)
    assert np.ptp(expected) > 0.005


SIZES = [(512, 512), (300, 512), (512, 300), (97, 64), (64, 97), (224, 224), (1, 1), (225, 227), (40, 333), (900, 250)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("offset", [torchvision_offset, transformers_offset])
def test_resizing_is_pillow_s(height, width, offset):
    """Bit for bit."""
    image = some_images(1, height, width)
    size = (224, int(224 * width / height)) if height <= width else (int(224 * height / width), 224)
    # In two calls, rows first, which is what Pillow does by itself but for tall pictures since version 13.
    picture = as_picture(image[0]).resize((size[1], height), Image.Resampling.BICUBIC)
    picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    top, left = offset(size[0] - 224), offset(size[1] - 224)
    expected = np.array(picture)[top : top + 224, left : left + 224].astype(int)
    ours = shortest_side(image, 224, offset)[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize(
    "spare, torchvision, transformers", [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (5, 2, 2), (7, 4, 3)]
)
def test_centre_crops_differ_by_the_library(spare, torchvision, transformers):
    assert (torchvision_offset(spare), transformers_offset(spare)) == (torchvision, transformers)


def test_torchvision_and_transformers_agree_with_our_crops():
    """Their own functions, on a picture whose spare width is odd."""
    from torchvision.transforms.functional import center_crop, resize
    from transformers import CLIPImageProcessorPil

    image = some_images(1, 300, 303)[0]
    picture = as_picture(image)
    theirs = np.array(center_crop(resize(picture, 224, interpolation=Image.Resampling.BICUBIC), 224)).astype(int)
    ours = shortest_side(image[None], 224, torchvision_offset)[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    pixels = CLIPImageProcessorPil()(images=picture, return_tensors="np").pixel_values[0]
    ours = normalised_pixels(shortest_side(image[None], 224, transformers_offset)[0])
    np.testing.assert_allclose(ours, pixels, atol=1e-5)


def test_gradients_pass_the_rounding():
    image = some_images(1, 30, 20).requires_grad_()
    weights = torch.randn(1, 3, 30, 12, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((weights * pillow_pass(image, 12, slice(0, 12))).sum(), image)
    smooth = image.detach().clone().requires_grad_()
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    resized = torch.nn.functional.interpolate(smooth, size=(30, 12), **options)
    (expected,) = torch.autograd.grad((weights * resized).sum(), smooth)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_tokens_are_those_of_each_library():
    texts = ["A  cat &amp; a dog", "schÃ¶n", "x" * 30]
    from transformers import CLIPTokenizer

    openai, transformers = OpenAITokenizer()(texts), TransformersTokenizer()(texts)
    assert openai.shape == transformers.shape == (3, 77)
    assert openai[0].tolist()[:7] == [
        START,
        320,
        2368,
        261,
        320,
        1929,
        END,
    ]  # "&amp;" is "&", as OpenAI's package reads it
    assert transformers[0].tolist()[:7] != openai[0].tolist()[:7]
    assert openai[1].tolist()[:3] == OpenAITokenizer()(["schön"])[0].tolist()[:3]
    assert (openai[:, -1] == 0).all() and (transformers[:, -1] == END).all()
    assert isinstance(TransformersTokenizer().tokenizer, CLIPTokenizer)


def test_prompts_may_hold_the_names_of_the_start_and_end_tokens():
    texts = ["a cat <|endoftext|> a dog <|StartOfText|>", "a cat <end_of_text>"]
    (openai, plain), transformers = OpenAITokenizer()(texts).tolist(), TransformersTokenizer()(texts[:1])[0].tolist()
    assert openai[:8] == [START, 320, 2368, END, 320, 1929, START, END]
    assert transformers[:6] == openai[:6]
    assert plain.count(END) == 1
    assert OpenClipTokenizer()(texts[1:])[0].tolist()[:5] == [START, 320, 2368, END, END]


@pytest.mark.parametrize("make_tokenizer", [OpenAITokenizer, TransformersTokenizer])
def test_truncation_keeps_the_end(make_tokenizer):
    tokenizer = make_tokenizer()
    long = "cat " * 10_000
    assert tokenizer([long])[0].tolist() == [START] + tokenizer(["cat"])[0].tolist()[1:2] * 75 + [END]
    assert tokenizer.count_truncated([long, "cat " * 75, "cat " * 76, ""]) == 2


def test_rows_do_not_depend_on_their_batch(reward):
    images, prompts = some_images(7, 40, 24), [PROMPTS[i % 4] for i in range(7)]
    together = reward.score(images, prompts)
    single = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, single, rtol=1e-5, atol=2e-6)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward.score(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=2e-6)
    assert reward.score(images[:0], []).shape == (0,)


@pytest.mark.parametrize("height, width", [(1, 1), (64, 64), (17, 50), (50, 17), (1, 200)])
def test_any_image_size(reward, height, width):
    assert torch.isfinite(reward.score(some_images(2, height, width), PROMPTS[:2])).all()


def test_a_nan_image_spoils_only_its_own_score(reward):
    images = some_images(4, 28, 28)
    clean = reward.score(images, PROMPTS)
    images[2, 0, 3, 3] = math.nan
    scores = reward.score(images, PROMPTS)
    assert torch.isnan(scores).tolist() == [False, False, True, False]
    torch.testing.assert_close(scores[[0, 1, 3]], clean[[0, 1, 3]], rtol=1e-5, atol=2e-6)


def test_scores_have_gradients(reward):
    images = some_images(3, 30, 30).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:3]).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_only_the_aesthetic_score_ignores_the_prompt(files):
    images = some_images(2, 50, 50)
    for kind, same in (("clip", False), ("pick", False), ("aesthetic", True)):
        reward = make(kind, files)
        assert torch.equal(reward.score(images, ["a", "b"]), reward.score(images, ["c", "d"])) == same
        assert reward.count_truncated(["cat " * 80]) == (0 if same else 1)


def test_weights_are_recorded(files):
    reward = make("clip", files)
    assert (reward.name, reward.version, reward.dtype) == ("clip_l14", "custom", "float32")
    assert reward.weights_sha256 == sha256_file(files["l"][0])
    assert reward.preprocessing == "shortest-side-pillow-bicubic-224-torchvision-crop"
    assert make("pick", files).preprocessing == "shortest-side-pillow-bicubic-224-transformers-crop"
    reward = make("aesthetic", files)
    assert reward.weights_sha256 == f"{sha256_file(files['head'][0])}+{sha256_file(files['l'][0])}"
    assert reward.version == "custom"


def test_weights_of_a_folder(files, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(files["h"][0].read_bytes())
    assert RewardPick(tmp_path, sizes=TINY_H).weights_sha256 == sha256_file(files["h"][0])


BAD = {
    "nan": (lambda s: {**s, "visual_projection.weight": torch.full((8, 32), math.nan)}, "holds NaN"),
    "shape": (lambda s: {**s, "visual_projection.weight": torch.zeros(3, 3)}, r"\[3, 3\] instead of \[8, 32\]"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "logit_scale"}, r"1 missing \(first: logit_scale\)"),
    "extra": (lambda s: {**s, "adapter.weight": torch.zeros(1)}, r"1 unknown \(first: adapter.weight\)"),
    "reward": (lambda s: {"blip.visual_encoder.cls_token": torch.zeros(1)}, "it looks like ImageReward"),
    "open_clip": (lambda s: {"visual.proj": torch.zeros(1)}, "it looks like a plain open_clip model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_in_one_line(case, files, tmp_path):
    damage, message = BAD[case]
    save_file(damage(files["l"][1]), tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        RewardCLIP(tmp_path / "bad.safetensors", sizes=TINY_L)
    assert str(tmp_path / "bad.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused_in_one_line(files, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files["l"][0].read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        RewardCLIP(cut, sizes=TINY_L)
    with pytest.raises(CheckpointError, match="looks like the aesthetic predictor's head"):
        RewardPick(files["head"][0], sizes=TINY_H)
    with pytest.raises(CheckpointError, match="looks like a transformers CLIP model"):
        RewardAesthetic(files["l"][0], backbone=files["l"][0], sizes=TINY_L)
    damaged = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    damaged.write_bytes(files["head"][0].read_bytes())
    with pytest.raises(CheckpointError, match="is damaged: SHA-256"):
        RewardAesthetic(damaged, backbone=files["l"][0], sizes=TINY_L)
    with pytest.raises(UserError, match=r"mine\.safetensors is missing: download model\.safetensors from \S*openai"):
        RewardCLIP(tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="needs a GPU"):
        make("clip", files, amp=True)


@NEEDS_A_GPU
@pytest.mark.parametrize("kind", ["clip", "pick", "aesthetic"])
def test_a_gpu_gives_the_same_scores(kind, files):
    images, prompts = some_images(8, 60, 40), [PROMPTS[i % 4] for i in range(8)]
    exact = make(kind, files).score(images, prompts)
    torch.testing.assert_close(make(kind, files, device="cuda").score(images, prompts), exact, rtol=1e-4, atol=1e-5)
    half = make(kind, files, device="cuda", amp=True).score(images.cuda(), prompts)
    assert (half.is_cuda, half.dtype) == (True, torch.float32)
    torch.testing.assert_close(half.cpu(), exact, rtol=1e-2, atol=5e-3)
