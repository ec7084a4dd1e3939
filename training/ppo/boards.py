"""Where the curves and pictures of a run can be watched while it goes: TensorBoard, Weights & Biases."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from training.images import image_grid, to_uint8
from training.ppo.config import Config, flatten

if TYPE_CHECKING:
    from training.ppo.run_dir import RunDirectory

LOW, HIGH = "_ci95_low", "_ci95_high"  # beside the "_mean" of a value with an interval
PROJECT = "epd-rdpo"  # at Weights & Biases, unless WANDB_PROJECT names another
WAIT_SECONDS = 30.0  # for Weights & Biases to answer, at the start and at the end of a run


class Board(Protocol):
    """What shows a run; every name begins with its group, "train/" or "evaluation/"."""

    def add_values(self, values: Mapping[str, float], step: int) -> None:
        """Add the numbers of a step by name."""

    def add_picture(self, name: str, picture: Tensor, step: int) -> None:
        """Add a picture `[3, H, W]` in [0, 1]."""

    def close(self) -> None:
        """Write what is left."""


def sample_grid(images: Tensor) -> Tensor:
    """Images `[G, 3, H, W]`, G >= 1, as one picture `[3, H', W']`, as square as may be."""
    return image_grid(images, columns=math.isqrt(len(images) - 1) + 1)


def create_boards(directory: RunDirectory, config: Config, step: int) -> list[Board]:
    """The boards that `config.logging` asks for; `step` is the last finished one, what they show beyond it goes."""
    boards: list[Board] = []
    if config.logging.tensorboard:
        boards.append(TensorBoard(directory, step))
    if config.logging.wandb:
        boards.append(WandbBoard(directory, config))
    return boards


class TensorBoard:
    """Event files in the run folder. Values with an interval also become curves with a band (tab "Custom scalars")."""

    def __init__(self, directory: RunDirectory, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(directory.tensorboard, purge_step=step + 1)
        self.bands: dict[str, dict[str, list]] = {}  # group -> chart -> its kind and its three curves

    def add_values(self, values: Mapping[str, float], step: int) -> None:
        self._add_bands(values)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def _add_bands(self, values: Mapping[str, float]) -> None:
        known = sum(map(len, self.bands.values()))
        for name in (name.removesuffix(LOW) for name in values if name.endswith(LOW)):
            curves = ["Margin", [f"{name}_mean", name + LOW, name + HIGH]]
            self.bands.setdefault(name.partition("/")[0], {})[name] = curves
        if sum(map(len, self.bands.values())) > known:
            self.writer.add_custom_scalars(self.bands)

    def add_picture(self, name: str, picture: Tensor, step: int) -> None:
        self.writer.add_image(name, picture, step)

    def close(self) -> None:
        self.writer.close()


class WandbBoard:
    """A run at Weights & Biases by the name of the run folder; a resumed run goes on there.

    It never ends the training: what goes wrong is a line on stderr, and nothing more is sent. WANDB_MODE=offline keeps
    all in the run folder's logs/wandb, for `wandb sync`.
    """

    def __init__(self, directory: RunDirectory, config: Config):
        import wandb

        self.wandb = wandb
        self.run = None
        folder = directory.path / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        name = directory.path.resolve().name

        def start() -> None:
            waits = dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), WAIT_SECONDS)
            settings = wandb.Settings(**waits, console="off")
            run_id = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[-120:]
            names = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "id": run_id, "name": name, "resume": "allow"}
            self.run = wandb.init(**names, dir=str(folder), config=flatten(config), settings=settings)

        self._try(start)

    def add_values(self, values: Mapping[str, float], step: int) -> None:
        if (run := self.run) is not None:
            self._try(lambda: run.log(dict(values), step=step))

    def add_picture(self, name: str, picture: Tensor, step: int) -> None:
        if (run := self.run) is not None:
            pixels = to_uint8(picture[None])[0].numpy()
            self._try(lambda: run.log({name: self.wandb.Image(pixels)}, step=step))

    def close(self) -> None:
        if self.run is not None:
            self._try(self.run.finish)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of whatever kind: a service that only shows the run must not end it
            self.run = None
            reason = " ".join(str(error).split())[:200]
            print(f"note: nothing more goes to Weights & Biases: {reason}", file=sys.stderr, flush=True)
