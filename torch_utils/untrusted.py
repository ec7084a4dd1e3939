"""Reading files that others may have made: no more of them than they can need, and no JSON that cannot be used."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100  # of lists and objects in each other
# A model's config.json.
MAX_CONFIG_BYTES = 1 << 20
MAX_SIZE = 100_000  # of its numbers; CLIP's vocabulary is the largest, with 49,408
MAX_LAYERS = 64  # and of the lengths of its lists
LAYER_COUNTS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
# What makes transformers and diffusers fetch or run code that is not their own, or read other weights.
FOREIGN = re.compile("attn_implementation|use_kernel|kernel_config|auto_map|quantization|transformers_weights")
UNUSED = (None, False)  # saved by some versions for what is not used


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a file of at most `limit`; raises `OSError`, too, where it has more."""
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", os.fspath(path))
    return data


def bounded_lines(path: str | os.PathLike[str], longest: int = 1 << 20) -> Iterator[bytes]:
    """The lines of a file without their ends; one of `longest` bytes or more is given cut off, and is the last."""
    with open(path, "rb") as file:
        while line := file.readline(longest):
            yield line.rstrip(b"\r\n")
            if len(line) == longest:
                return


def no_link(path: str, flags: int) -> int:
    """For `open(..., opener=no_link)`: a symbolic link is an error, so that nothing is written to where it leads."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises `ValueError` for what is no JSON, for NaN and infinity, for half characters such as an escaped surrogate
    without its partner, and for values nested deeper than `MAX_DEPTH`: all of it can be written as JSON again.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return value
        below: list[object] = []
        for item in level:
            match item:
                case dict():
                    below += item.keys()
                    below += item.values()
                case list():
                    below += item
                case str():
                    item.encode("utf-8")
                case float() if not math.isfinite(item):
                    raise ValueError("a number is not finite")
        level = below
    raise ValueError("nested too deeply")


def _read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    config = parse_json(read_bounded(path, MAX_CONFIG_BYTES))
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")
    return config


def check_tokenizer_config(path: str | os.PathLike[str]) -> None:
    """Raise `OSError`, or `ValueError` for a tokenizer_config.json that is none, or names files to read elsewhere."""
    config = _read_object(path)
    for name in ("vocab", "merges"):
        if isinstance(config.get(name), str):
            raise ValueError(f"{name} of tokenizer_config.json names a file, which is not read; remove that entry")


def read_model_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A model's config.json, for the libraries to use.

    Raises `OSError`, or `ValueError` for what is none, for sizes that no model here has, which would be built before
    they are compared with the weights, and for entries that name code or other files.
    """
    config = _read_object(path)
    todo: list[tuple[str, object]] = list(config.items())
    while todo:
        name, value = todo.pop()
        most = MAX_LAYERS if name in LAYER_COUNTS else MAX_SIZE
        match value:
            case _ if FOREIGN.search(name) and value not in UNUSED and name != "_attn_implementation_autoset":
                raise ValueError(f"{ascii(name)[:80]} names code or a file, which is not used")
            case int() if value > most:
                raise ValueError(f"{ascii(name)[:80]} is {ascii(value)[:20]}; at most {most} are possible")
            case list() if len(value) > MAX_LAYERS:
                raise ValueError(f"{ascii(name)[:80]} has {len(value)} entries; at most {MAX_LAYERS} are possible")
            case list():
                todo += [(name, item) for item in value]
            case dict():
                todo += value.items()
    return config
