"""Sample images with a handcrafted solver: `python sample_baseline.py`, or under `torchrun` on several GPUs."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from torch_utils.errors import UserError, user_errors
from torch_utils.options import command
from training.sampling_options import GROUPS, read_prompts, sampling_options

# solver_utils owns these names, but needs torch; tests keep the two in step, and the options' help with them.
SAMPLERS = ("ddim", "dpm", "dpm2", "heun", "edm", "ipndm", "ipndm_v", "deis", "dpmpp", "unipc")
VARIANTS = ("bh1", "bh2")
# What a list of nodes decides itself.
SCHEDULE_OPTIONS = (
    *("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max"),
    *("flowmatch_shift", "flowmatch_mu"),
)


def explicit_nodes(sigmas: str, final_zero: bool | None) -> tuple[tuple[float, ...], bool]:
    """The nodes that `--sigmas` lists, without a last 0, and whether a 0 ends the run.

    Raises UserError for a list that is no schedule, and for what else was given on the command line against it.
    """
    from solver_utils import explicit_schedule

    context = click.get_current_context()
    for name in SCHEDULE_OPTIONS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UserError(f"--sigmas lists the nodes of the schedule; leave out --{name.replace('_', '-')}")
    nodes = []
    for number, entry in enumerate(sigmas.split(","), start=1):
        try:
            nodes.append(float(entry))
        except ValueError as error:
            fault = f"is {entry.strip()!r}, not a number" if entry.strip() else "is empty"
            raise UserError(f"--sigmas: entry {number} {fault}; give noise levels with commas between them") from error
    explicit_schedule(nodes)
    if nodes[-1] > 0:
        return tuple(nodes), bool(final_zero)
    if final_zero is False:
        raise UserError("--sigmas ends in 0; leave out that 0 or --no-final-zero")
    if len(nodes) < 3:
        raise UserError("--sigmas needs at least 2 nodes above 0")
    return tuple(nodes[:-1]), True


@command(
    {
        "Solver": (
            *("sampler", "dataset_name", "guidance_rate", "afs", "max_order", "lower_order_final", "variant"),
            *("inner_steps", "s_churn", "s_min", "s_max", "s_noise"),
        ),
        "Noise levels (sigma; 14.6 is noise only, 0 a clean picture)": (*SCHEDULE_OPTIONS, "sigmas", "final_zero"),
        **GROUPS,
    }
)
@click.option("--sampler", help="Solver", type=click.Choice(SAMPLERS), required=True)
@click.option(
    "--dataset-name",
    help="Model: ms_coco is Stable Diffusion v1.5, emoji the embedded one",
    metavar="NAME",
    default="ms_coco",
)
@click.option(
    "--num-steps",
    help="Nodes of the schedule, one more than intervals (a final 0 not counted)",
    metavar="INT",
    type=int,
    default=11,
)
@click.option(
    "--schedule-type",
    help="polynomial, logsnr, time_uniform, discrete, or flowmatch (of flow models)",
    metavar="NAME",
    default="time_uniform",
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
@click.option(
    "--flowmatch-shift", help="Of schedule flowmatch: its time shift", metavar="FLOAT", type=float, show_default="none"
)
@click.option(
    "--flowmatch-mu",
    help="Of schedule flowmatch: the log of its time shift, instead of --flowmatch-shift",
    metavar="FLOAT",
    type=float,
    show_default="none",
)
@click.option(
    "--sigmas",
    help='All nodes, e.g. "14.6,3,0.5,0.1", instead of --num-steps, --schedule-*, --sigma-*, --flowmatch-*. A last 0 '
    "is like --final-zero; without either the last node is the end, for edm too",
    metavar="LIST",
    show_default="none",
)
@click.option(
    "--final-zero/--no-final-zero",
    help="End at noise level 0, one evaluation after the last node; not of dpm, dpm2, heun",
    default=None,
    show_default="yes for edm, else no",
)
@click.option("--guidance-rate", help="Guidance scale; 1 is unguided", metavar="FLOAT", type=float, default=7.5)
@click.option(
    "--afs", help="Save the first evaluation by an analytical first step (no flow model has one)", is_flag=True
)
@click.option(
    "--max-order",
    help="Of ipndm, ipndm_v, deis (1-4), dpmpp, unipc (1-3)",
    metavar="INT",
    type=int,
    show_default="2",
)
@click.option(
    "--lower-order-final/--no-lower-order-final",
    help="Of dpmpp, unipc: lower orders in the last intervals",
    default=None,
    show_default="yes",
)
@click.option("--variant", help="Of unipc: its B(h)", type=click.Choice(VARIANTS), show_default="bh2")
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
    flowmatch_shift: float | None,
    flowmatch_mu: float | None,
    sigmas: str | None,
    final_zero: bool | None,
    guidance_rate: float,
    afs: bool,
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
    **solver_options: float | str | None,
) -> None:
    """Sample images with a handcrafted solver; edm ends at noise level 0, the others at --sigma-min by default.

    Writes <outdir>/000000/000123.png and <outdir>/manifest.jsonl; run again to continue. Example
    (installed: epd-sample-baseline):

    \b
    python sample_baseline.py --sampler ddim --dataset-name ms_coco --prompt-file src/prompts/test.txt \\
        --seeds 0-999 --batch 16 --num-steps 37 --schedule-type time_uniform --schedule-rho 1.0 \\
        --outdir samples/test_ddim_nfe36
    """
    numbers, prompts = read_prompts(prompt_file, prompt, seeds)
    from solver_utils import default_rho
    from training.generate import EXPLICIT, SamplingPlan, write_images

    nodes, to_zero = None, sampler == "edm" if final_zero is None else final_zero
    if sigmas is not None:
        nodes, to_zero = explicit_nodes(sigmas, final_zero)
        num_steps, schedule_type = len(nodes), EXPLICIT
    elif schedule_rho is None:
        schedule_rho = default_rho(schedule_type)
    elif schedule_type == "logsnr" and schedule_rho != 1:
        raise UserError(f"--schedule-rho {schedule_rho:g}: schedule logsnr has no exponent; leave it out")
    plan = SamplingPlan(
        solver=sampler,
        num_steps=num_steps,
        schedule_type=schedule_type,
        schedule_rho=schedule_rho,
        options={name: value for name, value in solver_options.items() if value is not None},
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        flowmatch_shift=flowmatch_shift,
        flowmatch_mu=flowmatch_mu,
        sigmas_list=nodes,
        to_zero=to_zero,
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
        compile_mode=compile_mode,
        parallel=parallel,
        device=device,
        overwrite=overwrite,
        grid=grid,
    )


if __name__ == "__main__":
    main()
