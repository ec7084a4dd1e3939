"""The one interface between solvers and backbones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils.errors import UserError

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the decoder beside a network in such a precision: bfloat16 is too coarse for 8-bit pictures.
DECODER_DTYPES = {torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.float32}


class ModelError(UserError):
    """A backbone that cannot be had or used as asked."""


@dataclass(frozen=True)
class TextCond:
    """Text embeddings of B prompts."""

    text: Tensor  # [B, length, width]

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice) -> TextCond:
        return TextCond(self.text[rows])

    def repeat_interleave(self, k: int) -> TextCond:
        """Every row k times, sample-major: row b becomes rows b*k ... b*k + k-1."""
        return TextCond(self.text.repeat_interleave(k, dim=0))


class Denoiser(ABC):
    """A frozen text-to-image model seen as the slope of its probability-flow ODE.

    Guidance, precision and memory layout are settled inside; a solver sees nothing but this class. No weight asks for a
    gradient, but `slope` and `decode` pass gradients on to their inputs.
    """

    dataset_name: str  # its key in `create_model`
    device: torch.device
    img_channels: int  # of the latents
    img_resolution: int  # height and width of the latents
    sigma_min: float
    sigma_max: float
    is_flow: bool
    guidance_rate: float  # 1 is unguided and runs one row per evaluation instead of two
    calls: int  # network calls so far
    rows: int  # batch rows so far, one guidance branch counted

    @abstractmethod
    def slope(self, x: Tensor, sigma: Tensor, cond: TextCond) -> Tensor:
        """dx/dsigma at `x [B, C, H, W]` and `sigma` (0-dim or `[B]`, float64): shape of x, float32 at least."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of model time `t`, any shape, float64."""

    @abstractmethod
    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Model time of noise level `sigma`, any shape, float64."""

    @abstractmethod
    def initial_state(self, noise: Tensor, sigma0: float | Tensor) -> Tensor:
        """The state at `sigma0` that standard normal `noise [B, C, H, W]` stands for."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> TextCond:
        """Condition of B prompts."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` => images `[B, 3, H', W']`, float32, about [-1, 1] (not clamped)."""

    @abstractmethod
    def share_rows(self) -> None:
        """From now on each rank works out a part of the rows of every network call, guidance branches counted.

        All ranks must then make the same calls, and get the same slopes.
        """

    @abstractmethod
    def compile_calls(self, compiling: bool) -> None:
        """Whether calls from now on are worth the time that compiling them takes; before it is told, none is.

        Compiled calls may round otherwise. For equal settings the same call gives the same bits whatever went before
        it, in another process, too, on the same kind of device and with the same versions of the libraries.
        """
