"""Measure learning: the held-out reward of the mean table against the training images spent.

Writes learning.json (every number), learning_tables.md and learning.png (plot) to --outdir. The embedded model and the
production algorithms; all runs of a setting advance in lockstep. Runs that learning.json already holds are kept and
only the rest made, so an interrupted measurement goes on with the same command; a part from another machine, other
settings or other code is left alone unless --overwrite says so.

\b
references  DDIM and other solvers without table on the evaluation prompts
curves      every algorithm from the cold-start table and from a distilled one
schedules   RDPO with other schedules of exploration and learning rate (settings a, d, e)
variants    RDPO and pathwise with one thing changed each (settings a, e)
starts      RDPO and pathwise from other start tables
robustness  both with 8 to 512 images a step (settings a, c)
transfer    the best tables of curves under other conditions (setting a)
time        seconds per training image, one run alone (setting a)
none        nothing: only --merge, and write the tables and the plot again

\b
a  guidance 7.5, 5 intervals, K=2         c  guidance 3, 5 intervals, K=2
b  guidance 7.5, 10 intervals, K=2        d  guidance 7.5, 5 intervals, K=3, scales trained
e  like a, on the logsnr grid (the others: discrete)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks.learning_lines import PARTS, SETTINGS, TRAINED, Line, jobs
from benchmarks.results import Benchmark, Results, choose, open_results
from benchmarks.solvers import parse_device
from torch_utils.errors import UserError, user_errors

BENCHMARK = Benchmark(
    name="learning",
    module="benchmarks.learning",
    code=(
        *("solvers.py", "solver_utils.py", "training/distill.py", "training/denoisers/stable_diffusion.py"),
        *(
            f"training/ppo/{name}.py"
            for name in ("cold_start", "policy", "rdpo", "pathwise", "learner", "losses", "rl_runner", "evaluation")
        ),
        *(f"benchmarks/learning_{name}.py" for name in ("lockstep", "models", "rivals", "starts", "variants")),
    ),
)


@click.command(help=__doc__, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--parts", metavar="LIST", default="all", help="What to measure: all, none, or some of the above")
@click.option("--settings", metavar="LIST", default="all", help="In which settings: all, or some of a to e")
@click.option("--seeds", metavar="INT", type=click.IntRange(1), default=5, help="Runs of every line")
@click.option("--first-seed", metavar="INT", type=click.IntRange(0), default=0, help="Seed of the first of them")
@click.option("--images", metavar="INT", type=click.IntRange(1), default=2048, help="Training images of a run")
@click.option(
    "--lines", metavar="LIST", default="", help="Only these lines, by label, separated by ;", show_default="all"
)
@click.option(
    "--starts", metavar="LIST", default="", help="Only from these start tables, separated by ;", show_default="all"
)
@click.option("--eval-prompts", metavar="INT", type=click.IntRange(1, 300), default=128, help="Held-out prompts")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    help="Of the backbone; auto is float16 on cuda, float32 on the CPU",
)
@click.option("--chunk", metavar="INT", type=click.IntRange(1), default=1024, help="Images of a network batch")
@click.option(
    "--gradient-chunk", metavar="INT", type=click.IntRange(1), default=160, help="The same where gradients are taken"
)
@click.option("--outdir", metavar="DIR", type=click.Path(path_type=Path), default=Path("results/learning"))
@click.option("--overwrite", is_flag=True, help="Measure the chosen parts anew")
@click.option(
    "--merge", "others", metavar="DIR", type=click.Path(path_type=Path), multiple=True,
    help="First take over what the learning.json of another --outdir holds; repeatable",
)  # fmt: skip
@user_errors
def main(
    parts: str,
    settings: str,
    seeds: int,
    first_seed: int,
    images: int,
    lines: str,
    starts: str,
    eval_prompts: int,
    device: str,
    precision: str,
    chunk: int,
    gradient_chunk: int,
    outdir: Path,
    overwrite: bool,
    others: tuple[Path, ...],
) -> None:
    todo = jobs(choose("--parts", parts, PARTS), choose("--settings", settings, list(SETTINGS)))
    chosen = line_filter(todo, lines, starts)

    device = parse_device(device)
    if precision == "auto":
        precision = "float16" if device == "cuda" else "float32"
    with contextlib.ExitStack() as locks:
        results = open_results(outdir, BENCHMARK, locks)
        merge(results, others)
        try:
            if todo:
                from benchmarks.learning_runs import Workbench

                bench = Workbench(device, precision, eval_prompts, chunk, gradient_chunk)
                for part, setting in todo:
                    measure(results, bench, part, setting.name, range(first_seed, first_seed + seeds), images, chosen,
                            overwrite)  # fmt: skip
        finally:
            results.save()
        report(results, outdir)


def line_filter(todo: Sequence[tuple], lines: str, starts: str) -> Callable[[Line], bool]:
    """Whether a line is to be measured. Raises UserError for a label or start that no part of `todo` has."""
    known = [line for part, setting in todo for line in (TRAINED[part](setting) if part in TRAINED else [])]
    labels = _names("--lines", lines, {line.label for line in known})
    tables = _names("--starts", starts, {line.start for line in known})
    return lambda line: (not labels or line.label in labels) and (not tables or line.start in tables)


def _names(option: str, text: str, known: set[str]) -> set[str]:
    names = {name.strip() for name in text.split(";") if name.strip()}
    for name in sorted(names - known):
        raise UserError(f"{option}: no chosen part has '{name}'; there are {'; '.join(sorted(known)) or 'none'}")
    return names


def measure(
    results: Results,
    bench,
    name: str,
    setting_name: str,
    seeds: Sequence[int],
    images: int,
    chosen: Callable[[Line], bool],
    overwrite: bool,
) -> None:
    """What is missing of one part in one setting."""
    import torch

    from benchmarks import learning_runs as runs

    # The policies are a few hundred numbers: more threads only get in each other's way.
    torch.set_num_threads(1 if bench.device == "cuda" else torch.get_num_threads())
    setting = SETTINGS[setting_name]
    settings = runs.part_settings(name, setting, images, bench)
    part = results.part(f"{name}_{setting_name}", bench.device, settings, overwrite)
    if name in TRAINED:
        runs.measure_training(part, name, setting, bench, seeds, images, chosen, _say(name))
    elif name == "references":
        runs.measure_references(part, setting, bench)
    elif name == "transfer":
        runs.measure_transfer(part, setting, bench, results.parts.get(f"curves_{setting_name}"))
    else:
        runs.measure_time(part, setting, bench, _say(name))
    results.save()


def _say(name: str) -> Callable[[str], None]:
    return lambda text: click.echo(f"{name}: {text}", err=True)


def merge(results: Results, others: Sequence[Path]) -> None:
    """Take over the parts of other folders, row by row where a part is in both. Raises UserError."""
    for folder in others:
        if not (folder / f"{BENCHMARK.name}.json").is_file():
            raise UserError(f"--merge: {folder} holds no {BENCHMARK.name}.json")
        results.take_over(Results(folder, BENCHMARK), row_key)


def row_key(row: dict) -> tuple:
    """What identifies a row within its part."""
    table = row.get("table")
    names = ("line", "start", "seed", "solver", "calls", "kind", "value")
    return (*(row.get(name) for name in names), table if isinstance(table, str) else None)


def report(results: Results, outdir: Path) -> None:
    """Write the tables and the plot."""
    from benchmarks.learning_plot import save_plot
    from benchmarks.learning_report import to_markdown
    from torch_utils.checkpoint import atomic_write_text

    atomic_write_text(outdir / "learning_tables.md", to_markdown(results.parts))
    save_plot(results.parts, outdir / "learning.png")
    measured = ", ".join(sorted(results.parts)) or "nothing measured"
    click.echo(f"{results.path}, learning_tables.md, learning.png: {measured}")


if __name__ == "__main__":
    main()
