"""Write what a run did as one HTML page: `python -m training.ppo.report RUN_DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from torch_utils.errors import UserError, user_errors
from torch_utils.options import command

FILE = click.Path(path_type=Path)


class ReportError(UserError):
    """A report that cannot be written where it should go."""


def check_output(path: Path) -> None:
    """Raise `ReportError` unless `path` is free or holds an earlier report."""
    from torch_utils.untrusted import bounded_lines
    from training.ppo.report_page import PAGE_START

    if path.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"--output {path} must end in .html")
    if path.exists() and not (path.is_file() and next(bounded_lines(path), b"") == PAGE_START.encode()):
        raise ReportError(f"{path} exists and is no report of a run: name another file, or delete it")


@command({"Page": ("output", "scores")})
@click.argument("run_dir", type=FILE)
@click.option("--output", help="The page", metavar="FILE", type=FILE, show_default="RUN_DIR/report.html")
@click.option(
    "--scores",
    help="Score files of the same images by several solvers, the learned table's first; repeatable",
    metavar="FILE",
    type=FILE,
    multiple=True,
)
@user_errors
def main(run_dir: Path, output: Path | None, scores: tuple[Path, ...]) -> None:
    """Write a run's configuration, curves, table, samples and use as one page that needs no network.

    An unfinished run gives a page of what there is so far; an earlier page is replaced. The page's path goes to stdout.
    Example, after `bash train.sh && bash sample.sh` (installed: epd-report):

    \b
    python -m training.ppo.report exps/<run> --scores results/learned-hps.json --scores results/ddim-hps.json
    """
    from torch_utils.checkpoint import atomic_write_text
    from training.ppo.comparison import compare, folder_labels, load_scores
    from training.ppo.report_page import to_page
    from training.ppo.report_run import read_run

    path = run_dir / "report.html" if output is None else output
    run = read_run(run_dir)
    check_output(path)
    records = [load_scores(file) for file in scores]
    labels = folder_labels(list(dict.fromkeys(record["images_dir"] for record in records)))
    comparison = compare(records, labels[0]) if records else None
    atomic_write_text(path, to_page(run, comparison, scores))
    click.echo(path)


if __name__ == "__main__":
    main()
