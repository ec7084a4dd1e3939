"""32 varied images and as many prompts, always the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

LEVELS = np.ndarray  # uint8 [height, width, 3]


def noise(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """Independent pixels: what resizing filters disagree on most."""
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """A slope per channel, in random directions."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height, 2)
    slopes = rng.uniform(-1, 1, (3, 2))
    planes = np.stack([a * x + b * y for a, b in slopes], axis=-1)
    planes -= planes.min((0, 1))
    return (255 * planes / np.maximum(planes.max((0, 1)), 1e-9)).astype(np.uint8)


def smooth(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """Clouds: a few random pixels, enlarged, and a little noise, as of a photograph."""
    few = Image.fromarray(noise(rng, 6, 6)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(few) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def shapes(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """Discs and boxes with hard edges."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for index in range(12):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(0.05, 0.25) * max(width, height)
        box = (x - radius, y - radius, x + radius, y + radius)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if index % 2 else draw.rectangle)(box, fill=colour)
    return np.asarray(image)


def stripes(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """Lines one pixel wide, which alias under a filter that does not widen."""
    y, x = np.mgrid[0:height, 0:width]
    return np.where(((x + 2 * y) % 3 == 0)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=-1)


def black(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """All 0."""
    return np.zeros((height, width, 3), np.uint8)


def white(rng: np.random.Generator, width: int, height: int) -> LEVELS:
    """All 255."""
    return np.full((height, width, 3), 255, np.uint8)


IMAGES: tuple[tuple[Callable[[np.random.Generator, int, int], LEVELS], int, int, str], ...] = (
    (noise, 512, 512, "RGB"),
    (gradient, 512, 512, "RGB"),
    (shapes, 512, 512, "RGB"),
    (stripes, 512, 512, "RGB"),
    (smooth, 512, 512, "RGB"),
    (noise, 640, 360, "RGB"),
    (gradient, 1024, 256, "RGB"),
    (shapes, 300, 200, "RGB"),
    (noise, 360, 640, "RGB"),
    (smooth, 256, 1024, "RGB"),
    (shapes, 200, 301, "RGB"),
    (shapes, 32, 32, "RGB"),
    (noise, 7, 5, "RGB"),
    (noise, 1, 1, "RGB"),
    (noise, 2, 1, "RGB"),
    (noise, 224, 224, "RGB"),
    (smooth, 224, 100, "RGB"),
    (smooth, 100, 224, "RGB"),
    (smooth, 448, 336, "RGB"),
    (shapes, 333, 500, "RGB"),
    (shapes, 512, 512, "RGBA"),
    (smooth, 300, 200, "RGBA"),
    (smooth, 256, 256, "LA"),
    (gradient, 512, 512, "L"),
    (noise, 225, 223, "L"),
    (shapes, 512, 512, "P"),
    (smooth, 300, 300, "P"),
    (shapes, 256, 256, "1"),
    (black, 512, 512, "RGB"),
    (white, 512, 512, "RGB"),
    (noise, 480, 1, "RGB"),
    (smooth, 225, 224, "RGB"),
)

PROMPTS = (
    "a photo of a cat",
    "",
    "An astronaut riding a horse on Mars, photorealistic, 8k, trending on artstation",
    "   \n\t ",
    "A DRAWING OF A HOUSE IN THE STYLE OF VAN GOGH",
    "a red cube to the left of a blue sphere, " * 20,
    "naïve café façade, crème brûlée in São Paulo, Ærøskøbing",
    "一只戴着帽子的猫在看书",
    "🐱🚀🌈 a cat in space 👩‍👩‍👧‍👦🇳🇴",
    "it's what they'd've said: \"don't!\" (isn't it?)",
    "salt &amp; pepper &lt;shakers&gt; on a table, &eacute;t&eacute; &amp;amp; &#x1F600;",
    "!!! ??? ... ,,, ;;; --- *** ((( ))) [[[ ]]] {{{ }}} @#$%^&~`|\\/",
    "1234567890 3.14159 42nd street, 2 dogs and 17 cats, 10000000000000000",
    "dog " * 75,
    "dog " * 76,
    "dog " * 33,
    "dog " * 34,
    "supercalifragilisticexpialidocious" * 5,
    "the mayor’s “smart” quotes — and an ellipsis…",
    "donâ€™t mojibake the cafÃ©",
    "ＦＵＬＬ ｗｉｄｔｈ ｌｅｔｔｅｒｓ ﬁ ﬂ ① ²",
    "e\u0301 a\u030a n\u0303: combining, zero\u200bwidth, soft\u00adhyphen, no\u00a0break",
    "قطة تجلس على الكرسي",
    "кошка сидит на стуле, ΓΆΤΑ σε καρέκλα",
    "a cat <|endoftext|> a dog <|startoftext|> a bird",
    "a cat <end_of_text> a dog <start_of_text> a bird",
    "a cat [SEP] a dog [MASK] a bird [CLS] [PAD] [ENC] ##ing",
    "line one\nline two\r\nline three\ttabbed\x00\x07control",
    "𝔞 𝕔𝕒𝕥 in 𝓈𝒸𝓇𝒾𝓅𝓉, ½ a cup, 5 × 3 m²",
    "снег и дождь, " * 30,
    "a watercolour of two foxes under a birch, soft light, high detail",
    "counterclockwise anti-aliasing re-entrant T-shirt U.S.A. e.g. www.example.org",
)


def in_mode(levels: LEVELS, mode: str, rng: np.random.Generator) -> Image.Image:
    """The picture in Pillow's `mode`; where that has an alpha channel, with clear, half and opaque parts."""
    image = Image.fromarray(levels)
    if mode == "P":
        return image.quantize(32)
    if mode not in ("RGBA", "LA"):
        return image.convert(mode)
    alpha = Image.fromarray(shapes(rng, image.width, image.height)).convert("L")
    image = image.convert(mode)
    image.putalpha(alpha)
    return image


def write_images(folder: Path, seed: int = 0) -> None:
    """Write `folder`/images/*.png and `folder`/prompts.json: sorted, the n-th image goes with the n-th prompt."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index, (draw, width, height, mode) in enumerate(IMAGES):
        rng = np.random.default_rng((seed, index))
        path = folder / "images" / f"{index:02d}-{draw.__name__}-{width}x{height}-{mode.lower()}.png"
        in_mode(draw(rng, width, height), mode, rng).save(path)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS, indent=1) + "\n", encoding="utf-8")
