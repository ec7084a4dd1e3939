"""The core of every `score_*` command: images and prompts joined, scored in batches, summarised, written as JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import click
import torch

from torch_utils import distributed
from torch_utils.checkpoint import atomic_write_text
from torch_utils.errors import UserError
from torch_utils.progress import Progress
from torch_utils.untrusted import bounded_lines, parse_json, read_bounded
from training.images import ImageError, load_image
from training.manifest import GRID, MANIFEST
from training.ppo.intervals import summarize
from training.ppo.reward_base import Reward
from training.ppo.scorer_options import ScoreRequest
from training.prompts import load_prompts, prompts_for_seeds

# What the manifest says about the sampling of a folder; a score file repeats it, so that tables can be made from it.
SAMPLING_FIELDS = (
    *("solver", "options", "num_steps", "schedule_type", "table_sha256"),
    *("nfe", "parallel_nfe", "forwards", "guidance_rate"),
)
# Threads that decode images; Pillow leaves the interpreter to others meanwhile.
DECODERS = 8
MAX_RECORD_BYTES = 512 << 20  # of a score file; that of a million images has 250 MB
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pillow")


class ScoringError(UserError):
    """Images, prompts, manifests or score files that cannot be used as they are."""


@dataclass(frozen=True)
class ImageEntry:
    """One image to score."""

    path: Path
    file: str  # relative to the images folder, with forward slashes
    seed: int  # from the manifest; without one, the position in the folder
    prompt: str


@dataclass(frozen=True)
class ImageSet:
    """The images of one folder, ordered by seed, and what the manifest says of how they were made (else empty)."""

    folder: Path
    entries: list[ImageEntry]
    sampling: dict[str, Any]


def collect_images(
    folder: Path, pattern: str = "**/*.png", prompts_file: Path | None = None, allow_missing: bool = False
) -> ImageSet:
    """Find the images of `folder` that match `pattern` and pair each with its prompt.

    With `folder/manifest.jsonl`, seeds and prompts come from there; a `prompts_file` is then a check: line s must be
    the prompt of seed s. Files that the manifest does not list are left out with a note, and so are, with
    `allow_missing`, images that it lists and that are not there.
    Without a manifest, `prompts_file` is needed: its lines pair with the images by position in natural order (2.png
    before 10.png), and the counts must agree. Raises `ScoringError` or `PromptError`.
    """
    if not folder.is_dir():
        raise ScoringError(f"{folder} is no folder: --images takes the folder that holds the images")
    try:
        files = {path.relative_to(folder).as_posix(): path for path in folder.glob(pattern) if path.is_file()}
    except (NotImplementedError, ValueError) as error:
        raise ScoringError(f"--pattern {pattern!r} cannot be used: {error}") from error
    if not files:
        raise ScoringError(f"no image in {folder} matches --pattern {pattern!r}")
    prompts = load_prompts(prompts_file) if prompts_file is not None else None
    manifest = folder / MANIFEST
    if manifest.is_file():
        return _join_manifest(folder, files, _read_manifest(manifest), prompts, allow_missing)
    if prompts is None:
        raise ScoringError(f"{folder} has no {MANIFEST}: say with --prompts which prompt belongs to which image")
    if len(prompts) != len(files):
        raise ScoringError(
            f"{len(files)} images in {folder} match {pattern!r} but {prompts_file} has {len(prompts)} prompts; without "
            f"a {MANIFEST} they pair by position, so the counts must agree"
        )
    names = sorted(files, key=_natural_order)
    pairs = zip(names, prompts, strict=True)
    entries = [ImageEntry(files[name], name, index, prompt) for index, (name, prompt) in enumerate(pairs)]
    print(f"no {MANIFEST} in {folder}: prompts pair with the images by position, {names[0]} first", file=sys.stderr)
    return ImageSet(folder, entries, {})


def _natural_order(name: str) -> tuple[list[int | str], str]:
    parts = re.split(r"([0-9]+)", name)  # text, digits, text, ...
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Bytes, because text would also be split at the rarer line ends that a prompt may contain.
    for number, line in enumerate(bounded_lines(path), start=1):
        try:
            row = parse_json(line)
            if not isinstance(row["file"], str) or not isinstance(row["prompt"], str) or type(row["seed"]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            text = line[:80].decode(errors="replace")
            raise ScoringError(f"{path} line {number} lacks file, seed or prompt: {text}") from error
        rows.append(row)
    for key in ("file", "seed"):
        repeated = [value for value, count in Counter(row[key] for row in rows).items() if count > 1]
        if repeated:
            raise ScoringError(f"{path} lists {key} {listing(repeated)} more than once")
    return rows


def _join_manifest(
    folder: Path, files: dict[str, Path], rows: list[dict[str, Any]], prompts: list[str] | None, allow_missing: bool
) -> ImageSet:
    lost = [row for row in rows if row["file"] not in files and not _is_inside(folder, row["file"])]
    if lost:
        seeds = listing([row["seed"] for row in lost])
        message = f"{len(lost)} of the {len(rows)} images in {folder / MANIFEST} are missing: seeds {seeds}"
        if not allow_missing:
            raise ScoringError(message)
        print(message, file=sys.stderr)
    rows = sorted((row for row in rows if row["file"] in files), key=lambda row: row["seed"])
    others = sorted(files.keys() - {row["file"] for row in rows} - {GRID})
    if not rows:
        raise ScoringError(f"none of the {len(files)} images matched in {folder} is listed in its {MANIFEST}")
    if others:
        print(f"not in {folder / MANIFEST}, so not scored: {listing(others)}", file=sys.stderr)
    if prompts is not None:
        for row, prompt in zip(rows, prompts_for_seeds(prompts, [row["seed"] for row in rows]), strict=True):
            if row["prompt"] != prompt:
                raise ScoringError(
                    f"seed {row['seed']} was sampled with the prompt {row['prompt'][:60]!r}, but --prompts says "
                    f"{prompt[:60]!r}: leave --prompts out to score with the prompts in {folder / MANIFEST}"
                )
    sampling = {}
    for field in SAMPLING_FIELDS:
        values = list({json.dumps(row.get(field), sort_keys=True): row.get(field) for row in rows}.values())
        if len(values) > 1:
            raise ScoringError(f"{folder / MANIFEST} mixes images of {field} {listing(values)}: score them apart")
        sampling[field] = values[0]
    entries = [ImageEntry(files[row["file"]], row["file"], row["seed"], row["prompt"]) for row in rows]
    return ImageSet(folder, entries, sampling)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether `name` is a file below `folder`; a name that leads elsewhere is none, and is not looked for."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    try:
        return (folder / path).is_file()
    except OSError:  # a name that no file can have
        return False


def listing(values: Sequence[object]) -> str:
    """The first ten, and how many more."""
    more = f" and {len(values) - 10} more" if len(values) > 10 else ""
    return ", ".join(str(value) for value in values[:10]) + more


def score_images(
    reward: Reward, entries: Sequence[ImageEntry], batch_size: int, device: torch.device
) -> list[float | None]:
    """Score every entry, with the progress on stderr; None where the file is unreadable, which stderr names.

    Files are decoded ahead of the model in threads. Raises `ScoringError` naming the first image whose score is not
    finite.
    """
    scores: list[float | None] = [None] * len(entries)
    progress = Progress(f"scoring with {reward.name}", len(entries), "image")
    started, waited = time.perf_counter(), 0.0
    with contextlib.closing(_decoded([entry.path for entry in entries], ahead=2 * batch_size)) as decoded:
        for start in range(0, len(entries), batch_size):
            # Images of one size make a batch; a folder of mixed sizes is scored in more and smaller ones.
            batches: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}
            before = time.perf_counter()
            for index, image in enumerate(itertools.islice(decoded, batch_size), start):
                if isinstance(image, ImageError):
                    progress.message(f"not scored: {image}")
                else:
                    batches.setdefault(image.shape, []).append((index, image))
            waited += time.perf_counter() - before
            for batch in batches.values():
                images = torch.stack([image for _, image in batch]).to(device)
                values = reward.score(images, [entries[index].prompt for index, _ in batch]).tolist()
                for (index, _), value in zip(batch, values, strict=True):
                    if not math.isfinite(value):
                        raise ScoringError(f"{reward.name} gives {value} for {entries[index].path}")
                    scores[index] = value
            progress.advance(min(batch_size, len(entries) - start))
    progress.close(f"{waited / max(time.perf_counter() - started, 1e-9):.0%} of it waiting for files")
    return scores


def _decoded(paths: Sequence[Path], ahead: int) -> Generator[torch.Tensor | ImageError, None, None]:
    """The images in order, up to `ahead` of them decoded before they are asked for; an error in place of a bad one."""
    pool = ThreadPoolExecutor(min(DECODERS, len(os.sched_getaffinity(0))))
    try:
        waiting = deque(pool.submit(_load, path) for path in paths[:ahead])
        for path in itertools.chain(paths[ahead:], itertools.repeat(None, min(ahead, len(paths)))):
            image = waiting.popleft().result()
            if path is not None:
                waiting.append(pool.submit(_load, path))
            yield image
    finally:
        pool.shutdown(cancel_futures=True)


def _load(path: Path) -> torch.Tensor | ImageError:
    try:
        return load_image(path)
    except ImageError as error:
        return error


def check_output(path: Path, metric: str | None, images: Path) -> None:
    """Make the folder of `path`; raise `ScoringError` unless `path` is free or holds this metric of this folder.

    `metric` None stands for any.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScoringError(f"the folder of {path} cannot be made: {error.strerror}") from error
    if not path.exists():
        return
    try:
        old = parse_json(read_bounded(path, MAX_RECORD_BYTES))
        replaceable = metric in (None, old["metric"]) and old["images_dir"] == images.as_posix()
    except (OSError, ValueError, KeyError, TypeError):
        replaceable = False
    if not replaceable:
        raise ScoringError(
            f"{path} exists and holds no {metric or 'other'} scores of {images}: name another file, or delete it"
        )


