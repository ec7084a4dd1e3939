"""MPS against its equations, and the reader of its pickled checkpoint against hostile and damaged files."""

from __future__ import annotations

import collections
import encodings.cp437  # noqa: F401  imported by zipfile for the first old name that it meets, which is no call of a pickle
import io
import math
import os
import pickle
import pickletools
import random
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_equations import cosine, gelu, layer_norm, patches, transformer, transformers_layers
from launchers import NEEDS_A_GPU
from safetensors.torch import save_file
from torch import nn

from MPS.trainer.models import checkpoint
from MPS.trainer.models.checkpoint import read_state_dict
from MPS.trainer.models.clip_model import OVERALL, MPSModel, condition_mask
from MPS.trainer.models.cross_modeling import CrossSizes
from torch_utils.checkpoint import CheckpointError, sha256_file
from torch_utils.errors import UserError
from training.ppo.reward_models.clip_backbone import ClipSizes, Tower
from training.ppo.reward_models.mps import MPSSizes, RewardMPS
from training.ppo.reward_models.pixels import MEAN, STD

CLIP = ClipSizes(Tower(32, 2, 2, 40), Tower(16, 2, 4, 24), projection=24, activation="gelu", patch=7, image_size=28)
TINY = MPSSizes(CLIP, CrossSizes(layers=2, heads=3, head_width=8, expansion=2))
# A small file.
FEW_WORDS = MPSSizes(
    replace(CLIP, vision=Tower(32, 1, 2, 40), text=Tower(16, 1, 4, 24), vocabulary=50), replace(TINY.cross, layers=1)
)
PROMPTS = ["a red apple", "soft light, warm color, artistry", "", "猫 café 🙂", "limbs " * 75]
CANARY = "canary"  # hostile files create this file in the working folder when they run


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remembered hashes go to a folder of this test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# The official module, as far as a checkpoint shows it: classes, children, parameters, buffers. Nothing can be computed.


def holder(module: str, name: str, parent: type = nn.Module) -> type:
    """A class that pickles as `module.name`."""
    return type(name, (parent,), {"__module__": module, "__qualname__": name})


def official_module(sizes: MPSSizes) -> tuple[nn.Module, dict[str, types.ModuleType]]:
    """The whole published module with random half precision weights, and the modules that its pickle speaks of."""
    from transformers import CLIPModel

    torch.manual_seed(0)
    clip, cross = "trainer.models.clip_model", "trainer.models.cross_modeling"
    classes = {
        **{name: holder(cross, name) for name in ("Cross_model", "Residual", "CrossAttention", "LayerNorm", "SwiGLU")},
        **{name: holder(cross, name) for name in ("ParallelTransformerBlock", "RotaryEmbedding")},
        "CLIPModel": holder(clip, "CLIPModel"),
        "XCLIPModel": holder(clip, "XCLIPModel", CLIPModel),
    }

    def made(name: str, **children: object) -> nn.Module:
        module = classes[name]()
        for key, child in children.items():
            setattr(module, key, child)
        return module

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    def norm() -> nn.Module:
        module = made("LayerNorm", weight=nn.Parameter(torch.ones(width)))
        module.register_buffer("bias", torch.zeros(width))
        return module

    width, shape = sizes.clip.projection, sizes.cross
    inner, hidden, head = shape.heads * shape.head_width, shape.expansion * width, shape.head_width
    layers = []
    for _ in range(shape.layers):
        attention = made(
            "CrossAttention",
            **{"norm": norm(), "context_norm": nn.Identity(), "to_q": linear(width, inner)},
            **{"to_kv": linear(width, 2 * head), "to_out": linear(inner, width)},
            ff=nn.Sequential(linear(width, 2 * hidden), made("SwiGLU"), linear(hidden, width)),
        )
        rotary = made("RotaryEmbedding")
        rotary.register_buffer("inv_freq", 1 / 10_000 ** (torch.arange(0, head, 2) / head))
        block = made(
            "ParallelTransformerBlock",
            **{"norm": norm(), "rotary_emb": rotary, "attn_out": linear(inner, width)},
            fused_attn_ff_proj=linear(width, inner + 2 * head + 2 * hidden),
            ff_out=nn.Sequential(made("SwiGLU"), linear(hidden, width)),
        )
        # Left over from a forward pass, but no part of the state dict.
        block.register_buffer("pos_emb", torch.ones(17, head), persistent=False)
        layers.append(nn.ModuleList([made("Residual", fn=attention), made("Residual", fn=block)]))
    model = made(
        "CLIPModel",
        model=classes["XCLIPModel"](sizes.clip.config()),
        cross_model=made("Cross_model", layers=nn.ModuleList(layers)),
    )
    # Fresh layers have zero biases and unit norms, which would hide a mix-up: move every weight.
    for name, value in model.state_dict().items():
        if not name.endswith("inv_freq"):
            value += 0.2 * torch.randn(value.shape)
    for embeddings in (model.model.text_model.embeddings, model.model.vision_model.embeddings):
        embeddings.register_buffer("position_ids", embeddings.position_ids.clone())  # as in older transformers
    model.model.logit_scale.data.fill_(math.log(100))
    # The start token, which every condition has too, would be the most similar one of every prompt: it is moved into a
    # channel that counts nothing. Another channel counts much, so that the prompts' largest similarities differ.
    text = model.model.text_model
    text.embeddings.position_embedding.weight.data[0, 0] += 1000
    text.final_layer_norm.weight.data[:2] *= torch.tensor([0, 6])
    modules = {name: types.ModuleType(name) for name in ("trainer", "trainer.models", clip, cross)}
    for name, kind in classes.items():
        setattr(modules[kind.__module__], name, kind)
    model.half().eval()
    for part in model.modules():  # ordered dicts, as in the torch of those years
        for field in ("_parameters", "_buffers", "_modules"):
            part.__dict__[field] = collections.OrderedDict(part.__dict__[field])
    return model, modules


