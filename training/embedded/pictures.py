"""The pictures of the README, from the folders that `sample.sh` wrote.

python -m training.embedded.pictures samples/embedded/<run> --outdir docs
"""

from __future__ import annotations

import io
from pathlib import Path

import click
import torch
from PIL import Image

from training.images import image_grid, load_image, save_png
from training.manifest import image_name

COLUMNS = 10
ROWS = {
    "start": "start table\n10 calls",
    "dpm2-10": "DPM-Solver-2\n10 calls",
    "ddim-10": "DDIM\n10 calls",
    "learned": "learned table\n10 calls",
    "ddim-50": "DDIM\n50 calls",
}


def grid(folder: Path, count: int) -> torch.Tensor:
    """The first `count` images of a folder side by side, `[3, H, W]`."""
    return image_grid(torch.stack([load_image(folder / image_name(seed)) for seed in range(count)]), COLUMNS)


@click.command(help=__doc__)
@click.argument("samples", type=click.Path(exists=True, path_type=Path))
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
def main(samples: Path, outdir: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    outdir.mkdir(parents=True, exist_ok=True)
    save_png(grid(samples / "ddim-50", 4 * COLUMNS), outdir / "samples.png")
    figure, axes = pyplot.subplots(len(ROWS), 1, figsize=(9.2, 4.1), dpi=100)
    for axis, (name, label) in zip(axes, ROWS.items(), strict=True):
        axis.imshow(grid(samples / name, COLUMNS).permute(1, 2, 0))
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.subplots_adjust(0.12, 0.01, 0.995, 0.99, hspace=0.04)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    # 256 colours are enough for drawings and halve the file.
    Image.open(drawn).convert("RGB").quantize(256).save(outdir / "comparison.png", optimize=True)


if __name__ == "__main__":
    main()
