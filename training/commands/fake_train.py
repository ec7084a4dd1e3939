"""Write a cold-start solver table: `network-snapshot-NNNNNN.pkl` and the same values in `training_options.json`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from torch_utils.errors import UserError, user_errors
from torch_utils.options import command
from training.ppo.cold_start import SPREAD, cold_start_table, start_positions
from training.table_metadata import TABLE_ORDERS, TableMetadata

# solver_utils owns these names and the default of --schedule-rho, but needs torch; a test keeps the two in step.
SCHEDULE_TYPES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")


def resolve_rho(schedule_type: str, schedule_rho: float | None) -> float:
    """The exponent of the schedule, with the default of its type when none was given."""
    if schedule_rho is not None:
        return schedule_rho
    return 7.0 if schedule_type == "polynomial" else 1.0


def write_start_table(
    snapshot: Path, options: Path, num_steps: int, num_points: int, start: dict, metadata: TableMetadata
) -> None:
    """Write the start table as `snapshot` (.pkl), and as `options` (JSON) the values that the snapshot reads back as.

    start: `r_base` and `r_epsilon` of `cold_start_table`. Raises `UserError`.
    """
    # Torch takes seconds to import, and --help and --dry-run do without it.
    from torch_utils.checkpoint import atomic_write_text
    from training.table import load_table, save_table

    table = cold_start_table(num_steps, num_points, **start)
    save_table(replace(table, **metadata.metadata()), snapshot)
    table = load_table(snapshot)
    values = {"snapshot": snapshot.name, "table_sha256": table.sha256(), **start, **table.to_dict()}
    try:
        atomic_write_text(options, json.dumps(values, indent=2, allow_nan=False) + "\n")
    except OSError as err:
        raise UserError(f"{options} cannot be written: {err.strerror}") from err


@command(
    {
        "Table": ("num_steps", "num_points", "r_base", "r_epsilon", "scale_dir", "scale_time"),
        "What it is made for": (
            *("dataset_name", "guidance_type", "guidance_rate", "schedule_type", "schedule_rho"),
            *("sigma_min", "sigma_max", "afs", "sampler_stu", "max_order", "lower_order_final"),
        ),
        "Output": ("outdir", "snapshot_step", "overwrite", "dry_run"),
    }
)
@click.option(
    "--num-steps",
    help="Nodes of the schedule; the table has one row fewer",
    metavar="INT",
    type=click.IntRange(2, 1000),
    required=True,
)
@click.option(
    "--num-points",
    help="Network evaluations in parallel in each interval",
    metavar="INT",
    type=click.IntRange(1, 100),
    required=True,
)
@click.option(
    "--outdir",
    help="Where to write",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default="exps/fake-run",
)
@click.option(
    "--snapshot-step", help="Number in the snapshot's name", metavar="INT", type=click.IntRange(0, 999999), default=0
)
@click.option("--r-base", help="Centre of the positions inside (0, 1)", metavar="FLOAT", type=float, default=0.5)
@click.option(
    "--r-epsilon",
    help="Distance between neighbouring positions",
    metavar="FLOAT",
    type=float,
    show_default="0.66 / num_points",
)
@click.option(
    "--scale-dir",
    help="Range s of the direction scales, 1 +- s; they start at 1",
    metavar="FLOAT",
    type=float,
    default=0.0,
)
@click.option(
    "--scale-time", help="Range s of the time scales, 1 +- s; they start at 1", metavar="FLOAT", type=float, default=0.0
)
@click.option(
    "--dataset-name",
    help="Backbone: ms_coco is Stable Diffusion 1.5, emoji the embedded model",
    metavar="STR",
    default="ms_coco",
)
@click.option("--guidance-type", help="Kind of guidance", metavar="STR", default="cfg")
@click.option("--guidance-rate", help="Guidance scale; 1 is unguided", metavar="FLOAT", type=float, default=7.5)
@click.option("--schedule-type", help="Noise schedule", type=click.Choice(SCHEDULE_TYPES), default="discrete")
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
    "--afs",
    help="Save the first evaluation by an analytical first step",
    metavar="BOOL",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
)
@click.option(
    "--sampler-stu",
    help="Solver that reads the table: epd, or EPD slopes in a step of ipndm or dpmpp (these are not for PPO)",
    type=click.Choice(list(TABLE_ORDERS)),
    default=TableMetadata.sampler_stu,
)
@click.option(
    "--max-order",
    help="Order of the solver, with --sampler-stu "
    + " or ".join(f"{name} (1-{highest})" for name, highest in TABLE_ORDERS.items() if highest is not None),
    metavar="INT",
    type=int,
    show_default=str(TableMetadata.max_order),
)
@click.option(
    "--lower-order-final/--no-lower-order-final",
    help="With --sampler-stu dpmpp: lower orders in the last intervals",
    default=None,
    show_default="yes",
)
@click.option("--overwrite", help="Replace files that exist", is_flag=True)
@click.option("-n", "--dry-run", help="Check and print the options, write nothing", is_flag=True)
@user_errors
def main(
    num_steps: int,
    num_points: int,
    outdir: Path,
    snapshot_step: int,
    r_base: float,
    r_epsilon: float | None,
    scale_dir: float,
    scale_time: float,
    dataset_name: str,
    guidance_type: str,
    guidance_rate: float,
    schedule_type: str,
    schedule_rho: float | None,
    sigma_min: float | None,
    sigma_max: float | None,
    afs: bool,
    sampler_stu: str,
    max_order: int | None,
    lower_order_final: bool | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Write a start table: equally spaced positions, equal weights, scales 1. PPO takes those of --sampler-stu epd.

    Prints the resolved options as JSON. Example (installed: epd-start-table):

    \b
    python fake_train.py --num-steps 11 --num-points 2 \\
        --outdir exps/99999-ms_coco-11-20-epd-dpm-1-discrete --snapshot-step 99999
    """
    if max_order is not None and TABLE_ORDERS[sampler_stu] is None:
        takers = " or ".join(name for name, highest in TABLE_ORDERS.items() if highest is not None)
        raise UserError(f"{sampler_stu} takes no --max-order; it belongs to --sampler-stu {takers}")
    if lower_order_final is not None and sampler_stu != "dpmpp":
        raise UserError(f"{sampler_stu} takes no --lower-order-final; it belongs to --sampler-stu dpmpp")
    metadata = TableMetadata(
        num_steps=num_steps,
        num_points=num_points,
        dataset_name=dataset_name,
        guidance_type=guidance_type,
        guidance_rate=guidance_rate,
        schedule_type=schedule_type,
        schedule_rho=resolve_rho(schedule_type, schedule_rho),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        afs=afs,
        scale_dir_range=scale_dir,
        scale_time_range=scale_time,
        sampler_stu=sampler_stu,
        max_order=TableMetadata.max_order if max_order is None else max_order,
        lower_order_final=lower_order_final is not False,
    )
    start = {"r_base": r_base, "r_epsilon": SPREAD / num_points if r_epsilon is None else r_epsilon}
    start_positions(num_points, **start)
    files = (outdir / f"network-snapshot-{snapshot_step:06d}.pkl", outdir / "training_options.json")
    for path in files:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another --outdir, or pass --overwrite")
    options = {"outdir": str(outdir), "snapshot_step": snapshot_step, **start, **metadata.metadata()}
    click.echo(json.dumps(options, indent=2, allow_nan=False))
    if not dry_run:
        write_start_table(*files, num_steps, num_points, start, metadata)
        click.echo(f"Wrote {files[0]} and {files[1]}", err=True)


if __name__ == "__main__":
    main()
