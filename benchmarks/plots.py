"""`solvers.png`: error against sequential network calls, one panel for each of the main problems."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch_utils.checkpoint import atomic_file

# (part, problem, title) of the panels; one that was not measured is left out.
PANELS = (
    ("closed_form", "logsnr", "Mixture of Gaussians, exact truth\nlogsnr schedule"),
    ("embedded", "discrete", "Embedded model, guidance 7.5\ndiscrete schedule"),
    ("embedded", "logsnr", "Embedded model, guidance 7.5\nlogsnr schedule"),
)
# One colour for each family of solvers.
COLOURS = {
    "ddim": "#222222",
    "ipndm": "#1f77b4",
    "ipndm_v": "#17becf",
    "deis": "#2ca02c",
    "dpmpp": "#ff8c00",
    "unipc": "#d62728",
    "heun": "#8c6d46",
    "edm": "#8c6d46",
    "dpm2": "#9467bd",
    "dpm": "#9467bd",
    "epd": "#e377c2",
    "epd_ipndm": "#c2188b",
    "epd_dpmpp": "#7f1d5a",
}
# One line style and marker for each order within a family; a family's further variants have their own.
STYLES = {2: ("-", "o"), 3: ("--", "s"), 4: (":", "^")}
OTHER_STYLES = {"unipc bh1 2": ("-.", "v"), "dpm, 2 inner": ("--", "D")}
SAME = 1e-6  # relative difference of two errors below which two lines are drawn as one
LEGEND_ROWS = 4
DPI = 120
PALETTE = 128  # colours of the file: a third of the size of true colour


def lines_of(rows: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    """Variant -> {parallel NFE: error} of one problem, without what diverged or is exactly 0."""
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["parallel_nfe"]):
        if row["error"]:
            lines.setdefault(row["variant"], {})[row["parallel_nfe"]] = row["error"]
    return lines


def twins(panels: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, str]:
    """Variant -> the first variant whose line is the same in every panel (itself, if there is none)."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel))

    def same(a: str, b: str) -> bool:
        for panel in panels:
            one, other = panel.get(a, {}), panel.get(b, {})
            if one.keys() != other.keys() or not all(math.isclose(one[n], other[n], rel_tol=SAME) for n in one):
                return False
        return True

    return {label: next(other for other in labels if same(other, label)) for label in labels}


def style_of(row: Mapping) -> dict:
    order = row["options"].get("max_order", 2)
    line, marker = OTHER_STYLES.get(row["variant"], STYLES.get(order, STYLES[2]))
    return {"color": COLOURS[row["solver"]], "linestyle": line, "marker": marker}


def draw_panel(axes, lines: Mapping[str, Mapping[int, float]], drawn: Mapping[str, str], styles: Mapping) -> None:
    """`drawn`: name in the legend of every variant that gets a line."""
    for label, name in drawn.items():
        points = lines.get(label, {})
        axes.plot(list(points), list(points.values()), label=name, linewidth=1.5, markersize=4, **styles[label])
    nfes = sorted({nfe for points in lines.values() for nfe in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(nfes, [str(nfe) for nfe in nfes], fontsize=9)
    axes.minorticks_off()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("sequential network calls")


def draw_reference(axes, entry: Mapping) -> None:
    """A grey band up to the distance between the truth that was used and a better one: no error below it counts."""
    if not entry.get("reference_error"):
        return
    low, high = axes.get_ylim()
    level = entry["reference_error"]
    low = min(low, level / 1.6)
    axes.set_ylim(low, high)
    axes.axhspan(low, level, color="#bbbbbb", alpha=0.35, linewidth=0, zorder=0)
    axes.text(
        0.02, level, "the reference's own error", transform=axes.get_yaxis_transform(), va="top", fontsize=8.5,
        color="#555555",
    )  # fmt: skip


def save_plot(parts: Mapping[str, Mapping], path: Path) -> None:
    """Draw the measured panels; without any, an existing plot is removed, since it would show other figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    measured = []
    for part, problem, title in PANELS:
        rows = [row for row in parts[part]["rows"] if row["problem"] == problem] if part in parts else []
        if rows:
            measured.append((title, rows, parts[part]["references"].get(problem, {}) if part == "embedded" else {}))
    if not measured:
        path.unlink(missing_ok=True)
        return
    panels = [lines_of(rows) for _, rows, _ in measured]
    same = twins(panels)
    drawn = {
        label: " = ".join(other for other in same if same[other] == label) for label in dict.fromkeys(same.values())
    }
    styles = {row["variant"]: style_of(row) for _, rows, _ in measured for row in rows}

    figure, grid = pyplot.subplots(1, len(measured), figsize=(5.2 * len(measured), 6.4), squeeze=False)
    for axes, lines, (title, _, reference) in zip(grid[0], panels, measured, strict=True):
        draw_panel(axes, lines, drawn, styles)
        draw_reference(axes, reference)
        axes.set_title(title, fontsize=11)
    grid[0][0].set_ylabel("error: RMS(x - truth) / RMS(truth)")
    handles, names = grid[0][0].get_legend_handles_labels()
    columns = math.ceil(len(names) / (LEGEND_ROWS if len(measured) > 1 else 2 * LEGEND_ROWS))
    figure.tight_layout(rect=(0, 0.185 if len(measured) > 1 else 0.3, 1, 1))
    figure.legend(
        handles, names, loc="lower center", ncols=columns, frameon=False, fontsize=10, handlelength=3.2,
        title="Number behind a name: max_order. EPD solvers: untrained start table, K = 2 points.", title_fontsize=9,
    )  # fmt: skip
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=DPI)
    pyplot.close(figure)
    with atomic_file(path) as temporary:
        Image.open(drawing).convert("RGB").quantize(PALETTE).save(temporary, format="png", optimize=True)
