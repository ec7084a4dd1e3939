"""ImageReward against its equations in numpy float64, and against bad files and inputs."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clip_equations import gelu, patches
from launchers import NEEDS_A_GPU
from PIL import Image

from torch_utils.checkpoint import CheckpointError, sha256_file
from torch_utils.download_util import ASSETS, KnownFile
from torch_utils.errors import UserError
from training.ppo.reward_base import load_strict
from training.ppo.reward_models import imagereward
from training.ppo.reward_models.clip_backbone import Tower
from training.ppo.reward_models.imagereward import (
    PUBLISHED_SIZES,
    SPARE,
    BertTokenizer,
    ImageRewardNetwork,
    ImageRewardSizes,
    RewardImageReward,
)
from training.ppo.reward_models.pixels import MEAN, STD
from training.ppo.scripts import score_imagereward

# In no order, so that an id that does not come from the file shows.
VOCABULARY = ["the", "[PAD]", "a", "red", "apple", "##s", "[SEP]", "blue", "star", "[MASK]", "on", "[UNK]", "teal"]
VOCABULARY += ["[CLS]", ",", "cafe", "猫"]
IMAGE, PATCH, CONTEXT, POSITIONS = 32, 8, 9, 12
VISION, TEXT = Tower(24, 2, 3, 40), Tower(16, 2, 2, 28)
TINY = ImageRewardSizes(VISION, TEXT, PATCH, IMAGE, len(VOCABULARY) + 2, POSITIONS, CONTEXT)
PIECES = {
    "a red apple": "a red apple",
    "Blue STARS, on\tteal!": "blue star ##s , on teal [UNK]",
    "": "",
    "Café 猫猫 🧀": "cafe 猫 猫 [UNK]",
    "apple " * 12: "apple apple apple apple apple apple apple",
}
PROMPTS = list(PIECES)
EXTRAS = ("vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias")
QKV = ("query", "key", "value")
POSITION_IDS = "blip.text_encoder.embeddings.position_ids"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as the authors' code makes them: BLIP's ViT (after timm), its BERT, the head."""
    shapes = {"cls_token": (1, 1, VISION.width), "pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, VISION.width)}
    shapes |= {"patch_embed.proj.weight": (VISION.width, 3, PATCH, PATCH), "patch_embed.proj.bias": (VISION.width,)}
    for index in range(VISION.layers):
        block = f"blocks.{index}"
        shapes |= norm(f"{block}.norm1", VISION.width) | norm(f"{block}.norm2", VISION.width)
        shapes |= linear(f"{block}.attn.qkv", VISION.width, 3 * VISION.width)
        shapes |= linear(f"{block}.attn.proj", VISION.width, VISION.width)
        shapes |= linear(f"{block}.mlp.fc1", VISION.width, VISION.hidden)
        shapes |= linear(f"{block}.mlp.fc2", VISION.hidden, VISION.width)
    shapes |= norm("norm", VISION.width)
    text = {"embeddings.word_embeddings.weight": (len(VOCABULARY) + 2, TEXT.width)}
    text |= {"embeddings.position_embeddings.weight": (POSITIONS, TEXT.width)} | norm(
        "embeddings.LayerNorm", TEXT.width
    )
    for index in range(TEXT.layers):
        for kind, memory in (("attention", TEXT.width), ("crossattention", VISION.width)):
            start = f"encoder.layer.{index}.{kind}"
            text |= linear(f"{start}.self.query", TEXT.width, TEXT.width)
            text |= linear(f"{start}.self.key", memory, TEXT.width) | linear(f"{start}.self.value", memory, TEXT.width)
            text |= linear(f"{start}.output.dense", TEXT.width, TEXT.width)
            text |= norm(f"{start}.output.LayerNorm", TEXT.width)
        text |= linear(f"encoder.layer.{index}.intermediate.dense", TEXT.width, TEXT.hidden)
        text |= linear(f"encoder.layer.{index}.output.dense", TEXT.hidden, TEXT.width)
        text |= norm(f"encoder.layer.{index}.output.LayerNorm", TEXT.width)
    widths = (TEXT.width, 1024, 128, 64, 16, 1)
    head = {}
    for index, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        head |= linear(f"mlp.layers.{index}", inputs, outputs)
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    return shapes | {f"blip.text_encoder.{name}": shape for name, shape in text.items()} | head


def published_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes().items():
        value = torch.randn(shape, generator=generator)
        if ("embed" in name and "LayerNorm" not in name) or name.endswith("cls_token"):
            value *= 0.01  # so small that the constant in the norms' square roots matters
        elif len(shape) == 2:
            value *= 1 / math.sqrt(shape[1])
        else:
            value = 0.2 * value + ("norm" in name.lower() and name.endswith("weight"))
        state[name] = value
    return state


def with_extras(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What else the published file holds."""
    extras = {f"blip.{name}": torch.full((3, 3), math.nan) for name in EXTRAS}
    return state | extras | {POSITION_IDS: torch.arange(POSITIONS)[None]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with mine.pt, half.pt and words.txt, and the float32 tensors."""
    folder = tmp_path_factory.mktemp("imagereward")
    state = published_weights()
    torch.save(with_extras(state), folder / "mine.pt")
    torch.save({name: value.half() for name, value in state.items()}, folder / "half.pt")
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in VOCABULARY), encoding="utf-8")
    return folder, state


