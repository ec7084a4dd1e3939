"""Sample images with a solver table: `python sample.py`, or `torchrun ... sample.py` on several GPUs."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import user_errors
from torch_utils.options import command
from training.sampling_options import GROUPS, read_prompts, sampling_options


@command({"Solver": ("predictor_path",), **GROUPS})
@click.option(
    "--predictor_path",
    "--predictor-path",
    "predictor_path",
    help="Table: .pkl, .safetensors or .json",
    metavar="FILE",
    type=click.Path(path_type=Path),
    required=True,
)
@click.option(
    "--max-rows",
    help="Rows of one guidance branch in a network call at most; a larger one is split, for the same images",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="no limit",
)
@sampling_options
@user_errors
def main(
    predictor_path: Path,
    max_rows: int | None,
    prompt_file: Path | None,
    prompt: str | None,
    seeds: str,
    batch: int,
    outdir: Path | None,
    model_path: str | None,
    precision: str,
    compile_mode: str,
    parallel: str,
    device: str,
    grid: bool,
    overwrite: bool,
) -> None:
    """Sample images with an EPD table, on the model and at the guidance it was made for.

    Writes <outdir>/000000/000123.png and <outdir>/manifest.jsonl; run again to continue. Example
    (installed: epd-sample):

    \b
    python sample.py --predictor_path exps/<run>/export/network-snapshot-export-step008000.pkl \\
        --prompt-file src/prompts/test.txt --seeds 0-999 --batch 16 --outdir samples/learned
    """
    numbers, prompts = read_prompts(prompt_file, prompt, seeds)
    from training.generate import SamplingPlan, write_images
    from training.table import load_table

    plan = SamplingPlan.of_table(load_table(predictor_path), model_path, precision)
    write_images(
        plan,
        numbers,
        prompts,
        outdir or plan.default_outdir(),
        batch=batch,
        max_rows=max_rows,
        compile_mode=compile_mode,
        parallel=parallel,
        device=device,
        overwrite=overwrite,
        grid=grid,
    )


if __name__ == "__main__":
    main()
