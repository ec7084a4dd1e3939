"""`manifest.jsonl`: which image of a folder belongs to which seed, prompt and plan, and what is still missing.

While ranks write, each has its own `manifest-rankN.jsonl`; at the end (or at the next start) they are joined.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from torch_utils.checkpoint import atomic_write_text, lock_folder, sha256_file
from torch_utils.errors import UserError
from torch_utils.untrusted import bounded_lines, no_link, parse_json
from training.images import load_image

MANIFEST = "manifest.jsonl"
GRID = "grid.png"  # small copies of the first images, none of them itself
IMAGES_PER_FOLDER = 1000


class ManifestError(UserError):
    """An image folder that cannot take this run's images."""


def image_name(seed: int) -> str:
    """Path below the image folder, with forward slashes: 1,000 images per sub-folder."""
    return f"{seed - seed % IMAGES_PER_FOLDER:06d}/{seed:06d}.png"


class Manifest:
    """The lines of one image folder. `record` is what every line of this run says beside file, seed, prompt, hash."""

    def __init__(self, folder: Path, record: Mapping[str, object]):
        self.folder = folder
        self.path = folder / MANIFEST
        # As it reads back, so that 0.1 or a tuple compares equal to what the file holds.
        self.record = json.loads(json.dumps(record))
        if folder.exists() and not folder.is_dir():
            raise ManifestError(f"--outdir {folder} is a file; name a folder")
        if not self._files() and next(folder.glob("**/*.png"), None) is not None:
            raise ManifestError(f"{folder} holds pictures but no {MANIFEST}; choose another --outdir")

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("manifest-rank*.jsonl"))

    def _files(self) -> list[Path]:
        return [self.path, *self._parts()] if self.path.is_file() else self._parts()

    def _lines(self, skip_damaged: bool = False) -> dict[int, dict]:
        """Seed -> line, the newest of each seed. In a rank's part a torn last line, as a crash leaves it, is passed
        over; in the manifest itself a damaged line is an error unless `skip_damaged`."""
        lines = {}
        for path in self._files():
            for number, text in enumerate(bounded_lines(path), start=1):
                try:
                    line = parse_json(text)
                    lines[int(line["seed"])] = line
                except (ValueError, KeyError, TypeError) as error:
                    if path == self.path and not skip_damaged:
                        raise ManifestError(
                            f"{path}, line {number} is damaged; use --overwrite or another --outdir"
                        ) from error
        return lines

    def open(self, locks: contextlib.ExitStack) -> None:
        """Make the folder and keep other runs out of it until `locks` closes. Raises `ManifestError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ManifestError(f"cannot make --outdir {self.folder}: {error.strerror}") from error
        if not lock_folder(self.folder, locks):
            raise ManifestError(f"another process writes to {self.folder}; choose another --outdir, or use torchrun")

    def begin(self, anew: Iterable[int]) -> None:
        """Take up what an interrupted run left, except the lines of the seeds `anew`, which will be made again."""
        dropped = set(anew)
        if self._files():
            lines = self._lines(skip_damaged=bool(dropped))
            self._store({seed: line for seed, line in lines.items() if seed not in dropped})

    def missing(self, prompt_of: Mapping[int, str]) -> list[int]:
        """The seeds of `prompt_of` (seed -> prompt) whose image is not here or fails its hash, in order.

        Raises `ManifestError` when one is here that was made with another prompt or another plan.
        """
        lines = self._lines()
        missing = []
        for seed, prompt in prompt_of.items():
            wanted = self.record | {"prompt": prompt}
            line = lines.get(seed)
            if line is None:
                missing.append(seed)
                continue
            for name, value in wanted.items():
                if name not in line:
                    raise ManifestError(
                        f"{self.folder} has an image of seed {seed} that does not say its {name}: an earlier version "
                        "made it; choose another --outdir, or --overwrite"
                    )
                if line[name] != value:
                    raise ManifestError(
                        f"{self.folder} has an image of seed {seed} made with {name} {line[name]!r}, not {value!r};"
                        " choose another --outdir, or --overwrite"
                    )
            file = self.folder / image_name(seed)
            if not file.is_file() or sha256_file(file) != line.get("sha256"):
                missing.append(seed)
        return missing

    @contextlib.contextmanager
    def writer(self, rank: int) -> Iterator[Callable[[int, str], None]]:
        """Gives `add(seed, prompt)`, to be called when the image's file is complete; each line is flushed."""
        part = self.folder / f"manifest-rank{rank}.jsonl"
        with open(part, "a", encoding="utf-8", opener=no_link) as stream:

            def add(seed: int, prompt: str) -> None:
                file = image_name(seed)
                line = {
                    "file": file,
                    "seed": seed,
                    "prompt": prompt,
                    **self.record,
                    "sha256": sha256_file(self.folder / file),
                }
                stream.write(json.dumps(line) + "\n")
                stream.flush()

            yield add

    def join(self, seeds: Iterable[int]) -> None:
        """Put the lines of all ranks into `manifest.jsonl`, by seed. Raises `ManifestError` if one of `seeds` lacks."""
        lines = self._lines()
        self._store(lines)
        lost = [seed for seed in seeds if seed not in lines]
        if lost:
            raise ManifestError(
                f"{self.folder} lacks {len(lost)} images that other processes have made, seed {lost[0]} first: is the "
                "folder on a disk that all nodes share?"
            )

    def _store(self, lines: Mapping[int, dict]) -> None:
        atomic_write_text(self.path, "".join(json.dumps(lines[seed]) + "\n" for seed in sorted(lines)))
        for part in self._parts():
            part.unlink()

    def load(self, seed: int) -> Tensor:
        """Picture of `seed`, `[3, H, W]` in [0, 1]."""
        return load_image(self.folder / image_name(seed))
