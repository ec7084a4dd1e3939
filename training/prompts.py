"""The one prompt rule and the one seed rule: the prompt of seed s is line s, counted from 0, of the prompt file."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch_utils.errors import UserError
from torch_utils.resources import shipped_file
from torch_utils.seeds import MAX_IMAGE_SEED
from torch_utils.untrusted import read_bounded

PROMPT_COLUMNS = ("text", "caption", "prompt")
MAX_SEED_COUNT = 1_000_000  # image names carry six digits
MAX_FILE_BYTES = 128 << 20
MAX_LINES = 2_000_000


class PromptError(UserError):
    """A prompt file or a seed list that cannot be used."""


def load_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from UTF-8 text (a byte-order mark and CRLF are fine), surrounding spaces removed.

    A path that begins with `src/` is found in the project where it is not below the working directory.
    `.txt`: one prompt per line. `.csv`: the column named `text`, `caption` or `prompt`, a header line first.
    Raises `PromptError` with file and line (from 1) for a blank prompt, bytes that are not UTF-8, a malformed row; and
    for an unreadable or empty file, an unknown suffix, a missing column.
    """
    path = shipped_file(Path(path))
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".csv"):
        raise PromptError(f"prompt file {path} must end in .txt (one prompt per line) or .csv")
    text = _read_utf8(path)
    numbered = _csv_cells(path, text) if suffix == ".csv" else list(enumerate(_lines(text), start=1))
    if not numbered:
        raise PromptError(f"prompt file {path} is empty")
    for number, prompt in numbered:
        if not prompt.strip():
            raise PromptError(f"{path}, line {number}: blank prompt; remove the line or fill it in")
    return [prompt.strip() for _, prompt in numbered]


def _read_utf8(path: Path) -> str:
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise PromptError(f"cannot read prompt file {path}: {error.strerror}") from error
    if max(data.count(b"\n"), data.count(b"\r")) > MAX_LINES:
        raise PromptError(f"prompt file {path} has more than {MAX_LINES} lines; split it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object, not data: the offset counts from behind a byte-order mark.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}, line {line}: not valid UTF-8; save the file as UTF-8") from error


def _lines(text: str) -> list[str]:
    # Not str.splitlines: it also cuts at characters such as U+2028, which would shift every later seed by one.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _csv_cells(path: Path, text: str) -> list[tuple[int, str]]:
    """(line number where the row ends, prompt cell) of every row below the header."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise PromptError(f"{path}, line {reader.line_num}: malformed CSV ({error})") from error
    if not rows:
        return []
    header = [name.strip().lower() for name in rows[0][1]]
    columns = [i for i, name in enumerate(header) if name in PROMPT_COLUMNS]
    if len(columns) != 1:
        raise PromptError(f"{path} needs exactly one column named text, caption or prompt; its header has {header}")
    for number, row in rows[1:]:
        if row and len(row) != len(header):
            raise PromptError(
                f"{path}, line {number}: {len(row)} fields where the header has {len(header)}; put quotes around commas"
            )
    return [(number, row[columns[0]] if row else "") for number, row in rows[1:]]


def parse_seeds(spec: str) -> list[int]:
    """Read a seed list such as "0-9,15,20-22" (both ends included, order kept) as integers.

    Raises `PromptError` for an empty, negative, malformed or repeated part, a range that runs backwards, a seed of
    2^32 or more, or more than a million seeds.
    """
    seeds: list[int] = []
    for part in (part.strip() for part in spec.split(",")):
        match = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", part)
        if match is None:
            negative = "; seeds are not negative" if part.startswith("-") else ""
            raise PromptError(f"seed list {spec!r}: cannot read {part!r}{negative}; write it like 0-9,15")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise PromptError(f"seed list {spec!r}: the range {part} runs backwards; write {last}-{first}")
        if last > MAX_IMAGE_SEED:
            raise PromptError(f"seed list {spec!r}: {last} is too large; the largest seed is {MAX_IMAGE_SEED}")
        if len(seeds) + last - first + 1 > MAX_SEED_COUNT:
            raise PromptError(f"seed list {spec!r} has more than {MAX_SEED_COUNT} seeds; split the run")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        repeated = Counter(seeds).most_common(1)[0][0]
        raise PromptError(f"seed list {spec!r}: seed {repeated} stands there twice; its image would be written twice")
    return seeds


def prompts_for_seeds(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The prompt of each seed: seed s takes `prompts[s]`. Raises `PromptError` for a seed without a prompt."""
    for seed in seeds:
        if not 0 <= seed < len(prompts):
            raise PromptError(f"seed {seed} has no prompt: {len(prompts)} prompts serve seeds 0-{len(prompts) - 1}")
    return [prompts[seed] for seed in seeds]
