"""A comparison as one HTML page that needs nothing else: the table, and the pairs of images that differ most."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.ppo.comparison import SHOWN, format_cell

PAIRS = 4  # shown of each kind
LONGEST_SIDE = 320  # of a picture on the page, in pixels
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --win: #2a9d5c; --loss: #c8553d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.reference { background: var(--soft); }
.win { color: var(--win); } .loss { color: var(--loss); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; background: var(--soft); border-radius: .5rem; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; text-align: center; }
.pictures img { width: 100%; border-radius: .25rem; } .small img { image-rendering: pixelated; }
figcaption { margin-top: .4rem; font-size: .85rem; overflow-wrap: anywhere; }
.note { font-size: .85rem; opacity: .8; }
""".strip()


def to_html(comparison: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The page of a `compare` with a reference, whose score `records` say where the images are.

    For every metric and every folder beside the reference: the pairs in which the reference gains most by its score
    and those in which it loses most, pictures embedded.
    """
    reference = comparison["reference"]
    scores = {(record["images_dir"], record["metric"]): record for record in records}
    folders = {row["label"]: row["images_dir"] for row in comparison["rows"]}
    others = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    parts = [
        f"<h1>{html.escape(reference)}{others}: {comparison['count']} images</h1>",
        scores_tables(comparison),
    ]
    for metric in comparison["metrics"]:
        parts.append(f"<h2>{html.escape(metric)}</h2>")
        for label, folder in folders.items():
            if label != reference:
                pairs = _pairs(scores[folders[reference], metric], scores[folder, metric])
                parts += _extremes(pairs, reference, label)
        parts.append(_measured(metric, comparison["metrics"][metric]))
    body = "\n".join(parts)
    title = html.escape(f"{reference} compared")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{STYLE}\n</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def scores_tables(comparison: dict[str, Any]) -> str:
    """The means of a `compare` with a reference, and the reference's differences, as HTML with STYLE's classes."""
    parts = [
        _scores_table(comparison),
        _gaps_table(comparison) if len(comparison["rows"]) > 1 else "",
        '<p class="note">Mean and 95 % interval (Student\'s t). Differences are paired by seed and prompt; the share '
        f"in brackets is of images on which {html.escape(comparison['reference'])} scores higher. Coloured where the "
        "interval leaves out zero.</p>",
    ]
    return "\n".join(parts)


def _scores_table(comparison: dict[str, Any]) -> str:
    metrics = list(comparison["metrics"])
    lines = []
    for row in comparison["rows"]:
        known = ["" if row[field] is None else html.escape(str(row[field])) for field in SHOWN.values()]
        means = [format_cell(row["scores"][metric]) for metric in metrics]
        lines.append((row["label"], "".join(f"<td>{cell}</td>" for cell in [*known, *means])))
    return _table(["folder", *SHOWN, *metrics], lines, comparison["reference"])


def _gaps_table(comparison: dict[str, Any]) -> str:
    metrics, reference = list(comparison["metrics"]), comparison["reference"]
    lines = [
        (row["label"], "".join(_gap_cell(row["differences"][metric]) for metric in metrics))
        for row in comparison["rows"]
        if row["label"] != reference
    ]
    return _table([f"{reference} minus", *metrics], lines, reference)


def _table(heads: Sequence[str], lines: Sequence[tuple[str, str]], reference: str) -> str:
    """`lines` are labels and their cells, made."""
    rows = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for label, cells in lines:
        mark = ' class="reference"' if label == reference else ""
        rows.append(f"<tr{mark}><td>{html.escape(label)}</td>{cells}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(rows) + "\n</table></div>"


def _gap_cell(gap: dict[str, Any]) -> str:
    low, high = gap["ci95"] or (-math.inf, math.inf)  # one image leaves everything open
    kind = "" if low <= 0 <= high else ' class="win"' if low > 0 else ' class="loss"'
    return f"<td{kind}>{format_cell(gap, '+')} ({gap['wins']:.0%})</td>"


def _pairs(reference: dict[str, Any], other: dict[str, Any]) -> list[tuple[float, dict[str, Any], dict[str, Any]]]:
    """(difference, reference's row, other's row) of every image that both have, largest difference first."""
    theirs = {(row["seed"], row["prompt"]): row for row in other["scores"]}
    found = []
    for row in reference["scores"]:
        match = theirs.get((row["seed"], row["prompt"]))
        if match is not None:
            sides = (
                {**row, "path": Path(reference["images_dir"]) / row["file"]},
                {**match, "path": Path(other["images_dir"]) / match["file"]},
            )
            found.append((row["score"] - match["score"], *sides))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]["seed"]))


def _extremes(pairs: list[tuple[float, dict, dict]], reference: str, label: str) -> Iterable[str]:
    gains = [pair for pair in pairs if pair[0] > 0][:PAIRS]
    losses = [pair for pair in reversed(pairs) if pair[0] < 0][:PAIRS]
    for chosen, verb in ((gains, "gains most on"), (losses, "loses most to")):
        if chosen:
            yield f"<h3>{html.escape(reference)} {verb} {html.escape(label)}</h3>"
            yield '<div class="pairs">' + "".join(_figure(pair, reference, label) for pair in chosen) + "</div>"


def _figure(pair: tuple[float, dict[str, Any], dict[str, Any]], reference: str, label: str) -> str:
    gap, *rows = pair
    sides = ""
    for row, name in zip(rows, (reference, label), strict=True):
        data, size = embedded_picture(row["path"], LONGEST_SIDE)
        small = ' class="small"' if size < LONGEST_SIDE / 2 else ""
        text = f"{html.escape(name)}<br>{row['score']:.4f}"
        sides += f'<div{small}><img alt="{html.escape(name)}, seed {row["seed"]}" src="{data}">{text}</div>'
    kind = "win" if gap > 0 else "loss"
    prompt = html.escape(rows[0]["prompt"]) or "(empty prompt)"
    caption = f'<b class="{kind}">{gap:+.4f}</b> · seed {rows[0]["seed"]} · {prompt}'
    return f'<figure><div class="pictures">{sides}</div><figcaption>{caption}</figcaption></figure>'


def embedded_picture(path: Path, longest: int) -> tuple[str, int]:
    """A picture as a data address, shrunk to `longest` pixels, and its longest side. Raises `ImageError`."""
    from PIL import Image

    from training.images import load_image, to_uint8

    picture = Image.fromarray(to_uint8(load_image(path)[None])[0].numpy())
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    # Photographs as JPEG, small pictures without loss.
    kind = "PNG" if max(picture.size) < longest / 2 else "JPEG"
    picture.save(buffer, kind, quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{data}", max(picture.size)


def _measured(metric: str, how: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in how["libraries"].items())
    text = (
        f"{metric} {how['version']}, weights {how['weights_sha256'][:16]}..., {how['preprocessing']}, {how['dtype']}; "
    )
    return f'<p class="note">Measured by {html.escape(text + libraries)}.</p>'