def save_official(path: Path, sizes: MPSSizes, change=lambda model: None) -> dict[str, torch.Tensor]:
    """Write the whole module as published; returns its state dict. `change(model)` is applied first."""
    model, modules = official_module(sizes)
    change(model)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(model, path)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(file, tensors) of a tiny MPS with CLIP's vocabulary, whole module pickled."""
    path = tmp_path_factory.mktemp("mps") / "tiny.pth"
    return path, save_official(path, TINY)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(file, tensors) of the same with a vocabulary of 50 words."""
    path = tmp_path_factory.mktemp("mps") / "small.pth"
    return path, save_official(path, FEW_WORDS)


@pytest.fixture(scope="module")
def reward(weights):
    return RewardMPS(weights[0], sizes=TINY, batch_size=3)


# Scores


def some_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T


def normed(state, name, x):
    return layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"])


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def swiglu(x):
    value, gate = np.split(x, 2, axis=-1)
    return value * gate / (1 + np.exp(-gate))


def rotated(x, frequencies):
    """Channels c and c + half as one complex number, turned by position times frequency."""
    numbers = x[..., : len(frequencies)] + 1j * x[..., len(frequencies) :]
    numbers = numbers * np.exp(1j * np.arange(x.shape[-2])[:, None] * frequencies)
    return np.concatenate([numbers.real, numbers.imag], -1)


def attended(query, key, value, mask=0.0):
    """`query [H, I, D]`, `key` and `value [T, D]`, additive `mask [T]` => `[I, H * D]`."""
    mixed = softmax(query @ key.T / math.sqrt(key.shape[-1]) + mask) @ value
    return mixed.swapaxes(0, 1).reshape(query.shape[1], -1)


def text_tokens(state, tokens):
    """All projected token features of one prompt, `[77, 24]`."""
    x = state["text_model.embeddings.token_embedding.weight"][tokens]
    x = x + state["text_model.embeddings.position_embedding.weight"]
    x = transformer(x, transformers_layers(state, "text_model.encoder.", 2), 4, gelu, causal=True)
    return linear(state, "text_projection", normed(state, "text_model.final_layer_norm", x))


def image_tokens(state, image):
    """Projected features of the class token and the 16 patches of one image, without the last norm."""
    pixels = (image - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    x = patches(pixels, 7) @ state["vision_model.embeddings.patch_embedding.weight"].reshape(32, -1).T
    x = np.concatenate([state["vision_model.embeddings.class_embedding"][None], x])
    x = normed(state, "vision_model.pre_layrnorm", x + state["vision_model.embeddings.position_embedding.weight"])
    x = transformer(x, transformers_layers(state, "vision_model.encoder.", 2), 2, gelu, causal=False)
    return linear(state, "visual_projection", x)


def crossed(state, image, text, mask):
    """The image tokens after the transformer that looks at the text."""
    heads, width = TINY.cross.heads, TINY.cross.head_width
    for index in range(TINY.cross.layers):
        name = f"cross_model.layers.{index}.0.fn"
        x = normed(state, f"{name}.norm", image)
        query = linear(state, f"{name}.to_q", x).reshape(-1, heads, width).swapaxes(0, 1)
        key, value = np.split(linear(state, f"{name}.to_kv", text), 2, axis=-1)
        fed = linear(state, f"{name}.ff.2", swiglu(linear(state, f"{name}.ff.0", x)))
        image = image + linear(state, f"{name}.to_out", attended(query, key, value, mask)) + fed
        name = f"cross_model.layers.{index}.1.fn"
        x = linear(state, f"{name}.fused_attn_ff_proj", normed(state, f"{name}.norm", image))
        inner = heads * width
        query, key, value, fed = np.split(x, [inner, inner + width, inner + 2 * width], axis=-1)
        query = query.reshape(-1, heads, width).swapaxes(0, 1)
        frequencies = state[f"{name}.rotary_emb.inv_freq"]
        out = attended(rotated(query, frequencies), rotated(key, frequencies), value)
        image = image + linear(state, f"{name}.attn_out", out) + linear(state, f"{name}.ff_out.1", swiglu(fed))
    return image


def plain_scores(tensors, images, tokens, condition):
    """MPS in numpy float64 of images `[N, 3, 28, 28]`, one pair at a time, and the similarities `[N, 77]`."""
    state = {name.removeprefix("model."): value.double().numpy() for name, value in tensors.items()}
    condition = text_tokens(state, condition)
    scores, similarities = [], []
    for image, prompt in zip(images.double().numpy(), tokens, strict=True):
        text = text_tokens(state, prompt)
        similarities.append((text @ condition.T).max(-1))
        mask = np.where(similarities[-1] / similarities[-1].max() > 0.3, 0, -np.inf)
        seen = crossed(state, image_tokens(state, image), text, mask)
        scores.append(np.exp(state["logit_scale"]) * cosine(seen[0], text[list(prompt).index(49407)]))
    return np.array(scores), np.array(similarities)


def tokens_of(prompts: list[str]) -> np.ndarray:
    """`[N, 77]` int64 from open_clip's tokenizer, padded with the end token as the authors' tokenizer does."""
    import open_clip

    tokens = open_clip.SimpleTokenizer()(prompts).numpy()
    return np.where(np.cumsum(tokens == 49407, axis=1) > 0, 49407, tokens)


def test_scores_equal_the_equations(weights, reward):
    images = some_images(5, 28, 28)
    expected, similarities = plain_scores(weights[1], images, tokens_of(PROMPTS), tokens_of([OVERALL])[0])
    scores = reward.score(images, PROMPTS)
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-4)  # of numbers up to 100, in float32
    assert np.ptp(expected) > 5
    # The example is one where the mask matters, and where a maximum over all prompts would be another.
    highest = similarities.max(1, keepdims=True)
    masks, common = similarities / highest > 0.3, similarities / highest.max() > 0.3
    assert (masks.sum(1) < 77).sum() >= 3 and (masks != common).any(1).sum() >= 3


def test_the_mask_is_made_of_each_prompt_alone(reward):
    """Beside the same features scaled by 100, the others are masked as before."""
    texts = torch.randn(3, 77, 24, generator=torch.Generator().manual_seed(0))
    condition = torch.randn(77, 24, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([condition_mask(text[None], condition) for text in texts])
    together = condition_mask(torch.cat([texts, 100 * texts]), condition)
    assert torch.equal(together, torch.cat([alone, alone]))
    assert alone.any(1).all() and not alone.all()
    assert condition_mask(-condition.abs(), condition.abs()).all()  # nothing is similar, and nothing less than others
    nearest = (texts @ condition.T).amax(2).argmax(1)
    assert alone[range(3), nearest].all()


def test_rows_do_not_depend_on_their_batch(reward):
    images, prompts = some_images(7, 40, 24), [PROMPTS[i % 4] for i in range(7)]
    together = reward.score(images, prompts)
    single = torch.cat([reward.score(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(together, single, rtol=0, atol=1e-4)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward.score(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-4)
    assert reward.score(images[:0], []).shape == (0,)


def test_each_prompt_is_encoded_once(reward, monkeypatch):
    asked = []
    tokenizer = reward.tokenizer
    monkeypatch.setattr(reward, "tokenizer", lambda prompts: asked.extend(prompts) or tokenizer(prompts))
    reward.score(some_images(9, 28, 28), ["a", "b", "a"] * 3)
    assert asked == ["a", "b"]


@pytest.mark.parametrize("height, width", [(1, 1), (64, 64), (17, 50), (51, 17), (1, 200)])
def test_any_image_size(reward, height, width):
    scores = reward.score(some_images(2, height, width), PROMPTS[:2])
    assert torch.isfinite(scores).all() and scores.abs().max() <= 100.1


def test_preprocessing_is_pillows(reward):
    """Shortest side, bicubic, then the central square."""
    from PIL import Image

    images, crops = some_images(2, 50, 71), []
    for image in images:
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        picture = picture.resize((39, 28), Image.Resampling.BICUBIC).crop((5, 0, 33, 28))
        crops.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    expected = reward.score(torch.stack(crops), PROMPTS[:2])
    torch.testing.assert_close(reward.score(images, PROMPTS[:2]), expected, rtol=0, atol=1e-3)


def test_a_nan_image_spoils_only_its_own_score(reward):
    images = some_images(4, 28, 28)
    clean = reward.score(images, PROMPTS[:4])
    images[2, 0, 3, 3] = math.nan
    scores = reward.score(images, PROMPTS[:4])
    assert torch.isnan(scores).tolist() == [False, False, True, False]
    torch.testing.assert_close(scores[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=1e-4)


def test_gradients_are_the_slopes_of_the_scores(weights, reward):
    """Against differences of the numpy scores; resizing is left out, for its rounding hides small steps."""
    images = some_images(2, 28, 28).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    tokens, condition = tokens_of(PROMPTS[:2]), tokens_of([OVERALL])[0]
    step = 1e-4 * direction.double()
    up, down = (plain_scores(weights[1], images.detach() + s, tokens, condition)[0] for s in (step, -step))
    slopes = (gradient * direction).sum((1, 2, 3))
    np.testing.assert_allclose(slopes.numpy(), (up - down) / 2e-4, rtol=1e-3)
    assert reward.score(images.detach(), PROMPTS[:2]).requires_grad is False


def test_long_prompts_keep_their_end_token(reward):
    images = some_images(2, 28, 28)
    long, cut = "apple " * 10_000, "apple " * 75
    torch.testing.assert_close(reward.score(images, [long, cut]), reward.score(images, [cut, cut]))
    assert reward.count_truncated([long, cut, "apple " * 76, "a", ""]) == 2


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.zeros(2, 3, 8, 8), ["a"], "2 images but 1 prompts"),
        (torch.zeros(1, 8, 8, 3), ["a"], r"\[N, 3, H, W\]"),
        (torch.full((1, 3, 8, 8), 255.0), ["a"], r"in \[0, 1\]"),
    ],
)
def test_wrong_inputs_are_refused(reward, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        reward.score(images, prompts)


def test_the_record_of_a_score(weights, reward):
    assert (reward.name, reward.version, reward.dtype) == ("mps_overall", "overall", "float32")
    assert reward.preprocessing == "shortest-side-pillow-bicubic-28-transformers-crop-mask-0.3"
    assert reward.weights_sha256 == sha256_file(weights[0])
    with pytest.raises(UserError, match=r"amp.*needs a GPU"):
        RewardMPS(weights[0], sizes=TINY, amp=True)
    with pytest.raises(UserError, match=r"MPS_overall_checkpoint.pth.* into "):
        RewardMPS(Path("nowhere/else.pth"))


def test_the_published_sizes():
    """986 million parameters of CLIP ViT-H/14 and 118 million of the attention: the 4.42 GB of float32 on the hub."""
    sizes = MPSSizes()
    with torch.device("meta"):
        model = MPSModel(sizes.clip.config(), sizes.cross)
    count = sum(value.numel() for value in model.state_dict().values())
    assert (count, round(4 * count / 1e7)) == (1_104_615_041, 442)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes["cross_model.layers.3.1.fn.fused_attn_ff_proj.weight"] == [1024 + 64 + 64 + 8192, 1024]
    assert shapes["cross_model.layers.0.0.fn.to_kv.weight"] == [128, 1024]
    assert shapes["model.vision_model.embeddings.position_embedding.weight"] == [257, 1280]


@NEEDS_A_GPU
def test_a_gpu_gives_the_same_scores(weights):
    images, prompts = some_images(8, 60, 40), [PROMPTS[i % 4] for i in range(8)]
    exact = RewardMPS(weights[0], sizes=TINY).score(images, prompts)
    scores = RewardMPS(weights[0], sizes=TINY, device="cuda").score(images, prompts)
    torch.testing.assert_close(scores, exact, rtol=0, atol=1e-3)
    half = RewardMPS(weights[0], sizes=TINY, device="cuda", amp=True).score(images.cuda(), prompts)
    assert (half.is_cuda, half.dtype) == (True, torch.float32)
    torch.testing.assert_close(half.cpu(), exact, rtol=0, atol=1.0)


# Weights that do not fit


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


QUERY = "cross_model.layers.0.0.fn.to_q.weight"
BAD = {
    "nan": (lambda s: {**s, QUERY: torch.full((24, 24), math.nan)}, "to_q.weight holds NaN"),
    "missing": (lambda s: without(s, QUERY), f"1 missing (first: {QUERY})"),
    "frequencies": (lambda s: without(s, "cross_model.layers.1.1.fn.rotary_emb.inv_freq"), "1 missing"),
    "extra": (lambda s: {**s, "cross_model.more": torch.zeros(1)}, "1 unknown (first: cross_model.more)"),
    "shape": (lambda s: {**s, QUERY: torch.zeros(24, 23)}, f"{QUERY} is [24, 23] instead of [24, 24]"),
    "only CLIP": (lambda s: {n[6:]: v for n, v in s.items() if n.startswith("model.")}, "a transformers CLIP model"),
    "HPS": (lambda s: {"state_dict": s}, "it looks like HPSv2"),
    "empty": (lambda s: {}, "it is empty"),
    "numbers": (lambda s: {"a": 1}, "it has the keys a"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_weights_that_do_not_fit_get_one_line(weights, tmp_path, name):
    change, message = BAD[name]
    path = tmp_path / "bad.pth"
    torch.save(change(weights[1]), path)
    with pytest.raises(CheckpointError) as caught:
        RewardMPS(path, sizes=TINY)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


# The reader

AUDITED: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if AUDITED is not None:
        AUDITED.append(event)


sys.addaudithook(_audit)  # cannot be removed; does nothing outside of load()
HARMLESS = {"open", "builtins.id"}


def load(path: Path) -> dict[str, torch.Tensor]:
    """Read `path`; whatever happens, nothing ran: no import, call, exec or unpickling was audited."""
    global AUDITED
    AUDITED = events = []
    try:
        return read_state_dict(path)
    except CheckpointError as error:
        text = str(error)
        assert text.startswith(f"{path} ") and text.isprintable() and len(text) < len(str(path)) + 400
        raise
    finally:
        AUDITED = None
        assert set(events) <= HARMLESS
        assert not Path(CANARY).exists() and "trainer" not in sys.modules


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype, name
        torch.testing.assert_close(tensors[name], value.detach(), rtol=0, atol=0, equal_nan=True, msg=name)


def test_the_whole_module_is_read_as_its_state_dict(small, weights):
    path, state = small
    assert_same(load(path), state)
    assert_same(load(weights[0]), weights[1])
    assert sum(name.endswith("inv_freq") for name in state) == 1 and not any("pos_emb" in name for name in state)
    with zipfile.ZipFile(path) as archive:
        text = archive.read("small/data.pkl")
    assert b"trainer.models.clip_model\nXCLIPModel" in text and b"pos_emb" in text


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(60.0)

    def change(model):
        model.shared = nn.Module()
        model.shared.whole = nn.Parameter(base)
        model.shared.again = model.shared.whole
        model.shared.none = None
        model.shared.register_parameter("absent", None)
        views = {
            "rows": base[12:36].view(4, 6),
            "turned": base[12:36].view(4, 6).T,
            "steps": base[5:50:7],
            "wide": torch.arange(5).expand(1, -1),
            "brain": torch.randn(3).bfloat16(),
            "long_real": torch.tensor(1e300, dtype=torch.float64),
            "ints": torch.tensor([-1, 2**31 - 1], dtype=torch.int32),
            "nothing": torch.zeros(3, 0, 2),
            "nan": torch.tensor([math.nan, -math.inf]),
        }
        for name, view in views.items():
            model.shared.register_buffer(name, view)
        model.shared.register_buffer("passing", torch.ones(2), persistent=False)

    state = save_official(tmp_path / "m.pth", FEW_WORDS, change)
    tensors = load(tmp_path / "m.pth")
    assert_same(tensors, state)
    assert tensors["shared.turned"].stride() == (1, 6)
    assert tensors["shared.rows"].untyped_storage().data_ptr() == tensors["shared.whole"].untyped_storage().data_ptr()


def test_state_dicts_are_read_too(small, tmp_path):
    _, state = small
    plain = {name: value.contiguous() for name, value in state.items()}
    model, _ = official_module(FEW_WORDS)
    torch.save(model.state_dict(), tmp_path / "ordered.pth")
    torch.save(plain, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({f"mps.{name}": value for name, value in plain.items()}, tmp_path / "imscore.pth")
    save_file({f"mps.{name}": value for name, value in plain.items()}, tmp_path / "imscore.safetensors")
    for name in ("ordered.pth", "legacy.pth", "imscore.pth"):
        assert_same(read_state_dict(tmp_path / name), state)
    tensors = read_state_dict(tmp_path / "imscore.safetensors")
    assert_same({name: tensors[name] for name in state}, state)


def test_all_forms_give_the_same_scores(weights, reward, tmp_path):
    """Among them single precision, and files without the position ids that newer transformers do not store."""
    state = {f"mps.{n}": v.float() for n, v in weights[1].items() if not n.endswith("position_ids")}
    save_file(state, tmp_path / "model.safetensors")
    images = some_images(3, 28, 28)
    other = RewardMPS(tmp_path / "model.safetensors", sizes=TINY).score(images, PROMPTS[:3])
    torch.testing.assert_close(other, reward.score(images, PROMPTS[:3]), rtol=0, atol=1e-4)


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Storage:
    """Pickles as a storage of torch."""

    def __init__(self, count, key="0", kind=torch.FloatStorage, place="cpu"):
        self.id = ("storage", kind, key, place, count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None


def tensor(storage=None, offset=0, size=(4, 2), stride=(2, 1)):
    return Call(
        torch._utils._rebuild_tensor_v2,
        *(Storage(8) if storage is None else storage, offset, size, stride, False, collections.OrderedDict()),
    )


def module(parameters=None, modules=None, buffers=None, passing=()):
    result = nn.Module()
    result.__dict__.update(_parameters=parameters or {}, _modules=modules or {}, _buffers=buffers or {})
    result.__dict__["_non_persistent_buffers_set"] = set(passing)
    return result


def pickled(content, protocol=2) -> bytes:
    Pickler(stream := io.BytesIO(), protocol).dump(content)
    return stream.getvalue()


NUMBERS = np.arange(8, dtype="<f4").tobytes()


def write(path: Path, text: bytes, members=None, compression=zipfile.ZIP_STORED) -> Path:
    """A torch archive around the pickle `text`, storage "0" holding 0 to 7."""
    members = {"data/0": NUMBERS, "version": b"3\n", "byteorder": b"little", **(members or {})}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {"data.pkl": text, **members}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def refused(tmp_path, content, message="an MPS checkpoint: "):
    path = write(tmp_path / "bad.pth", content if isinstance(content, bytes) else pickled(content))
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_the_hand_made_archive_is_good(tmp_path):
    path = write(
        tmp_path / "good.pth", pickled(module({"w": tensor()}, {"a": module({"b": tensor(None, 6, (2,), (1,))})}))
    )
    assert_same(load(path), {"w": torch.arange(8.0).view(4, 2), "a.b": torch.tensor([6.0, 7.0])})


CALLS = {
    "os.system": Call(os.system, f"touch {CANARY}"),
    "eval": Call(eval, f"open({CANARY!r}, 'w').close()"),
    "exec": Call(exec, f"open({CANARY!r}, 'w').close()"),
    "open": Call(open, CANARY, "w"),
    "getattr": Call(getattr, "x", "upper"),
    "Popen": Call(subprocess.Popen, ["touch", CANARY]),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_calls_are_refused_by_name(tmp_path, name):
    call = CALLS[name]
    for content in (
        *(call, {"w": call}, module({"w": call}), module({"w": tensor()}, {"a": call})),
        *(module({"w": tensor(call)}), module({"w": tensor()}, passing=[call])),
    ):
        refused(
            tmp_path,
            content,
            rf"asks for '.*{name.split('.')[-1]}', which an MPS checkpoint does not need; do not open it",
        )
    refused(tmp_path, pickle.dumps(module({"w": call}), 4), "opcode|asks for")


def test_the_hostile_calls_would_have_run():
    """Guards the canary itself: a plain pickle.loads does run such a file."""
    pickle.loads(pickled(CALLS["os.system"]))
    assert Path(CANARY).exists()


def test_calls_within_torch_are_not_made(tmp_path):
    """Names of the packages that a module is made of are let through, as names."""
    other = write(tmp_path / "other.pth", pickled({"w": tensor()}))
    content = module({"w": tensor()})
    content.hook = Call(torch.load, str(other))
    content.trap = Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x")
    path = write(tmp_path / "quiet.pth", pickled(content))
    assert list(load(path)) == ["w"]
    refused(tmp_path, module({"w": Call(torch.load, str(other))}), "w is not stored as a plain tensor")
    refused(tmp_path, Call(torch.load, str(other)), "lacks the fields")


@pytest.mark.parametrize(
    "change",
    [
        {"size": (5, 2)},
        {"size": (4, 2), "stride": (2, 2)},
        {"size": (4, 2), "stride": (-2, 1)},
        {"size": (-4, -2)},
        {"size": (4, 2, 1)},
        {"size": (1 << 62, 1 << 62)},
        {"size": (1 << 70,), "stride": (0,)},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (0, 1 << 61, 1 << 61), "stride": (1, 1, 1)},
        {"size": (1,) * 200, "stride": (1,) * 200},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 62},
        {"offset": 1.0},
        {"offset": True, "size": (1,), "stride": (1,)},
        {"size": ("4", 2)},
        {"size": "ab"},
        {"size": [4, 2]},
        {"storage": 7},
        {"storage": Storage(9)},
        {"storage": Storage(1 << 60)},
        {"storage": Storage(-8)},
        {"storage": Storage(8.0)},
        {"storage": Storage("8")},
        {"storage": Storage(8, key="1")},
        {"storage": Storage(8, key="../version")},
        {"storage": Storage(8, key=0)},
        {"storage": Storage(8, kind=torch.HalfStorage)},
        {"storage": Storage(8, kind=torch.DoubleStorage)},
        {"storage": Storage(8, kind=torch.load)},
        {"storage": Storage(8, kind="FloatStorage")},
        {"storage": Storage(8, kind=[torch.FloatStorage])},
    ],
)
def test_hostile_tensors(tmp_path, change):
    for wrap in (lambda x: x, lambda x: Call(torch._utils._rebuild_parameter, x, True, collections.OrderedDict())):
        for content in (module({"w": wrap(tensor(**change))}), {"w": wrap(tensor(**change))}):
            refused(tmp_path, content, "w |the numbers of w|damaged")


def circle():
    one = module({"w": tensor()})
    one._modules["a"] = one
    return one


def tower(height, children, digits=1):
    """Few records that unfold into `children ** height` modules."""
    result = module({"w": tensor()})
    for _ in range(height):
        result = module(modules={f"{index:0{digits}d}": result for index in range(children)})
    return result


MODULES = {
    "a text": "x",
    "nothing": None,
    "a list": [tensor()],
    "no module": Call(torch.nn.Linear, 2, 3),
    "a circle": circle(),
    "deep": tower(40, 1, digits=20),
    "shared": tower(40, 2),
    "a crowd": tower(6, 10, digits=20),
    "a number as a child": module(modules={"a": 5}),
    "a list of children": module(modules=[module()]),
    "a tensor as a child": module(modules={"a": tensor()}),
    "a module as a tensor": module({"w": module()}),
    "a text as a tensor": module({"w": "x"}),
    "a number as a name": module({5: tensor()}),
    "a line break in a name": module({"w\nx": tensor()}),
    "a surrogate in a name": module({"w\ud800": tensor()}),
    "a long name": module({"w" * 10_000: tensor()}),
    "one name twice": module({"a.b": tensor()}, {"a": module({"b": tensor()})}),
    "a parameter of a parameter": Call(torch._utils._rebuild_parameter, tensor(), True, None),
    "other names left out": module({"w": 5}, passing=["w"]),
    "a key that is a tuple": {("w",): tensor()},
    "an empty module": module(),
    "children that are not there": module({"w": tensor()}, {str(index): None for index in range(30_000)}),
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_hostile_modules(tmp_path, name):
    started = time.perf_counter()
    refused(tmp_path, MODULES[name])
    assert time.perf_counter() - started < 5


def text(value: bytes) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value


PICKLES = {
    "empty": b"",
    "text": b"hello",
    "no stop": b"\x80\x02}",
    "stop only": b"\x80\x02.",
    "left over": b"\x80\x02N}.",
    "extension registry": b"\x80\x02\x82\x01.",
    "instance": b"(S'touch canary'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nX\x0c\x00\x00\x00touch canaryo.",
    "persistent id in text": b"\x80\x02Pid\n.",
    "dup": b"\x80\x02]2\x86.",
    "pop below a mark": b"\x80\x02}(\x85.",
    "build on nothing": b"\x80\x02b.",
    "build on a list": b"\x80\x02]}b.",
    "reduce of text": b"\x80\x02" + text(b"x") + b")R.",
    "set items on a list": b"\x80\x02](" + text(b"k") + b"Nu.",
    "odd items": b"\x80\x02}(" + text(b"k") + b"u.",
    "a list as a key": b"\x80\x02}(]Nu.",
    "memo hole": b"\x80\x02h\x07.",
    "memo hole far": b"\x80\x02j\xff\xff\xff\xff.",
    "4 GB of text announced": b"\x80\x02X\xff\xff\xff\xffabc.",
    "bad utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "global with a long name": b"\x80\x02c" + b"o" * 100_000 + b"\nsystem\n.",
    "global with a hidden space": b"\x80\x02ctorch os\nsystem\n)R.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 380_000 + b".",
    "deep tuples as a key": b"\x80\x02})" + b"\x85" * 380_000 + b"Ns.",
    "deep persistent ids": b"\x80\x02)" + b"Q" * 380_000 + b".",
    "deep marks": b"\x80\x02" + b"(" * 380_000 + b".",
    "too many opcodes": b"\x80\x02" + b"N" * 450_000 + b".",
    "too long": b"\x80\x02" + text(b" " * (9 << 20)) + b".",
    "contains itself": b"\x80\x02}q\0" + text(b"model") + b"h\0s.",
}


@pytest.mark.parametrize("name", sorted(PICKLES))
def test_bad_pickles(tmp_path, name):
    refused(tmp_path, PICKLES[name])


def test_left_over_names_are_no_cost(tmp_path):
    """As many buffers as names of buffers to leave out: compared one by one this would take hours."""
    count = 100_000
    names = b"".join(text(b"%d" % index) for index in range(count))
    with_none = b"".join(text(b"%d" % index) + b"N" for index in range(count))
    fields = [
        *(text(b"_parameters") + b"}", text(b"_modules") + b"}", text(b"_buffers") + b"}(" + with_none + b"u"),
        text(b"_non_persistent_buffers_set") + b"c__builtin__\nset\n](" + names + b"e\x85R",
    ]
    started = time.perf_counter()
    refused(tmp_path, b"\x80\x02ctorch.nn\nModule\n)\x81}(" + b"".join(fields) + b"ub.")
    assert time.perf_counter() - started < 20


def test_bad_archives(tmp_path):
    good = pickled(module({"w": tensor()}))
    cases = {
        "compressed": write(tmp_path / "a", good, compression=zipfile.ZIP_DEFLATED),
        "big-endian|little": write(tmp_path / "b", good, {"byteorder": b"big"}),
        "2 members named": write(tmp_path / "c", good, {"x/data.pkl": good}),
        "the numbers of w are missing": write(tmp_path / "d", pickled(module({"w": tensor(Storage(8, "1"))}))),
        "but 31 bytes are stored": write(tmp_path / "e", good, {"data/0": NUMBERS[:-1]}),
        "cannot be read": tmp_path,
        "No such file": tmp_path / "none",
    }
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr("archive/version", "3")
    cases["0 members named data.pkl"] = tmp_path / "f"
    (tmp_path / "g").write_bytes(b"PK\x03\x04" + b"\0" * 1000)
    cases["damaged"] = tmp_path / "g"
    (tmp_path / "h").write_bytes(b"no archive at all")
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load(path)
    with pytest.raises(CheckpointError, match="damaged, or holds something other"):
        read_state_dict(tmp_path / "h")


def test_bombs(tmp_path):
    """A compressed pickle and storage, members that overlap, and a huge claimed directory: refused, without memory."""
    good = pickled(module({"w": tensor(Storage(64 << 20))}))
    write(tmp_path / "zipped.pth", good, {"data/0": bytes(256 << 20)}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "zipped.pth").stat().st_size < 1 << 20
    path = write(tmp_path / "claimed.pth", good, {"data/0": bytes(1 << 20)})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)  # the entry of data/0
    data[directory + 20 : directory + 28] = 2 * (256 << 20).to_bytes(4, "little")
    path.write_bytes(data)
    path = write(tmp_path / "overlapping.pth", good, {"data/0": bytes(1 << 20)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for index in range(300):
            again = zipfile.ZipInfo(f"archive/data/{index + 1}")
            again.header_offset, again.CRC = first.header_offset, first.CRC
            again.file_size = again.compress_size = 1 << 20
            archive.filelist.append(again)
        archive._didModify = True
    path = write(tmp_path / "directory.pth", good, {"data/0": bytes(16 << 20)})
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = (16 << 20).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(CheckpointError, match=r"compressed|more bytes|damaged|cut short"):
            load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_truncated_files_are_errors(small, tmp_path):
    data = small[0].read_bytes()
    for length in [0, 1, 4, len(data) - 1, *random.Random(1).sample(range(len(data)), 30)]:
        (tmp_path / "cut.pth").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_state_dict(tmp_path / "cut.pth")


def test_flipped_bytes_are_errors_or_change_nothing(small, tmp_path):
    """What the checksums of the archive do not cover is of no consequence."""
    data, rng, outcomes = small[0].read_bytes(), random.Random(2), collections.Counter()
    with zipfile.ZipFile(small[0]) as archive:
        directory = archive.start_dir
    for index in range(200):
        changed = bytearray(data)
        place = rng.randrange(len(data)) if index % 2 else rng.randrange(directory, len(data))
        changed[place] ^= rng.randrange(1, 256)
        (tmp_path / "flipped.pth").write_bytes(changed)
        try:
            tensors = load(tmp_path / "flipped.pth")
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            outcomes["same"] += 1
            assert_same(tensors, small[1])
    assert outcomes["refused"] > 50 and outcomes["same"] > 5


def test_mutated_pickles_are_errors_or_tensors(small, tmp_path):
    """The same with checksums that agree, as whoever means harm would write them."""
    with zipfile.ZipFile(small[0]) as archive:
        members = {name.removeprefix("small/"): archive.read(name) for name in archive.namelist()}
    good, rng, outcomes = members.pop("data.pkl"), random.Random(3), collections.Counter()
    hostile = [b"cos\nsystem\n", b"ctorch\nload\n", b"R", b"b", b"Q", b"(", b"u", b"0", b"\x81", b"h\0", b"q\0", b"2"]
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place] = rng.randrange(256)
                case 2:
                    data[place:place] = rng.choice(hostile)
                case 3:
                    del data[place : place + rng.randint(1, 8)]
        write(tmp_path / "mutated.pth", bytes(data), members)
        try:
            tensors = load(tmp_path / "mutated.pth")
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    assert outcomes["refused"] > 50 and outcomes["read"] > 10


def test_the_caps_leave_room_for_the_published_file(tmp_path):
    """A module of the published depth, its widths cut down: a third of what is allowed at most."""
    clip = ClipSizes(Tower(16, 32, 16, 16), Tower(16, 24, 16, 16), 16, "gelu", patch=14, image_size=14, vocabulary=50)
    save_official(tmp_path / "deep.pth", MPSSizes(clip, CrossSizes(layers=4, heads=1, head_width=2)))
    with zipfile.ZipFile(tmp_path / "deep.pth") as archive:
        data = archive.read("deep/data.pkl")
    assert 3 * len(data) < checkpoint.MAX_PICKLE_BYTES
    assert 3 * sum(1 for _ in pickletools.genops(data)) < checkpoint.MAX_OPCODES
    assert 9 * len(load(tmp_path / "deep.pth")) < checkpoint.MAX_PARTS  # modules and tensors are three times as many


# The command


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from click.testing import CliRunner\n"
        "from training.ppo.scripts import score_mps as script\n"
        "result = CliRunner().invoke(script.main, ['--help'])\n"
        "assert result.exit_code == 0 and '--amp' in result.output\n"
        "print(sorted({'torch', 'transformers', 'open_clip', 'numpy'} & set(sys.modules)))\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
