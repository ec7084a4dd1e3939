"""Measure Stable Diffusion v1.5 at 512 x 512, guidance 7.5, with random weights of the real shapes.

Writes sd15.json (every number) and sd15.md (the table, beside what is to be reached) to --outdir, and prints the table.
Parts are measured one by one and kept; --overwrite measures the chosen ones anew.

\b
batch1     one image: 10 intervals with K = 2 and K = 1
batch16    sixteen images
memory     peaks for 1, 16 and 64 images, and for 16 with --max-rows
step       a PPO step of 8 images with HPSv2.1, decoding
gradients  the pathwise gradient of 8 images by micro-batch
ranks      a PPO step of 16 images, 8 at a time, and one image with --parallel points, on the GPUs of torchrun
none       nothing: only write the table again

For several GPUs measure ranks with one process, then torchrun --nproc_per_node=2 -m benchmarks.sd15 --parts ranks.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import click

from benchmarks.results import Benchmark, Results, choose, figures_table, make_folder, open_results, reached
from torch_utils.errors import UserError, user_errors

BENCHMARK = Benchmark(
    name="sd15",
    module="benchmarks.sd15",
    code=(
        *("solvers.py", "training/generate.py", "training/ppo/rl_runner.py"),
        *("training/denoisers/stable_diffusion.py", "training/denoisers/unet.py", "training/denoisers/replay.py"),
        *("benchmarks/sd15_models.py", "benchmarks/sd15_measures.py"),
    ),
)
PARTS = ("batch1", "batch16", "memory", "step", "gradients", "ranks")
RANKS = "ranks{}"


@click.command(help=__doc__, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--parts", metavar="LIST", default="all", help="What to measure: all, none, or some of the above")
@click.option("--repeats", metavar="INT", type=click.IntRange(1), default=10, help="Runs of each median")
@click.option("--precision", type=click.Choice(["float32", "float16", "bfloat16"]), default="float16")
@click.option("--compile", "compile_mode", type=click.Choice(["off", "default", "max"]), default="default")
@click.option("--tiny", is_flag=True, help="Tiny networks instead of the real ones, to try the benchmark itself")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--models",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the random weights, 6 GB",
    default=Path("results/sd15/models"),
)
@click.option("--outdir", metavar="DIR", type=click.Path(path_type=Path), default=Path("results/sd15"))
@click.option("--overwrite", is_flag=True, help="Measure the chosen parts anew")
@click.option("--check", is_flag=True, help="Exit code 1 unless everything is reached")
@user_errors
def main(
    parts: str,
    repeats: int,
    precision: str,
    compile_mode: str,
    tiny: bool,
    device: str,
    models: Path,
    outdir: Path,
    overwrite: bool,
    check: bool,
) -> None:
    names = choose("--parts", parts, PARTS)
    from benchmarks.solvers import parse_device
    from torch_utils import distributed
    from torch_utils.checkpoint import atomic_write_text

    device = parse_device(device)
    with distributed.joined(device), contextlib.ExitStack() as locks:
        if distributed.world_size() > 1 and names != ["ranks"]:
            raise UserError(f"--parts {parts}: of these, several processes measure ranks only")
        if distributed.is_main():
            results = open_results(outdir, BENCHMARK, locks)
        else:
            results = Results(outdir, BENCHMARK, writes=False)
        settings = {"precision": precision, "compile": compile_mode, "tiny": tiny, "repeats": repeats}
        if names:
            measure(results, names, settings, device, models, overwrite)
        if distributed.is_main():
            order = sorted(results.parts, key=lambda n: (PARTS.index("ranks" if n.startswith("ranks") else n), n))
            table = figures_table({name: results.parts[name] for name in order}, settings_text)
            atomic_write_text(outdir / "sd15.md", table)
            click.echo(table)
    missed = [row["figure"] for part in results.parts.values() for row in part["rows"] if not reached(row)]
    if check and (missed or not results.parts):
        raise UserError(f"--check: not reached: {', '.join(missed) or 'nothing is measured'}")


def measure(results: Results, names: list[str], settings: dict, device: str, models: Path, overwrite: bool) -> None:
    """Fill the parts that are not there yet; every part is saved when it is complete."""
    from benchmarks import sd15_measures as measures
    from benchmarks.sd15_models import random_backbone, random_reward
    from torch_utils import distributed

    ranks = distributed.world_size()
    alone = results.parts.get(RANKS.format(1))
    found = {name: results.part(file_name(name, ranks), device, settings, overwrite) for name in names}
    empty = {name: part for name, part in found.items() if not part.rows}
    if not empty:
        return
    make_folder("--models", models)
    kind, tiny, repeats = distributed.device(), settings["tiny"], settings["repeats"]
    net = random_backbone(models, kind, settings["precision"], settings["compile"], tiny)
    # Loaded when it is needed, so that memory is measured without it.
    reward = functools.cache(lambda: random_reward(models, kind, tiny))
    work = {
        "batch1": lambda part: measures.measure_sampling(part, net, 1, 150.0, repeats, with_single=True),
        "batch16": lambda part: measures.measure_sampling(part, net, 16, 1750.0, repeats, with_single=False),
        "step": lambda part: measures.measure_step(part, net, reward(), repeats),
        "memory": lambda part: measures.measure_memory(part, net, (1, 2, 3) if tiny else (1, 16, 64), 8),
        "gradients": lambda part: measures.measure_gradients(part, net, reward(), (8, 4, 2, 1)),
        "ranks": lambda part: measures.measure_ranks(part, net, reward(), repeats, alone),
    }
    for name, part in empty.items():
        work[name](part)
        results.save()
        distributed.print0(f"{name} measured")


def file_name(part: str, ranks: int) -> str:
    """Of a part in the file: what several processes measure stands beside what one does."""
    return RANKS.format(ranks) if part == "ranks" else part


def settings_text(settings: dict) -> str:
    tiny = ", tiny networks" if settings["tiny"] else ""
    return f", {settings['precision']}, --compile {settings['compile']}{tiny}"


if __name__ == "__main__":
    main()
