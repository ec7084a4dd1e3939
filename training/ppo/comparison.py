"""Scores of several folders side by side: means with intervals, and paired differences to one of them."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_utils.errors import UserError
from torch_utils.untrusted import bounded_lines, parse_json, read_bounded
from training.ppo.intervals import summarize

# Two score files that differ in one of these were not measured alike.
RECORD_FIELDS = ("version", "weights_sha256", "preprocessing", "dtype", "libraries")
ROW_FIELDS = (
    *("images_dir", "solver", "options", "num_steps", "schedule_type", "table_sha256"),
    *("nfe", "parallel_nfe", "forwards"),
)
SHOWN = {"solver": "solver", "parallel NFE": "parallel_nfe", "NFE": "nfe", "forwards": "forwards"}  # column -> field
TABLE_START = "| label"
MAX_BYTES = 512 << 20  # of a score file; that of a million images has 250 MB


class ComparisonError(UserError):
    """Score files that cannot be compared."""


def load_scores(path: Path) -> dict[str, Any]:
    """Read a score file of a `score_*` command.

    Raises `ComparisonError` for a file that is missing, is something else, or leaves out images as unreadable.
    """
    try:
        record = parse_json(read_bounded(path, MAX_BYTES))
        scores = {(row["seed"], row["prompt"]): row["score"] for row in record["scores"]}
        texts = [record[key] for key in ("metric", "images_dir", "version", "weights_sha256", "preprocessing", "dtype")]
        fits = bool(scores) and all(isinstance(text, str) for text in texts) and isinstance(record["libraries"], dict)
        fits &= all(type(seed) is int and isinstance(prompt, str) for seed, prompt in scores)
        fits &= all(type(score) in (int, float) and abs(score) < 1e100 for score in scores.values())
        unreadable = list(record["unreadable"])
    except FileNotFoundError as error:
        raise ComparisonError(f"{path} does not exist: score files are written by score_* --output-json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ComparisonError(f"{path} is no score file ({type(error).__name__}: {error})") from error
    if not fits or len({seed for seed, _ in scores}) < len(record["scores"]):
        raise ComparisonError(f"{path} is no score file: a field has the wrong type, or a seed is listed twice")
    if unreadable:
        raise ComparisonError(f"{path} lacks {len(unreadable)} unreadable images: remake {unreadable[0]} etc.")
    return record


def compare(
    records: Sequence[dict[str, Any]], reference: str | None = None, force: bool = False, allow_missing: bool = False
) -> dict[str, Any]:
    """Join score records by folder and image.

    A folder's label is its name, or the path as scored where two folders share the name. Every folder needs the same
    metrics on the same (seed, prompt) pairs. Returns a dict: `count`, `reference`, `metrics` (how each was measured)
    and `rows`, one per folder in order of appearance: `label`, ROW_FIELDS (None where the score file does not say),
    `scores` {metric: summary} and, with a `reference` label, `differences` {metric: summary of reference - row per
    image, with `wins`, the share of images where the reference is better (ties count half)}; None in the reference's
    own row. Intervals are `summarize`'s. Raises `ComparisonError`; `force` turns the refusal of unlike measurements
    into a note on stderr, and so does `allow_missing` that of images which not all records have: the others are left.
    """
    if allow_missing:
        records = _common_images(records)
    folders = _group_by_label(records)
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    if reference is not None and reference not in folders:
        raise ComparisonError(f"--reference {reference!r} is none of the labels {', '.join(folders)}")
    for metric in metrics:
        _check_alike([record for record in records if record["metric"] == metric], force)
    values = {label: _scores_by_image(label, folder, metrics) for label, folder in folders.items()}
    images = _check_same_images({label: list(scores[metrics[0]]) for label, scores in values.items()})
    rows = []
    for label, folder in folders.items():
        first = folder[metrics[0]]
        row = {"label": label, **{key: first.get(key) for key in ROW_FIELDS}}
        row["scores"] = {m: summarize(list(values[label][m].values())) for m in metrics}
        if reference is not None:
            differences = {m: _difference(values[reference][m], values[label][m]) for m in metrics}
            row["differences"] = differences if label != reference else None
        rows.append(row)
    some = next(iter(folders.values()))
    measured = {m: {key: some[m][key] for key in RECORD_FIELDS} for m in metrics}
    return {"kind": "comparison", "count": len(images), "reference": reference, "metrics": measured, "rows": rows}


def folder_labels(paths: Sequence[str]) -> list[str]:
    """What folders are called in tables: their names, or the paths where two share a name."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _group_by_label(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """label -> metric -> record."""
    paths = list(dict.fromkeys(record["images_dir"] for record in records))
    labels = dict(zip(paths, folder_labels(paths), strict=True))
    folders: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in labels.values()}
    for record in records:
        folder = folders[labels[record["images_dir"]]]
        if record["metric"] in folder:
            raise ComparisonError(f"{record['metric']} of {record['images_dir']} is given twice")
        folder[record["metric"]] = record
    return folders


def _common_images(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with the images that all of them have scores of; a note on stderr says what that leaves out."""
    images = [{(row["seed"], row["prompt"]) for row in record["scores"]} for record in records]
    common, everything = set.intersection(*images), set.union(*images)
    if not common:
        raise ComparisonError("no image, by seed and prompt, has a score in every folder")
    if common != everything:
        print(f"compared by the {len(common)} images that all have; {len(everything - common)} not", file=sys.stderr)
    return [
        {**record, "scores": [row for row in record["scores"] if (row["seed"], row["prompt"]) in common]}
        for record in records
    ]


