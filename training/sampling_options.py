"""What `sample.py` and `sample_baseline.py` have in common on the command line. Imports no torch: `--help` is fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from torch_utils.errors import UserError
from torch_utils.options import cache_dir_option

F = TypeVar("F", bound=Callable)

GROUPS = {
    "Pictures": ("prompt_file", "prompt", "seeds", "batch", "outdir", "grid", "overwrite"),
    "Model and machine": ("model_path", "precision", "max_rows", "compile_mode", "parallel", "cache_dir", "device"),
}
OPTIONS = (
    click.option(
        "--prompt-file",
        help="Prompts, one per line; seed s takes line s, counted from 0",
        metavar="FILE",
        type=click.Path(path_type=Path),
    ),
    click.option("--prompt", help="One prompt for all seeds, instead of --prompt-file", metavar="TEXT"),
    click.option("--seeds", help='Which images, e.g. "0-999" or "3,7,20-29"', metavar="LIST", default="0-63"),
    click.option("--batch", help="Images at a time on each GPU", metavar="INT", type=click.IntRange(min=1), default=16),
    click.option(
        "--outdir",
        help="Where to write",
        metavar="DIR",
        type=click.Path(path_type=Path),
        show_default="samples/<model>-<solver>[-<option><value>...]-<schedule>-nfe<NFE>-para<parallel NFE>",
    ),
    click.option(
        "--model-path",
        help="The model: a folder in diffusers' layout, a .safetensors or .ckpt file in the original one, or "
        "owner/name[@revision] of the Hugging Face hub",
        metavar="PATH",
        show_default="checkout, cache or download",
    ),
    click.option(
        "--precision",
        help="Of the network; the ODE's state is float32",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default="float32",
    ),
    click.option(
        "--compile",
        "compile_mode",
        help="On a GPU: compile the network for the full batches, where there are two at least. default takes minutes "
        "the first time and seconds from the cache folder; max tries more kernels, takes longer, and begins with the "
        "second batch",
        type=click.Choice(["off", "default", "max"]),
        default="off",
    ),
    click.option(
        "--parallel",
        help="What the processes of torchrun share out: images, or, for less latency of few images, the guidance "
        "branches and points of every network call (GPUs of one host)",
        type=click.Choice(["images", "points"]),
        default="images",
    ),
    cache_dir_option,
    click.option("--device", help="Where to run", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    click.option("--grid", help="Also write grid.png with the first 64 images", is_flag=True),
    click.option("--overwrite", help="Make images anew that are there already", is_flag=True),
)


def sampling_options(command: F) -> F:
    """Add OPTIONS to a click command, in that order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def read_prompts(prompt_file: Path | None, prompt: str | None, seeds: str) -> tuple[list[int], list[str]]:
    """Seeds and the prompt of each. Raises a `UserError` subclass for a bad list, file, or seed beyond the prompts."""
    from training.prompts import load_prompts, parse_seeds, prompts_for_seeds

    numbers = parse_seeds(seeds)
    if prompt_file is not None and prompt is None:
        return numbers, prompts_for_seeds(load_prompts(prompt_file), numbers)
    if prompt_file is not None or prompt is None:
        raise UserError("give the prompts by --prompt-file FILE or by --prompt TEXT, one of the two")
    if not prompt.strip():
        raise UserError("--prompt is blank")
    return numbers, [_as_utf8(prompt)] * len(numbers)


def _as_utf8(argument: str) -> str:
    """A command line argument as it was typed, in UTF-8, where the locale's encoding (LC_ALL=C) could not read it."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            "--prompt is not valid UTF-8; write it into a file, and name that with --prompt-file"
        ) from error
