"""`learning.png`: the share of the gap that is still open against training images, one panel for each setting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.learning_curves import Gap, by_line, find_gap, find_reference, shifted
from benchmarks.learning_lines import SETTINGS
from torch_utils.checkpoint import atomic_file
from training.ppo.intervals import summarize

FIRST = 32.0  # left edge, where what was there before training is drawn
LOWEST, WORST = 0.0008, 1.6  # shares of the gap at the upper and the lower edge
TICKS = {1.0: "0 %", 0.5: "50 %", 0.2: "80 %", 0.1: "90 %", 0.05: "95 %", 0.02: "98 %", 0.01: "99 %", 0.005: "99.5 %"}
TICKS |= {0.002: "99.8 %", 0.001: "99.9 %"}
# Algorithm -> name in the legend, colour; lines of other budgets are left to the tables.
DRAWN = {
    "rdpo": ("RDPO", "#d62728"),
    "rdpo, near": ("RDPO, less exploration", "#ff9f4a"),
    "rdpo, near, scale_dir": ("RDPO, less exploration, scale_dir trained", "#e377c2"),
    "pathwise": ("pathwise", "#1f77b4"),
    "pathwise, scale_dir": ("pathwise, scale_dir trained", "#17becf"),
    "pathwise, scale_dir, 1024 images": ("the same with 32 images a step", "#0b5563"),
    "cmaes": ("CMA-ES", "#2ca02c"),
    "halving": ("random search, halving", "#9467bd"),
    "reference": ("published algorithm", "#7f7f7f"),
}
STYLES = {"cold": "-", "distilled": (0, (4, 1.5))}
NAMES = {"cold": "from the cold start table", "distilled": "from the distilled table"}
DPI = 120
PALETTE = 192  # colours of the file


def mean_curve(rows: Sequence[Mapping], gap: Gap) -> list[tuple[float, float, float, float]]:
    """(images, open share of the mean reward, lowest and highest of its 95 % interval), where all runs have a point."""
    curves = [shifted(row) for row in rows if row["failure"] is None]
    points = []
    for same in zip(*curves, strict=False):
        summary = summarize([point[1] for point in same])
        low, high = summary["ci95"] or (summary["mean"], summary["mean"])
        images = sum(point[0] for point in same) / len(same)
        points.append((images, *(gap.open_share(value) for value in (summary["mean"], high, low))))
    return points


def draw_panel(axes, part: Mapping, gap: Gap, reference: Mapping | None) -> None:
    for (line, start), rows in by_line(part["rows"]).items():
        if line not in DRAWN or start not in STYLES:
            continue
        points = [[max(value, edge) for value, edge in zip(point, (FIRST, LOWEST, LOWEST, LOWEST), strict=True)]
                  for point in mean_curve(rows, gap)]  # fmt: skip
        if not points:
            continue
        images, mean, low, high = zip(*points, strict=True)
        colour = DRAWN[line][1]
        axes.plot(images, mean, color=colour, linestyle=STYLES[start], linewidth=2, marker="o", markersize=3)
        axes.fill_between(images, low, high, color=colour, alpha=0.13, linewidth=0)
    if reference is not None:
        draw_reference(axes, gap.open_share(reference["reward"]))
    shape_axes(axes)


def draw_reference(axes, share: float) -> None:
    """A horizontal line for DDIM-50, or a note where it lies outside the panel."""
    if LOWEST < share < WORST:
        axes.axhline(share, color="#222222", linewidth=1.2, linestyle=":")
        axes.text(0.995, share, "DDIM-50", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
    else:
        place, side = ("above the best table", 0.985) if share <= LOWEST else ("below the cold start table", 0.04)
        axes.text(0.02, side, f"DDIM-50 lies {place}", transform=axes.transAxes, va="top", fontsize=9)


def shape_axes(axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(WORST, LOWEST)
    right = max([2048.0, *(line.get_xdata()[-1] for line in axes.lines if len(line.get_xdata()) > 2)])
    axes.set_xlim(FIRST * 0.94, right * 1.06)
    axes.minorticks_off()
    ticks = [FIRST * 2**n for n in range(12) if FIRST * 2**n <= right * 1.01]
    axes.set_xticks(ticks, ["start", *(f"{tick:.0f}" for tick in ticks[1:])])
    axes.set_yticks(list(TICKS), list(TICKS.values()))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_plot(parts: Mapping[str, Mapping], path: Path) -> None:
    """Draw the settings whose curves were measured; without any, an existing plot is removed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    measured = [
        (SETTINGS[name], parts[f"curves_{name}"], find_gap(parts, name), find_reference(parts, name))
        for name in SETTINGS
        if f"curves_{name}" in parts and find_gap(parts, name)
    ]
    if not measured:
        path.unlink(missing_ok=True)
        return
    columns = min(len(measured) + 1, 3)  # one cell more than settings, for the legend
    lines = -(-(len(measured) + 1) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(5.7 * columns, 4.9 * lines), squeeze=False)
    for axes in grid.flat[len(measured) :]:
        axes.axis("off")
    for axes, (setting, part, gap, reference) in zip(grid.flat, measured, strict=False):
        draw_panel(axes, part, gap, reference)
        ends = f"reward {gap.cold:.3f} (cold start) to {gap.best:.3f} (best)"
        axes.set_title(f"({setting.name}) {setting.title}\n{ends}", fontsize=10.5)
        axes.set_xlabel("training images, the distillation's cost included")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the gap closed")
    draw_legend(grid.flat[len(measured)])
    figure.tight_layout()
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=DPI)
    pyplot.close(figure)
    with atomic_file(path) as temporary:
        Image.open(drawing).convert("RGB").quantize(PALETTE).save(temporary, format="png", optimize=True)


def draw_legend(axes) -> None:
    """In a cell of its own: colours of the algorithms, styles of the start tables."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in DRAWN.values()]
    handles += [
        Line2D([], [], color="#333333", linewidth=2, linestyle=style, label=NAMES[start])
        for start, style in STYLES.items()
    ]
    axes.legend(
        handles=handles, loc="center", frameon=False, fontsize=11, handlelength=3,
        title="Mean over the seeds, band: its 95 % interval.\nUpwards is better.", title_fontsize=10.5,
    )  # fmt: skip
