"""Measure every solver: error against the truth, time around the network calls, waits for a GPU.

Writes solvers.json (every number), solvers.md (tables) and solvers.png (plot) to --outdir. Parts are measured one by
one: what solvers.json already holds of a part is kept and only the rest measured, so an interrupted run goes on with
the same command; a part from another machine, other settings or other code is left alone unless --overwrite says so.

\b
closed-form  a mixture of Gaussians, truth known exactly; CPU, under a minute
embedded     the embedded model against DDIM with --reference-steps intervals
overhead     share of a sampler call spent outside the network (limit on the CPU: 3 %)
sync         proof that no solver's loop waits for the GPU; needs CUDA
none         nothing: only write the tables and the plot again
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.results import Benchmark, Results, choose, code_hash, open_results
from torch_utils.errors import UserError, user_errors

if TYPE_CHECKING:
    from benchmarks.variants import Variant

BENCHMARK = Benchmark(
    name="solvers",
    module="benchmarks.solvers",
    code=(
        *("solvers.py", "solver_utils.py", "training/ppo/cold_start.py", "training/denoisers/stable_diffusion.py"),
        *("benchmarks/closed_form.py", "benchmarks/variants.py"),
    ),
)
PARTS = ("closed-form", "embedded", "overhead", "sync")
NFES = "4,6,8,10,12,16,20,26,36,50"


def parse_numbers(option: str, text: str) -> list[int]:
    """Rising positive numbers without repetition. Raises UserError."""
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise UserError(f"{option}: cannot read '{text}'; write it like 4,10,20") from None
    if numbers[0] < 1:
        raise UserError(f"{option}: {numbers[0]} is not positive")
    return numbers


def parse_device(name: str) -> str:
    """cpu or cuda. Raises UserError where cuda is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@click.command(help=__doc__, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--parts", metavar="LIST", default="all", help="What to measure: all, none, or some of the above")
@click.option("--nfe", "nfes", metavar="LIST", default=NFES, help="Sequential network calls to spend")
@click.option("--solvers", metavar="LIST", default="", help="Only these solvers", show_default="all")
@click.option("--images", metavar="INT", type=click.IntRange(1, 1000), default=16, help="embedded: images")
@click.option(
    "--reference-steps", metavar="INT", type=click.IntRange(2), default=1000, help="embedded: intervals of the truth"
)
@click.option("--batches", metavar="LIST", default="1,8", help="overhead: images at a time")
@click.option("--nodes", metavar="INT", type=click.IntRange(2), default=16, help="overhead: nodes of the schedule")
@click.option("--repeats", metavar="INT", type=click.IntRange(1), default=3, help="overhead: runs of each median")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="of embedded and overhead")
@click.option("--outdir", metavar="DIR", type=click.Path(path_type=Path), default=Path("results/solvers"))
@click.option("--overwrite", is_flag=True, help="Measure the chosen parts anew")
@click.option("--check", is_flag=True, help="Exit code 1 unless the limits hold")
@user_errors
def main(
    parts: str,
    nfes: str,
    solvers: str,
    images: int,
    reference_steps: int,
    batches: str,
    nodes: int,
    repeats: int,
    device: str,
    outdir: Path,
    overwrite: bool,
    check: bool,
) -> None:
    names = choose("--parts", parts, PARTS)
    numbers, sizes = parse_numbers("--nfe", nfes), parse_numbers("--batches", batches)
    from benchmarks.variants import select_variants

    variants = select_variants([name.strip() for name in solvers.split(",") if name.strip()])
    device = parse_device(device)
    with contextlib.ExitStack() as locks:
        results = open_results(outdir, BENCHMARK, locks)
        try:
            if "closed-form" in names or "embedded" in names:
                measure_errors(names, results, overwrite, variants, numbers, device, images, reference_steps)
            if "overhead" in names or "sync" in names:
                measure_speed(names, results, overwrite, variants, device, sizes, nodes, repeats)
        finally:
            results.save()
        report(results, outdir, check)


def measure_errors(
    names: Sequence[str],
    results: Results,
    overwrite: bool,
    variants: Sequence[Variant],
    nfes: Sequence[int],
    device: str,
    images: int,
    reference_steps: int,
) -> None:
    from benchmarks import solver_errors as errors

    if "closed-form" in names:
        part = results.part("closed_form", "cpu", errors.closed_form_settings(), overwrite)
        errors.measure_closed_form(part, variants, nfes)
    if "embedded" in names:
        part = results.part("embedded", device, errors.embedded_settings(images, reference_steps), overwrite)
        work = results.path.parent / "work"
        errors.measure_embedded(part, variants, nfes, device, images, reference_steps, work)


def measure_speed(
    names: Sequence[str],
    results: Results,
    overwrite: bool,
    variants: Sequence[Variant],
    device: str,
    batches: Sequence[int],
    nodes: int,
    repeats: int,
) -> None:
    from benchmarks import solver_speed as speed
    from benchmarks import solver_sync as sync

    if "overhead" in names:
        part = results.part(f"overhead_{device}", device, speed.overhead_settings(batches, nodes, repeats), overwrite)
        speed.measure_overhead(part, variants, device, batches, nodes, repeats)
    if "sync" in names and device == "cuda":
        sync.measure_sync(results.part("sync", device, sync.sync_settings(), overwrite), variants)
    elif "sync" in names:
        click.echo("sync skipped: it needs CUDA")


def report(results: Results, outdir: Path, check: bool) -> None:
    """Write the tables and the plot, print the verdicts; exit code 1 if `check` and one is broken."""
    from benchmarks.plots import save_plot
    from benchmarks.solver_report import to_markdown, verdicts
    from torch_utils.checkpoint import atomic_write_text

    atomic_write_text(outdir / "solvers.md", to_markdown(results.parts))
    save_plot(results.parts, outdir / "solvers.png")
    click.echo(f"{results.path}, solvers.md, solvers.png: {', '.join(sorted(results.parts)) or 'nothing measured'}")
    code = code_hash(BENCHMARK.code)
    for name, part in results.parts.items():
        if part["solver_code"] != code:
            click.echo(f"{name} was measured with other code and is not judged; --overwrite measures it anew")
    found = verdicts({name: part for name, part in results.parts.items() if part["solver_code"] == code})
    for _, sentence in found:
        click.echo(sentence)
    if check and not found:
        raise UserError("--check: neither overhead on the CPU nor sync is measured yet; add --parts overhead")
    if check and not all(holds for holds, _ in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
