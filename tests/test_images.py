"""One quantisation rule: the pixels that are scored, saved and read back are the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from training.images import ImageError, image_grid, load_image, quantize, save_png, to_uint8


def edge_values() -> torch.Tensor:
    """Floats around every rounding boundary of the 8-bit grid, the ends and far outside, as [3, 16, n]."""
    boundaries = (torch.arange(256, dtype=torch.float64) + 0.5) / 255 * 2 - 1
    boundaries = boundaries.to(torch.float32)
    up = torch.nextafter(boundaries, torch.tensor(math.inf))
    down = torch.nextafter(boundaries, torch.tensor(-math.inf))
    grid = (torch.arange(256) / 255 * 2 - 1).to(torch.float32)
    extreme = torch.tensor([-1.0, 1.0, 0.0, -0.0, 1e30, -1e30, 1e-45, -1 - 1e-7, 1 + 1e-7, 3.4e38, 2.0, -2.0])
    values = torch.cat([boundaries, up, down, grid, extreme])
    values = torch.cat([values, values.new_zeros(-len(values) % 48)])
    return values.view(3, 16, -1)


def test_quantize_of_known_values():
    values = torch.tensor([-1.0, 1.0, 0.0, -5.0, 5.0, 1 / 255, -1 + 0.99 / 255, -1 + 1.01 / 255, 0.5])
    # 0 is the exact half 127.5 and goes up; 0.5 is 191.25.
    levels = [0, 255, 128, 0, 255, 128, 0, 1, 191]
    assert (quantize(values) * 255).round().to(torch.int64).tolist() == levels


def test_quantize_takes_the_nearest_level_and_is_idempotent():
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    q = quantize(x)
    assert q.dtype == torch.float32
    assert q.shape == x.shape
    assert q.min() == 0
    assert q.max() == 1
    exact = ((x.double() + 1) / 2).clamp(0, 1)
    assert (q.double() - exact).abs().max() <= 0.5 / 255 + 1e-7
    assert torch.equal(quantize(q * 2 - 1), q)
    grid = torch.arange(256, dtype=torch.float32) / 255
    assert torch.isin(q, grid).all()


def test_exact_halves_go_up_never_to_the_even_level():
    middles = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
    halves = np.flatnonzero(middles * np.float32(255) % 1 == 0.5)
    assert (halves % 2 == 0).sum() > 50  # where rounding to even would go down
    images = torch.from_numpy(middles[halves]).expand(1, 3, 1, -1)
    assert to_uint8(images)[0, 0, :, 0].tolist() == (halves + 1).tolist()


def test_all_256_levels_are_fixed_points():
    for k in range(256):
        level = torch.tensor(k, dtype=torch.float32) / 255
        assert quantize(level * 2 - 1) == level
        assert to_uint8(level.expand(1, 3, 1, 1)).tolist() == [[[[k, k, k]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantize_of_other_precisions_equals_that_of_their_float32_value(dtype):
    x = torch.linspace(-1.1, 1.1, 999).to(dtype)
    assert torch.equal(quantize(x), quantize(x.to(torch.float32)))


def test_the_png_holds_exactly_the_quantized_pixels(tmp_path):
    random = torch.randn(3, 33, 17, generator=torch.Generator().manual_seed(1))
    for i, x in enumerate([random, edge_values(), torch.zeros(3, 1, 1)]):
        q = quantize(x)
        save_png(q, tmp_path / f"{i}.png")
        assert torch.equal(load_image(tmp_path / f"{i}.png"), q)
        stored = np.asarray(Image.open(tmp_path / f"{i}.png"))
        assert np.array_equal(stored, to_uint8(q[None])[0].numpy())
        assert stored.dtype == np.uint8
        assert Image.open(tmp_path / f"{i}.png").mode == "RGB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


def test_to_uint8_puts_channels_last():
    images = torch.zeros(2, 3, 4, 5)
    images[1, 2, 3, 4] = 1.0
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.dtype == torch.uint8
    assert pixels[1, 3, 4].tolist() == [0, 0, 255]
    assert pixels.sum() == 255


def test_to_uint8_does_not_change_its_input():
    images = torch.full((1, 3, 2, 2), 0.3)
    to_uint8(images)
    quantize(images)
    assert torch.equal(images, torch.full((1, 3, 2, 2), 0.3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_pixels_are_refused(tmp_path, value):
    images = torch.zeros(1, 3, 4, 4)
    images[0, 1, 2, 3] = value
    with pytest.raises(ImageError, match="NaN or infinite"):
        quantize(images)
    with pytest.raises(ImageError, match="outside"):
        to_uint8(images)
    with pytest.raises(ImageError, match="outside"):
        save_png(images[0], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_wrong_ranges_types_and_shapes_are_refused(tmp_path):
    with pytest.raises(ImageError, match="outside"):
        to_uint8(torch.full((1, 3, 2, 2), -0.01))
    with pytest.raises(ImageError, match="uint8"):
        quantize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    for shape in [(3, 2, 2), (1, 4, 2, 2), (1, 2, 2, 3)]:
        with pytest.raises(ImageError, match="expected float images"):
            to_uint8(torch.zeros(shape))
    with pytest.raises(ImageError, match=r"\.png"):
        save_png(torch.zeros(3, 2, 2), tmp_path / "a.jpg")


def test_other_modes_become_rgb(tmp_path):
    def loaded(image: Image.Image) -> list[int]:
        image.save(tmp_path / "a.png")
        values = (load_image(tmp_path / "a.png") * 255).round().int()
        assert values.shape == (3, 2, 1)
        return values[:, 1, 0].tolist()

    assert loaded(Image.new("L", (1, 2), 77)) == [77, 77, 77]
    assert loaded(Image.new("LA", (1, 2), (77, 3))) == [77, 77, 77]
    assert loaded(Image.new("RGBA", (1, 2), (10, 20, 30, 0))) == [10, 20, 30]  # alpha is dropped, not blended
    assert loaded(Image.new("1", (1, 2), 1)) == [255, 255, 255]
    palette = Image.new("P", (1, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert loaded(palette) == [9, 8, 7]


def test_jpeg_and_height_before_width(tmp_path):
    Image.new("RGB", (8, 16), (200, 100, 50)).save(tmp_path / "a.jpg", quality=95)
    image = load_image(tmp_path / "a.jpg")
    assert image.shape == (3, 16, 8)
    assert image.is_contiguous()
    torch.testing.assert_close(image[:, 5, 5] * 255, torch.tensor([200.0, 100.0, 50.0]), rtol=0, atol=4)


def noisy_png(path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_broken_files_are_named(tmp_path):
    good = noisy_png(tmp_path / "good.png")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    broken = {
        "truncated": good[: len(good) // 2],
        "header_only": good[:33],
        "empty": b"",
        "text": b"not an image",
        "flipped": bytes(flipped),
    }
    for name, data in broken.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}\\.png") as caught:
            load_image(path)
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=path.name):
            load_image(path)


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match=r"deep\.png has more than 8 bits"):
        load_image(tmp_path / "deep.png")


@pytest.mark.parametrize("side", [12, 15, 30])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, side):
    """144 pixels are just too many, 225 make Pillow warn, 900 make it raise."""
    Image.new("L", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 143)
    with pytest.raises(ImageError, match=r"bomb\.png"):
        load_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", side * side)
    assert load_image(tmp_path / "bomb.png").shape == (3, side, side)


def test_grid_places_each_image_once():
    images = torch.arange(1, 6, dtype=torch.float32).view(5, 1, 1, 1).expand(5, 3, 2, 4) / 10
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 4, 12)
    for i in range(6):
        row, column = divmod(i, 3)
        tile = grid[:, row * 2 : row * 2 + 2, column * 4 : column * 4 + 4]
        assert torch.equal(tile, images[i] if i < 5 else torch.zeros(3, 2, 4))
    inner = torch.rand(1, 3, 2, 4)
    assert torch.equal(image_grid(inner, 1), inner[0])


@pytest.mark.parametrize(("shape", "columns"), [((2, 3, 4, 4), 0), ((0, 3, 4, 4), 2), ((3, 4, 4), 2)])
def test_bad_grids(shape, columns):
    with pytest.raises(ImageError, match="grid"):
        image_grid(torch.zeros(shape), columns)
