"""Score several folders of images with several metrics and compare them.

The first folder is the reference: every difference is this folder minus another, paired by seed and prompt.

\b
Example (installed: epd-score):
  python -m training.ppo.scripts.score_all --images samples/learned samples/ddim-20 samples/ddim-50 \\
      --metrics hps,clip,aesthetic --output-json results/comparison.json

Beside the JSON come the same table as .md and .csv, a page of the images that differ most as .html, and the scores of
every image as LABEL-METRIC.json. Scores that are there already are kept: give the same command again to continue. The
table goes to stdout.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import click

from torch_utils.errors import UserError, user_errors
from torch_utils.options import cache_dir_option, command
from training.ppo.scorer_options import (
    FILE,
    amp_option,
    batch_size_option,
    device_option,
    pattern_option,
    prompts_option,
)


@command(
    {
        "What to score": ("images", "pattern", "prompts", "allow_missing", "output_json"),
        "Metrics": ("metrics", "weights", "fetch_only", "amp"),
        "Machine": ("batch_size", "cache_dir", "device"),
    },
    help=__doc__,
)
@click.option("--images", metavar="DIR...", type=FILE, multiple=True, help="folders, the reference first")
@click.argument("more", metavar="", nargs=-1, type=FILE)
@click.option("--metrics", metavar="LIST", required=True, help="hps, clip, aesthetic, pick, ..., separated by commas")
@click.option("--weights", metavar="METRIC=PATH", multiple=True, show_default="fetched", help="weights of one metric")
@click.option("--output-json", metavar="FILE", type=FILE, help="where the comparison goes")
@prompts_option
@click.option("--allow-missing", is_flag=True, help="compare the images that all folders have, if not all have all")
@click.option("--fetch-only", is_flag=True, help="only see to it that the weights are there; no images needed")
@pattern_option
@batch_size_option
@amp_option
@cache_dir_option
@device_option
@user_errors
def main(
    images: tuple[Path, ...],
    more: tuple[Path, ...],
    metrics: str,
    weights: tuple[str, ...],
    output_json: Path | None,
    prompts: Path | None,
    allow_missing: bool,
    fetch_only: bool,
    pattern: str,
    batch_size: int,
    amp: bool,
    device: str,
) -> None:
    from torch_utils import distributed
    from torch_utils.checkpoint import atomic_write_text
    from training.ppo.comparison import check_comparison_outputs, compare, folder_labels, to_csv, to_markdown
    from training.ppo.comparison_page import to_html
    from training.ppo.reward_multi import check_reward_weights, create_reward
    from training.ppo.score_sets import check_readable, collect_sets, score_sets

    names = list(dict.fromkeys(name.strip() for name in metrics.split(",") if name.strip()))
    if not names:
        raise UserError(f"--metrics names none: {metrics!r}")
    paths = _paths_of(weights, names)
    folders = [*images, *more]
    if fetch_only:
        for name in names:
            click.echo(f"{name}: {check_reward_weights(name, paths.get(name))}")
        return
    if not folders or output_json is None:
        raise UserError("--images and --output-json are needed, or --fetch-only")
    if output_json.suffix != ".json":
        raise UserError(f"--output-json {output_json} must end in .json")
    table_path = output_json.with_suffix(".md")
    check_comparison_outputs(output_json, table_path)
    sets = collect_sets(folders, pattern, prompts, allow_missing)
    found = {name: check_reward_weights(name, paths.get(name)) for name in names}
    with distributed.joined(device):
        place = distributed.device()
        load = functools.partial(create_reward, device=place, batch_size=batch_size, amp=amp)
        loaders = {name: functools.partial(load, name, weights=found[name]) for name in names}
        records = score_sets(sets, loaders, output_json.parent, batch_size, place)
    check_readable(records, allow_missing)
    reference = folder_labels([folder.as_posix() for folder in folders])[0]
    comparison = compare(records, reference, allow_missing=allow_missing)
    table = to_markdown(comparison)
    atomic_write_text(output_json, json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write_text(table_path, table)
    atomic_write_text(output_json.with_suffix(".csv"), to_csv(comparison))
    atomic_write_text(output_json.with_suffix(".html"), to_html(comparison, records))
    click.echo(table, nl=False)


def _paths_of(weights: tuple[str, ...], names: list[str]) -> dict[str, str]:
    """`METRIC=PATH` pairs. Raises `UserError` for what is none, or for a metric that is not asked for."""
    paths = {}
    for item in weights:
        name, equals, path = item.partition("=")
        if not equals or not path or name not in names:
            raise UserError(f"--weights {item}: expected METRIC=PATH with one of --metrics {','.join(names)}")
        paths[name] = path
    return paths


if __name__ == "__main__":
    main()
