"""What every reward offers, and the arithmetic that the CLIP-like ones share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from torch_utils.checkpoint import WEIGHT_TYPES, CheckpointError, load_tensors
from torch_utils.errors import UserError

# Images per forward; what a caller chooses changes speed and memory, never a score.
DEFAULT_BATCH_SIZE = 32


class Reward(Protocol):
    """A model that judges images by their prompts; the trainer and the scorer commands use the same object.

    Two scores are comparable only where all five attributes agree.
    """

    name: str  # the metric, e.g. "hps_v2.1"
    version: str  # of the weights, e.g. "v2.1"
    weights_sha256: str
    preprocessing: str  # how pixels reach the model
    dtype: str  # of the computation: "float32", or "float16-autocast"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores, float32 `[N]` on the images' device.

        `images` are float `[N, 3, H, W]` in [0, 1], already quantised (`images.quantize`); `prompts` are N strings.
        Row n depends on image n and prompt n alone; an image with NaN scores NaN. Where the images ask for gradients,
        the scores have them.
        Raises `ValueError` for other shapes, dtypes or ranges.
        """

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder reads (the end-of-text token is always kept)."""


def check_inputs(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise `ValueError` unless `images` is float `[N, 3, H, W]` in [0, 1] and `prompts` has N entries."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    if len(images) and (images.amin() < 0 or images.amax() > 1):
        raise ValueError(f"images must lie in [0, 1], got {images.amin():.3f} to {images.amax():.3f}")


def dtype_name(amp: bool, device: torch.device) -> str:
    """What a scorer computes in, for its records. Raises `UserError` for `amp` without a GPU."""
    if amp and device.type != "cuda":
        raise UserError(f"half precision (amp) needs a GPU, not {device}: leave it off")
    return "float16-autocast" if amp else "float32"


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 products in full float32, whatever the backbone asked for; afterwards all is as before.

    By default cuDNN computes convolutions in TF32, whose error is as large as the gaps between solvers.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def cosine_scores(
    images: Tensor,
    prompts: Sequence[str],
    batch_size: int,
    embed_images: Callable[[Tensor], Tensor],
    embed_texts: Callable[[list[str]], Tensor],
) -> Tensor:
    """Cosine of each image with its own prompt: float32 `[N]` on the images' device.

    `embed_images([B, 3, H, W])` and `embed_texts(list of B)` return L2-normalised `[B, D]`. Each distinct prompt is
    embedded once, since the samples of a rollout share their prompts.
    """
    if not prompts:
        return torch.zeros(0, device=images.device)
    distinct = list(dict.fromkeys(prompts))
    row = {prompt: index for index, prompt in enumerate(distinct)}
    scores = []
    with exact_float32():
        texts = torch.cat([embed_texts(distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)])
        for start in range(0, len(prompts), batch_size):
            image = embed_images(images[start : start + batch_size])
            text = texts[[row[prompt] for prompt in prompts[start : start + batch_size]]]
            # A matrix product, so that autocast rounds it to half precision as the published scores were.
            scores.append(torch.bmm(image[:, None, :], text[:, :, None]).flatten())
    return torch.cat(scores).to(device=images.device, dtype=torch.float32)


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of `what`, a `.safetensors` file or a torch file that holds a dict, on the CPU; runs no code from it.

    Raises `CheckpointError`, one line, for a file that is damaged, would run code, or holds anything but named tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    content = load_tensors(path, what)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is not {what}: it {looks_like(content)}")
    return content


# What published checkpoints are recognised by: a pattern of a name, and what it says. The first that fits is taken.
MARKS = (
    (r"^cross_model\.", "looks like MPS"),
    (r"^blip\.", "looks like ImageReward"),
    (r"^visual_encoder\.", "looks like BLIP, such as ImageReward was tuned from"),
    (r"^layers\.", "looks like the aesthetic predictor's head"),
    (r"^vision_model\..*\.layers\.31\.", "looks like a transformers CLIP ViT-H/14, such as PickScore"),
    (r"^vision_model\.", "looks like a transformers CLIP model, such as OpenAI's"),
    (r"^visual\.", "looks like a plain open_clip model, such as the LAION one that HPSv2 was tuned from"),
    (r"^state_dict$", "looks like HPSv2, or a training run's checkpoint"),
    (r"^down_blocks\.", "looks like a diffusion model's network"),
)


def looks_like(names: Iterable[object]) -> str:
    """What a checkpoint with these names of tensors is, as the end of a sentence."""
    names = sorted(str(name) for name in names)
    for mark, description in MARKS:
        if any(re.search(mark, name) for name in names):
            return description
    return f"has the keys {', '.join(names[:4])}" if names else "is empty"


def load_strict(model: nn.Module, state: dict[str, Tensor], path: Path, spare: Sequence[str] = ()) -> None:
    """Load `state` into `model`, converting to the model's dtype: every tensor used, every weight set.

    `spare` are names, or beginnings of names that end with a dot, of tensors that the file may hold and nobody needs.
    Raises `CheckpointError` naming `path` and the first key that is missing, extra, of another shape, or not finite.
    """
    unneeded = tuple(name for name in spare if name.endswith("."))
    state = {key: value for key, value in state.items() if key not in spare and not key.startswith(unneeded)}
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    counted = ((missing, "missing"), (extra, "unknown"))
    problems = [f"{len(keys)} {what} (first: {keys[0]})" for keys, what in counted if keys]
    if reshaped:
        key = reshaped[0]
        shapes = f"{list(state[key].shape)} instead of {list(own[key].shape)}"
        problems.append(f"{len(reshaped)} of another shape (first: {key} is {shapes})")
    if problems:
        raise CheckpointError(
            f"{path} holds the weights of another model (it {looks_like(state)}); tensors: {', '.join(problems)}"
        )
    for key, value in state.items():
        if str(value.dtype) not in WEIGHT_TYPES:
            raise CheckpointError(f"{path} cannot be used: {key} is of type {value.dtype}")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path} is damaged: {key} holds NaN or infinite values")
    model.load_state_dict(state)
