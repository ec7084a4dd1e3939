"""A reward of the user's own: a function named as package.module:function."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torch_utils.checkpoint import sha256_file
from torch_utils.errors import UserError
from training.ppo.reward_base import DEFAULT_BATCH_SIZE, check_inputs

# Called with images float32 [B, 3, H, W] in [0, 1] and B prompts; should return B numbers, a tensor or a list.
Function = Callable[[Tensor, list[str]], object]


def find_function(name: str) -> tuple[Function, Path]:
    """The function `package.module:function`, and the file that its module is in.

    Imports the module, which runs its code. Raises `UserError` where there is no such module or function in it.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise UserError(
            f"reward {name}: there is no module {error.name}; start in the folder that holds it, or add that folder to "
            "PYTHONPATH"
        ) from error
    functions = dict(inspect.getmembers(module, callable))
    if function_name not in functions:
        raise UserError(f"reward {name}: {module.__file__} has no function {function_name}")
    return functions[function_name], Path(inspect.getfile(module))


class RewardCustom:
    """Scores by the user's function, in batches."""

    version, preprocessing, dtype = "custom", "custom", "custom"

    def __init__(self, name: str, *, batch_size: int = DEFAULT_BATCH_SIZE):
        """`name` is package.module:function. Raises `UserError` as `find_function` does."""
        self.name = name
        self.batch_size = batch_size
        self.function, path = find_function(name)
        self.weights_sha256 = sha256_file(path)  # of the code

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward`. Raises `UserError` where the function returns anything but one number per image."""
        check_inputs(images, prompts)
        scores = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            few = list(prompts[rows])
            found = torch.as_tensor(self.function(images[rows], few), dtype=torch.float32, device=images.device)
            if found.shape != (len(few),):
                raise UserError(f"reward {self.name} returned shape {list(found.shape)} for {len(few)} images")
            scores.append(found)
        return torch.cat(scores) if scores else torch.zeros(0, device=images.device)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return 0