def _check_alike(records: Sequence[dict[str, Any]], force: bool) -> None:
    first = records[0]
    for record in records[1:]:
        for field in RECORD_FIELDS:
            if record[field] != first[field]:
                message = (
                    f"{first['metric']} was measured differently: {field} is {first[field]} for {first['images_dir']} "
                    f"but {record[field]} for {record['images_dir']}"
                )
                if not force:
                    raise ComparisonError(f"{message}: score both again, or compare them all the same with --force")
                print(message, file=sys.stderr)


def _scores_by_image(
    label: str, folder: dict[str, dict[str, Any]], metrics: Sequence[str]
) -> dict[str, dict[tuple[int, str], float]]:
    """metric -> (seed, prompt) -> score, in order of seed; every metric covers the same images."""
    for metric in metrics:
        if metric not in folder:
            raise ComparisonError(f"{label} has no {metric} scores, but other folders have: score it too")
    scores = {m: {(row["seed"], row["prompt"]): row["score"] for row in folder[m]["scores"]} for m in metrics}
    _check_same_images({f"{label} ({metric})": list(images) for metric, images in scores.items()})
    return {metric: dict(sorted(images.items())) for metric, images in scores.items()}


def _check_same_images(images: dict[str, list[tuple[int, str]]]) -> list[tuple[int, str]]:
    """Raise unless every list holds the same (seed, prompt) pairs; returns the first, sorted."""
    prompts = {label: dict(pairs) for label, pairs in images.items()}
    everything = {seed for by_seed in prompts.values() for seed in by_seed}
    gaps = []
    for label, by_seed in prompts.items():
        missing = sorted(everything - by_seed.keys())
        if missing:
            more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
            gaps.append(f"{label} lacks seeds {', '.join(map(str, missing[:20]))}{more}")
    if gaps:
        raise ComparisonError(f"the folders hold different images: {'; '.join(gaps)}")
    first, *others = prompts
    for label in others:
        for seed, prompt in prompts[first].items():
            if prompts[label][seed] != prompt:
                raise ComparisonError(
                    f"seed {seed} has the prompt {prompt[:60]!r} in {first}, "
                    f"but {prompts[label][seed][:60]!r} in {label}"
                )
    return sorted(images[first])


def _difference(reference: dict[tuple[int, str], float], other: dict[tuple[int, str], float]) -> dict[str, Any]:
    gaps = [reference[image] - other[image] for image in reference]
    wins = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
    return {**summarize(gaps), "wins": wins}


def to_markdown(comparison: dict[str, Any]) -> str:
    """The table as aligned Markdown, readable in a terminal too, and a line that says what the intervals are."""
    metrics, reference = list(comparison["metrics"]), comparison["reference"]
    header = ["label", *SHOWN, *metrics]
    if reference is not None:
        header += [f"{reference} - this, {metric}" for metric in metrics]
    lines = []
    for row in comparison["rows"]:
        cells = [row["label"], *("" if row[field] is None else str(row[field]) for field in SHOWN.values())]
        cells += [format_cell(row["scores"][metric]) for metric in metrics]
        if reference is not None:
            differences = row["differences"]
            cells += [format_cell(differences[metric], "+") if differences is not None else "" for metric in metrics]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    right = [column >= 2 for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    table = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in [header, rule, *lines]
    ]
    note = f"Mean and 95 % interval (Student's t) over {comparison['count']} images"
    if reference is not None:
        note += "; differences are paired by seed and prompt"
    return "\n".join([*table, "", note + "."]) + "\n"


def format_cell(summary: dict[str, Any], sign: str = "") -> str:
    """`mean ± half the interval`, to four digits; `sign` "+" shows that of positive means too."""
    mean = f"{summary['mean']:{sign}.4f}"
    return mean if summary["ci95"] is None else f"{mean} ± {summary['ci95'][1] - summary['mean']:.4f}"


def to_csv(comparison: dict[str, Any]) -> str:
    """One line for each folder and metric, with every number; differences are the reference minus that folder."""
    fields = ("count", "mean", "std", "min", "max", "ci95_low", "ci95_high")
    differences = ("difference", "difference_ci95_low", "difference_ci95_high", "wins")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "metric", "reference", *SHOWN.values(), *fields, *differences])
    for row in comparison["rows"]:
        for metric, summary in row["scores"].items():
            gap = (row.get("differences") or {}).get(metric)
            numbers = [summary[key] for key in fields[:5]] + list(summary["ci95"] or (None, None))
            numbers += [gap["mean"], *(gap["ci95"] or (None, None)), gap["wins"]] if gap is not None else [None] * 4
            shown = [row[key] for key in SHOWN.values()]
            writer.writerow([row["label"], metric, comparison["reference"], *shown, *numbers])
    return text.getvalue()


def check_comparison_outputs(json_path: Path | None, markdown_path: Path | None) -> None:
    """Raise `ComparisonError` unless the paths are free or hold an earlier comparison."""
    if json_path is not None and json_path.exists():
        try:
            earlier = parse_json(read_bounded(json_path, MAX_BYTES))["kind"] == "comparison"
        except (OSError, ValueError, KeyError, TypeError):
            earlier = False
        if not earlier:
            raise ComparisonError(f"{json_path} exists and is no comparison: name another file, or delete it")
    if markdown_path is not None and markdown_path.exists():
        earlier = markdown_path.is_file() and next(bounded_lines(markdown_path), b"").startswith(TABLE_START.encode())
        if not earlier:
            raise ComparisonError(f"{markdown_path} exists and is no comparison: name another file, or delete it")
