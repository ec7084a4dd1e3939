"""Sample images with a handcrafted solver: `python sample_baseline.py`, or under `torchrun` on several GPUs."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import user_errors
from training.sampling_options import read_prompts, sampling_options

SAMPLERS = ("ddim", "dpm", "dpm2", "heun", "edm", "ipndm")


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--sampler", help="Solver", type=click.Choice(SAMPLERS), required=True)
@click.option(
    "--dataset-name",
    help="Model: ms_coco is Stable Diffusion v1.5, emoji the embedded one",
    metavar="NAME",
    default="ms_coco",
)
@click.option("--num-steps", help="Nodes of the schedule, one more than intervals", metavar="INT", type=int, default=11)
@click.option(
    "--schedule-type", help="polynomial, logsnr, time_uniform or discrete", metavar="NAME", default="time_uniform"
)
@click.option(
    "--schedule-rho",
    help="Exponent of the schedule",
    metavar="FLOAT",
    type=float,
    show_default="7 for polynomial, else 1",
)
@click.option("--sigma-min", help="Last noise level", metavar="FLOAT", type=float, show_default="the model's")
@click.option("--sigma-max", help="First noise level", metavar="FLOAT", type=float, show_default="the model's")
@click.option("--guidance-rate", help="Guidance scale; 1 is unguided", metavar="FLOAT", type=float, default=7.5)
@click.option("--afs", help="Save the first evaluation by an analytical first step", is_flag=True)
@click.option("--max-order", help="Of ipndm, 1-4", metavar="INT", type=int, show_default="4")
@click.option(
    "--inner-steps", help="Of dpm: DPM-Solver-2 steps per interval", metavar="INT", type=int, show_default="1"
)
@click.option(
    "--s-churn", help="Of edm: amount of noise added on the way", metavar="FLOAT", type=float, show_default="0"
)
@click.option("--s-min", help="Of edm: lowest noise level with churn", metavar="FLOAT", type=float, show_default="0")
@click.option("--s-max", help="Of edm: highest noise level with churn", metavar="FLOAT", type=float, show_default="inf")
@click.option("--s-noise", help="Of edm: scale of the added noise", metavar="FLOAT", type=float, show_default="1")
@sampling_options
@user_errors
def main(
    sampler: str,
    dataset_name: str,
    num_steps: int,
    schedule_type: str,
    schedule_rho: float | None,
    sigma_min: float | None,
    sigma_max: float | None,
    guidance_rate: float,
    afs: bool,
    prompt_file: Path | None,
    prompt: str | None,
    seeds: str,
    batch: int,
    outdir: Path | None,
    model_path: str | None,
    precision: str,
    device: str,
    grid: bool,
    overwrite: bool,
    **solver_options: float | None,
) -> None:
    """Sample images with a handcrafted solver; edm ends at noise level 0, the others at --sigma-min.

    Writes <outdir>/000000/000123.png and <outdir>/manifest.jsonl; run again to continue. Example:

    \b
    python sample_baseline.py --sampler ddim --dataset-name ms_coco --prompt-file src/prompts/test.txt \\
        --seeds 0-999 --batch 16 --num-steps 37 --schedule-type time_uniform --schedule-rho 1.0 \\
        --outdir samples/test_ddim_nfe36
    """
    numbers, prompts = read_prompts(prompt_file, prompt, seeds)
    from solver_utils import default_rho
    from training.generate import SamplingPlan, write_images

    plan = SamplingPlan(
        solver=sampler,
        num_steps=num_steps,
        schedule_type=schedule_type,
        schedule_rho=default_rho(schedule_type) if schedule_rho is None else schedule_rho,
        options={name: value for name, value in solver_options.items() if value is not None},
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        to_zero=sampler == "edm",
        afs=afs,
        dataset_name=dataset_name,
        guidance_rate=guidance_rate,
        model_path=model_path,
        precision=precision,
    )
    write_images(
        plan,
        numbers,
        prompts,
        outdir or plan.default_outdir(),
        batch=batch,
        device=device,
        overwrite=overwrite,
        grid=grid,
    )


if __name__ == "__main__":
    main()