class LoadReward(Protocol):
    """A reward's class or `create_reward`, with what a command was told about the weights and the precision."""

    def __call__(self, *, device: torch.device, batch_size: int) -> Reward:
        """Raises `UserError` for weights that are missing or cannot be used."""


def score_folder(request: ScoreRequest, metric: str, load_reward: LoadReward) -> dict[str, Any]:
    """What a `score_*` command does: check, load the reward, score, print the summary, write the JSON; returns it.

    Everything that can be checked without the model is checked before `load_reward` is called. Unreadable
    images do not stop the others: the JSON lists them under `unreadable`, and at the end a `ScoringError` names them.
    """
    images = collect_images(request.images, request.pattern, request.prompts)
    if request.output_json is not None:
        check_output(request.output_json, metric, images.folder)
    with distributed.joined(request.device):
        device = distributed.device()
        reward = load_reward(device=device, batch_size=request.batch_size)
        values = score_images(reward, images.entries, request.batch_size, device)
    record = make_record(reward, images, values)
    click.echo(format_summary(record))
    if request.output_json is not None:
        atomic_write_text(request.output_json, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if record["unreadable"]:
        files = listing(record["unreadable"])
        raise ScoringError(f"{len(record['unreadable'])} of {len(values)} images cannot be read: {files}")
    return record


def make_record(reward: Reward, images: ImageSet, values: Sequence[float | None]) -> dict[str, Any]:
    """The content of a score file. Raises `ScoringError` when no image at all has a score."""
    pairs = list(zip(images.entries, values, strict=True))
    scored = [(entry, value) for entry, value in pairs if value is not None]
    if not scored:
        raise ScoringError(f"none of the {len(pairs)} images in {images.folder} can be read")
    return {
        "metric": reward.name,
        "version": reward.version,
        "images_dir": images.folder.as_posix(),
        **images.sampling,
        **summarize([value for _, value in scored]),
        "weights_sha256": reward.weights_sha256,
        "preprocessing": reward.preprocessing,
        "dtype": reward.dtype,
        "libraries": library_versions(),
        "truncated_prompts": reward.count_truncated([entry.prompt for entry, _ in scored]),
        "unreadable": [entry.file for entry, value in pairs if value is None],
        "scores": [
            {"file": entry.file, "seed": entry.seed, "prompt": entry.prompt, "score": value} for entry, value in scored
        ],
    }


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that a score can depend on."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def format_summary(record: dict[str, Any]) -> str:
    """The lines that a scorer prints on stdout."""
    lines = [
        f"{record['metric']} ({record['version']}, {record['dtype']}) of {record['images_dir']}",
        f"  count  {record['count']}",
        f"  mean   {record['mean']:.6f}",
    ]
    if record["ci95"] is not None:
        lines.append(f"  95 %   {record['ci95'][0]:.6f} to {record['ci95'][1]:.6f}")
        lines.append(f"  std    {record['std']:.6f}")
    lines.append(f"  min    {record['min']:.6f}")
    lines.append(f"  max    {record['max']:.6f}")
    if record["truncated_prompts"]:
        lines.append(f"  {record['truncated_prompts']} prompts were longer than the text encoder reads")
    return "\n".join(lines)