def load(folder: Path, name: str = "mine.pt", **options) -> RewardImageReward:
    return RewardImageReward(folder / name, vocabulary=folder / "words.txt", sizes=TINY, **options)


@pytest.fixture(scope="module")
def reward(files):
    return load(files[0], batch_size=3)


def some_images(count: int, height: int = IMAGE, width: int = IMAGE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


# The equations.


def affine(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state, name, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(queries, keys, values, heads):
    """Softmax attention of `[L, width]` to `[M, width]`, each head on its own slice of the width."""
    slices = np.split(np.arange(queries.shape[1]), heads)
    mixed = []
    for part in slices:
        logits = queries[:, part] @ keys[:, part].T / math.sqrt(len(part))
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ values[:, part])
    return np.concatenate(mixed, axis=1)


def image_tokens(state, image):
    """Pre-norm transformer: `[3, S, S]` => `[patches + 1, width]`."""
    state = {name.removeprefix("blip.visual_encoder."): value for name, value in state.items()}
    pixels = (image - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    kernel = state["patch_embed.proj.weight"].reshape(VISION.width, -1)
    x = patches(pixels, PATCH) @ kernel.T + state["patch_embed.proj.bias"]
    x = np.concatenate([state["cls_token"][0], x]) + state["pos_embed"][0]
    for index in range(VISION.layers):
        block = f"blocks.{index}"
        packed = affine(state, f"{block}.attn.qkv", layer_norm(state, f"{block}.norm1", x, 1e-6))
        x = x + affine(state, f"{block}.attn.proj", attend(*np.split(packed, 3, axis=1), VISION.heads))
        hidden = gelu(affine(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + affine(state, f"{block}.mlp.fc2", hidden)
    return layer_norm(state, "norm", x, 1e-6)


def text_tokens(state, ids, image):
    """Post-norm transformer that reads itself, then the image: token ids, without padding => `[L, width]`."""
    state = {name.removeprefix("blip.text_encoder."): value for name, value in state.items()}
    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(state, "embeddings.LayerNorm", x, 1e-12)
    for index in range(TEXT.layers):
        layer = f"encoder.layer.{index}"
        for kind in ("attention", "crossattention"):
            memory = x if kind == "attention" else image
            start = f"{layer}.{kind}"
            parts = (affine(state, f"{start}.self.{n}", m) for n, m in zip(QKV, (x, memory, memory), strict=True))
            mixed = affine(state, f"{start}.output.dense", attend(*parts, TEXT.heads))
            x = layer_norm(state, f"{start}.output.LayerNorm", x + mixed, 1e-12)
        hidden = gelu(affine(state, f"{layer}.intermediate.dense", x))
        x = layer_norm(state, f"{layer}.output.LayerNorm", x + affine(state, f"{layer}.output.dense", hidden), 1e-12)
    return x


def expected_score(state, image, ids) -> float:
    x = text_tokens(state, ids, image_tokens(state, image))[0]
    for index in (0, 2, 4, 6, 7):
        x = affine(state, f"mlp.layers.{index}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def token_ids(prompt: str) -> list[int]:
    return [VOCABULARY.index(piece) for piece in ("[CLS]", *PIECES[prompt].split(), "[SEP]")]


def in_numpy(state):
    return {name: value.double().numpy() for name, value in state.items()}


@pytest.mark.parametrize("name", ["mine.pt", "half.pt"])
def test_scores_equal_the_equations(files, name):
    folder, state = files
    if name == "half.pt":
        state = {key: value.half() for key, value in state.items()}
    images = some_images(len(PROMPTS))
    pairs = zip(images.double().numpy(), PROMPTS, strict=True)
    expected = [expected_score(in_numpy(state), image, token_ids(prompt)) for image, prompt in pairs]
    scores = load(folder, name).score(images, PROMPTS)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=2e-6)
    assert np.ptp(expected) > 0.5


def test_both_the_image_and_the_prompt_decide(reward):
    one, other = some_images(2)
    scores = reward.score(torch.stack([one, one, other]), [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert (scores[0] - scores[1:]).abs().min() > 0.01


def test_gradients_equal_differences(files, reward):
    image, way = some_images(1, seed=3), some_images(1, seed=4) - 0.5
    image.requires_grad_()
    reward.score(image, PROMPTS[:1]).sum().backward()
    state, ids, start = in_numpy(files[1]), token_ids(PROMPTS[0]), image[0].detach().double().numpy()
    up, down = (expected_score(state, start + step * way[0].double().numpy(), ids) for step in (1e-5, -1e-5))
    assert (image.grad * way).sum().item() == pytest.approx((up - down) / 2e-5, rel=1e-4)
    assert not reward.score(image.detach(), PROMPTS[:1]).requires_grad
    assert all(not weight.requires_grad for weight in reward.model.parameters())


def test_gradients_pass_resizing(reward):
    images = some_images(2, 40, 57).requires_grad_()
    reward.score(images, PROMPTS[:2]).sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_rows_do_not_depend_on_their_batch(reward):
    images, prompts = some_images(7, 40, 24), [PROMPTS[i % 5] for i in range(7)]
    together = reward.score(images, prompts)
    single = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, single, rtol=0, atol=2e-6)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward.score(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=2e-6)
    empty = reward.score(images[:0], [])
    assert (empty.shape, empty.dtype) == ((0,), torch.float32)


@pytest.mark.parametrize("height, width", [(1, 1), (64, 64), (17, 50), (50, 17), (1, 200), (200, 1)])
def test_any_image_size(reward, height, width):
    assert torch.isfinite(reward.score(some_images(2, height, width), PROMPTS[:2])).all()


def test_the_crop_is_torchvision_s(reward):
    """Three columns too many: two are cut on the left and one on the right."""
    images = some_images(2, IMAGE, IMAGE + 3)
    cut = reward.score(images[..., 2 : IMAGE + 2], PROMPTS[:2])
    torch.testing.assert_close(reward.score(images, PROMPTS[:2]), cut, rtol=0, atol=0)


def test_resizing_is_the_authors(reward):
    """Their transform, on pictures; a level in a few pixels is what Pillow and we may differ by."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    transform = Compose([Resize(IMAGE, interpolation=InterpolationMode.BICUBIC), CenterCrop(IMAGE), ToTensor()])
    images = some_images(3, 50, 70)
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    theirs = reward.score(torch.stack([transform(picture) for picture in pictures]), PROMPTS[:3])
    torch.testing.assert_close(reward.score(images, PROMPTS[:3]), theirs, rtol=0, atol=1e-3)


def test_a_nan_image_spoils_only_its_own_score(reward):
    images = some_images(4)
    clean = reward.score(images, PROMPTS[:4])
    images[2, 0, 3, 3] = math.nan
    scores = reward.score(images, PROMPTS[:4])
    assert torch.isnan(scores).tolist() == [False, False, True, False]
    torch.testing.assert_close(scores[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=2e-6)


def test_wrong_inputs_are_refused(reward):
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        reward.score(some_images(2), ["a"])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        reward.score(some_images(1) * 255, ["a"])


# Text


def test_prompts_become_bert_s_tokens(files):
    ids, mask = BertTokenizer(files[0] / "words.txt", len(VOCABULARY), CONTEXT)(PROMPTS)
    for prompt, row, kept in zip(PROMPTS, ids.tolist(), mask.tolist(), strict=True):
        expected = token_ids(prompt)
        rest = CONTEXT - len(expected)
        assert row == expected + [VOCABULARY.index("[PAD]")] * rest
        assert kept == [1] * len(expected) + [0] * rest


def test_long_prompts_keep_their_end_token(reward):
    image = some_images(1).expand(3, -1, -1, -1)
    long, cut = "apple " * 10_000, "apple " * 7
    scores = reward.score(image, [long, cut, "apple " * 6])
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-6)
    assert abs(scores[2] - scores[1]) > 1e-3
    assert reward.tokenizer([long])[0][0, -1] == VOCABULARY.index("[SEP]")
    # Word pieces count, not words.
    assert reward.count_truncated([long, cut, "apple " * 8, "apples " * 4, "a", ""]) == 3


BAD_VOCABULARIES = {
    "short": (VOCABULARY[:-1], "has 16 different tokens instead of 17"),
    "repeated": ([*VOCABULARY[:-1], "a"], "has 16 different tokens instead of 17"),
    "special": ([word for word in VOCABULARY if word not in ("[SEP]", "[CLS]")], r"lacks \[CLS\], \[SEP\]"),
    "empty": ([], "lacks"),
}


@pytest.mark.parametrize("case", BAD_VOCABULARIES)
def test_bad_vocabularies_are_refused(files, tmp_path, case):
    words, message = BAD_VOCABULARIES[case]
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as error:
        RewardImageReward(files[0] / "mine.pt", vocabulary=path, sizes=TINY)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_is_no_text_is_refused(files):
    with pytest.raises(CheckpointError, match="no UTF-8 text"):
        RewardImageReward(files[0] / "mine.pt", vocabulary=files[0] / "mine.pt", sizes=TINY)


def test_the_vocabulary_beside_the_weights_is_taken(files, tmp_path):
    (tmp_path / "mine.pt").write_bytes((files[0] / "mine.pt").read_bytes())
    (tmp_path / "vocab.txt").write_bytes((files[0] / "words.txt").read_bytes())
    assert RewardImageReward(tmp_path / "mine.pt", sizes=TINY).version == "custom"
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.txt .*google-bert/bert-base-uncased\S* and put it into"):
        RewardImageReward(tmp_path / "mine.pt", sizes=TINY)  # and there is no network to fetch it


# Weights


def test_every_weight_has_one_name(files):
    network = ImageRewardNetwork(TINY)
    layout = network.published_layout()
    assert {name: tuple(value.shape) for name, value in layout.state_dict().items()} == published_shapes()
    assert {id(weight) for weight in layout.parameters()} == {id(weight) for weight in network.parameters()}
    for name in files[1]:
        lacking = {key: value for key, value in files[1].items() if key != name}
        with pytest.raises(CheckpointError, match=rf"tensors: 1 missing \(first: {name}\)$"):
            load_strict(layout, lacking, Path("x.pt"), SPARE)


def test_the_published_network_has_the_published_size():
    """With BLIP's two projections to 256 numbers, float32 and torch's zip archive, it makes a file of 1.79 GB."""
    with torch.device("meta"):
        network = ImageRewardNetwork(PUBLISHED_SIZES)
    projections = (PUBLISHED_SIZES.vision.width + PUBLISHED_SIZES.text.width + 2) * 256
    assert sum(weight.numel() for weight in network.parameters()) + projections == 446_665_953
    # What a state dict does not hold would keep its random start values.
    assert [name for name, _ in network.named_buffers()] == ["text.embeddings.position_ids"]
    assert network.published_layout().state_dict()["blip.visual_encoder.blocks.23.mlp.fc1.weight"].shape == (4096, 1024)


QUERY = "blip.text_encoder.encoder.layer.1.crossattention.self.query.weight"
BAD_CHECKPOINTS = {
    "nan": (lambda s: s | {QUERY: torch.full((16, 16), math.nan)}, f"{QUERY} holds NaN"),
    "inf": (lambda s: s | {"mlp.layers.7.bias": torch.tensor([math.inf])}, "mlp.layers.7.bias holds NaN or infinite"),
    "shape": (lambda s: s | {QUERY: torch.zeros(4, 16)}, rf"{QUERY} is \[4, 16\] instead of \[16, 16\]"),
    "extra": (lambda s: s | {"blip.visual_encoder.head.bias": torch.zeros(1)}, r"1 unknown \(first: blip.visual_enc"),
    "ours": (lambda s: ImageRewardNetwork(TINY).state_dict(), "another model"),
    "half of it": (lambda s: {k: v for k, v in s.items() if k.startswith("blip.")}, "10 missing .*mlp.layers.0.weight"),
    "blip": (lambda s: {k.removeprefix("blip."): v for k, v in s.items()}, "looks like BLIP"),
    "hps": (lambda s: {"state_dict": s}, "looks like HPSv2"),
    "aesthetic": (lambda s: {"layers.0.weight": torch.zeros(1)}, "aesthetic"),
    "list": (lambda s: [1, 2], "holds a list"),
    "empty": (lambda s: {}, "is empty"),
    "code": (lambda s: s | {"config": Path("x")}, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused(files, tmp_path, case):
    damage, message = BAD_CHECKPOINTS[case]
    path = tmp_path / "bad.pt"
    torch.save(damage(files[1]), path)
    with pytest.raises(CheckpointError, match=message) as error:
        RewardImageReward(path, vocabulary=files[0] / "words.txt", sizes=TINY)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_checkpoint_is_refused(files, tmp_path):
    data = (files[0] / "mine.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        RewardImageReward(path, vocabulary=files[0] / "words.txt", sizes=TINY)


def test_missing_files_and_half_precision_on_a_cpu_are_refused(files, tmp_path):
    with pytest.raises(UserError, match=r"mine\.pt is missing: download ImageReward\.pt from \S* into"):
        RewardImageReward(tmp_path / "mine.pt")
    with pytest.raises(
        UserError, match=r"words\.txt is missing: download vocab\.txt from \S*bert-base-uncased\S* into"
    ):
        RewardImageReward(files[0] / "mine.pt", vocabulary=tmp_path / "words.txt")
    with pytest.raises(UserError, match="needs a GPU"):
        load(files[0], amp=True)


def test_weights_are_recorded(files, reward):
    assert (reward.name, reward.version, reward.dtype) == ("imagereward_v1.0", "custom", "float32")
    assert reward.preprocessing == "shortest-side-pillow-bicubic-32-torchvision-offset"
    assert reward.weights_sha256 == sha256_file(files[0] / "mine.pt")


def test_published_files_go_together(files, tmp_path, monkeypatch):
    path = tmp_path / "ImageReward.pt"
    path.write_bytes((files[0] / "mine.pt").read_bytes())
    words = files[0] / "words.txt"
    with pytest.raises(CheckpointError, match="is damaged: SHA-256"):
        RewardImageReward(path, vocabulary=words, sizes=TINY)
    published = (KnownFile(path.name, None, sha256_file(path)),)
    monkeypatch.setitem(ASSETS, "imagereward", replace(ASSETS["imagereward"], files=published))
    with pytest.raises(CheckpointError, match=r"words\.txt is not the vocabulary that .*bert-base-uncased"):
        RewardImageReward(path, vocabulary=words, sizes=TINY)
    monkeypatch.setattr(imagereward, "VOCABULARY", KnownFile("vocab.txt", None, sha256_file(words)))
    assert RewardImageReward(path, vocabulary=words, sizes=TINY).version == "v1.0"


@NEEDS_A_GPU
def test_a_gpu_gives_the_same_scores(files, reward):
    images, prompts = some_images(8, 60, 40), [PROMPTS[i % 5] for i in range(8)]
    exact = reward.score(images, prompts)
    torch.testing.assert_close(load(files[0], device="cuda").score(images, prompts), exact, rtol=1e-5, atol=1e-5)
    half = load(files[0], device="cuda", amp=True)
    scores = half.score(images.cuda(), prompts)
    assert (scores.is_cuda, scores.dtype, half.dtype) == (True, torch.float32, "float16-autocast")
    torch.testing.assert_close(scores.cpu(), exact, rtol=0, atol=3e-2)


# The command


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from click.testing import CliRunner\n"
        "from training.ppo.scripts import score_imagereward as script\n"
        "result = CliRunner().invoke(script.main, ['--help'])\n"
        "assert result.exit_code == 0 and '--vocabulary' in result.output\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_scores_a_folder(files, reward, tmp_path, monkeypatch):
    monkeypatch.setattr(imagereward, "RewardImageReward", functools.partial(RewardImageReward, sizes=TINY))
    monkeypatch.setattr(imagereward.RewardImageReward, "name", RewardImageReward.name, raising=False)
    images = some_images(3, 40, 40)
    rows = []
    for seed, image in enumerate(images):
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{seed}.png")
        rows.append({"file": f"{seed}.png", "seed": seed, "prompt": PROMPTS[4 - seed], "solver": "ddim"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"images": tmp_path, "weights": files[0] / "mine.pt", "vocabulary": files[0] / "words.txt"}
    options |= {"output-json": tmp_path / "scores.json", "device": "cpu"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    result = CliRunner().invoke(score_imagereward.main, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "scores.json").read_text())
    assert (record["metric"], record["version"], record["truncated_prompts"]) == ("imagereward_v1.0", "custom", 1)
    expected = reward.score(images, [row["prompt"] for row in rows]).tolist()
    assert [row["score"] for row in record["scores"]] == pytest.approx(expected, abs=2e-6)
