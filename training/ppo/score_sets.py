"""Several folders of images scored with several metrics, each model loaded once, and what can be said of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_utils.checkpoint import atomic_write_text
from torch_utils.errors import UserError
from torch_utils.untrusted import parse_json, read_bounded
from training.ppo.comparison import RECORD_FIELDS, ComparisonError, folder_labels
from training.ppo.reward_base import Reward
from training.ppo.scoring import (
    MAX_RECORD_BYTES,
    ImageSet,
    check_output,
    collect_images,
    library_versions,
    listing,
    make_record,
    score_images,
)


def collect_sets(
    folders: Sequence[Path], pattern: str, prompts_file: Path | None, allow_missing: bool
) -> list[ImageSet]:
    """The images of every folder, which must be of the same seeds and prompts.

    With `allow_missing` those that not all folders have are left out, and stderr says how many. Raises
    `ComparisonError` or `ScoringError` listing what is missing, or for a folder that is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ComparisonError(f"--images names a folder twice: {', '.join(map(str, folders))}")
    sets = [collect_images(folder, pattern, prompts_file, allow_missing) for folder in folders]
    images = [{(entry.seed, entry.prompt) for entry in found.entries} for found in sets]
    common, everything = set.intersection(*images), set.union(*images)
    if common == everything:
        return sets
    lacking = [
        f"{found.folder} lacks {len(everything - own)} images, of seeds "
        f"{listing(sorted(seed for seed, _ in everything - own))}"
        for found, own in zip(sets, images, strict=True)
        if own != everything
    ]
    message = f"the folders hold different images (by seed and prompt); {'; '.join(lacking)}"
    if not common:
        raise ComparisonError(f"{message}; no image is in all of them")
    if not allow_missing:
        raise ComparisonError(f"{message}; --allow-missing compares the {len(common)} that all have")
    print(f"{message}; compared are the {len(common)} that all have", file=sys.stderr)
    return [
        ImageSet(found.folder, [e for e in found.entries if (e.seed, e.prompt) in common], found.sampling)
        for found in sets
    ]


def score_sets(
    sets: Sequence[ImageSet],
    metrics: Mapping[str, Callable[[], Reward]],
    scores_folder: Path,
    batch_size: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The score record of every folder and metric; `metrics` are names and what loads each.

    A record is kept as `scores_folder/<label>-<metric>.json` as soon as it is complete, and one that is there already
    is taken instead of scoring again: of the same images, not younger than it, by the same model and libraries.
    Raises `ScoringError` before any model is loaded for a file in that place that holds something else.
    """
    labels = [label.strip("/").replace("/", "_") for label in folder_labels([str(found.folder) for found in sets])]
    paths = {name: [scores_folder / f"{label}-{name}.json" for label in labels] for name in metrics}
    for some in paths.values():
        for path, found in zip(some, sets, strict=True):
            check_output(path, None, found.folder)
    records = []
    for name, load in metrics.items():
        reward = load()
        for path, found in zip(paths[name], sets, strict=True):
            record = _earlier_record(path, found, reward)
            if record is None:
                values = score_images(reward, found.entries, batch_size, device)
                record = make_record(reward, found, values)
                text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
                atomic_write_text(path, text + "\n")
            else:
                print(f"{path}: scored before", file=sys.stderr)
            records.append(record)
    return records


def check_readable(records: Sequence[dict[str, Any]], allow_missing: bool) -> None:
    """Raise `UserError` that names the images which could not be read; with `allow_missing` it is a note on stderr."""
    for record in {record["images_dir"]: record for record in records}.values():
        if record["unreadable"]:
            message = f"{len(record['unreadable'])} images of {record['images_dir']} cannot be read: "
            message += listing(record["unreadable"])
            if not allow_missing:
                raise UserError(f"{message}; mend them, or compare the others with --allow-missing")
            print(message, file=sys.stderr)


def _earlier_record(path: Path, found: ImageSet, reward: Reward) -> dict[str, Any] | None:
    try:
        record = parse_json(read_bounded(path, MAX_RECORD_BYTES))
        scored = [(row["file"], row["seed"], row["prompt"]) for row in record["scores"]]
        measured = {key: record[key] for key in ("metric", "images_dir", *RECORD_FIELDS)}
        if record["unreadable"]:
            return None
        written = path.stat().st_mtime_ns
        younger = any(entry.path.stat().st_mtime_ns > written for entry in found.entries)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    now = {
        "metric": reward.name,
        "images_dir": found.folder.as_posix(),
        "version": reward.version,
        "weights_sha256": reward.weights_sha256,
        "preprocessing": reward.preprocessing,
        "dtype": reward.dtype,
        "libraries": library_versions(),
    }
    same = scored == [(entry.file, entry.seed, entry.prompt) for entry in found.entries]
    return record if same and measured == now and not younger else None
