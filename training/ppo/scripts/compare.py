"""Print one table from the score files of several folders.

SCORES are JSON files that the score_* commands wrote: every folder with the same metrics, on the same seeds and
prompts. A folder's label is its name. The table goes to stdout.

\b
Example (installed: epd-compare):
  python -m training.ppo.scripts.compare results/learned-hps.json results/ddim-hps.json --reference learned
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from torch_utils.errors import user_errors
from torch_utils.options import command
from training.ppo.comparison import check_comparison_outputs, compare, load_scores, to_markdown
from training.ppo.scorer_options import FILE


@command({"Comparison": ("reference", "force"), "Output": ("output_json", "output_md")}, help=__doc__)
@click.argument("scores", metavar="SCORES...", nargs=-1, required=True, type=FILE)
@click.option("--reference", metavar="LABEL", help="add paired differences: this folder minus each other")
@click.option("--output-json", metavar="FILE", type=FILE, help="write all numbers here")
@click.option("--output-md", metavar="FILE", type=FILE, help="write the table here, as Markdown")
@click.option("--force", is_flag=True, help="compare even what was measured with other weights, settings or libraries")
@user_errors
def main(
    scores: tuple[Path, ...], reference: str | None, output_json: Path | None, output_md: Path | None, force: bool
) -> None:
    check_comparison_outputs(output_json, output_md)
    comparison = compare([load_scores(path) for path in scores], reference, force)
    table = to_markdown(comparison)
    click.echo(table, nl=False)
    if output_json is None and output_md is None:
        return
    from torch_utils.checkpoint import atomic_write_text

    if output_json is not None:
        atomic_write_text(output_json, json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if output_md is not None:
        atomic_write_text(output_md, table)


if __name__ == "__main__":
    main()
