"""`learning_tables.md`: the tables of what `learning.json` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.learning_curves import (
    Gap,
    by_line,
    failed,
    finals,
    find_gap,
    find_reference,
    paired_runs,
    parts_of,
    reached,
)
from benchmarks.learning_lines import SETTINGS
from benchmarks.solver_report import machine_line, table
from training.ppo.intervals import summarize

SHARES = (0.90, 0.95, 0.99)
MEANING = (
    "The mean table's reward on held-out prompts against training images. The gap of a setting runs from the cold "
    "start table's reward to the best mean table that any run found; a table shows the training images after which a "
    "share of it is closed: median over the seeds [least - most], by linear interpolation between evaluations, - where "
    "fewer than half of the runs get there. What a distilled start table costs (network rows, in images made with the "
    "table) is counted. Intervals are 95 %: of rewards over the seeds, of differences to DDIM with 50 calls over the "
    "prompts, the same prompts and noises in both. Worst: the share that the last table of the worst run closes. "
    "Failed: runs that broke off, or closed less than 90 %."
)
TITLES = {
    "curves": "Algorithms",
    "schedules": "RDPO with other concentrations (first to last) and learning rates",
    "variants": "One thing changed",
    "starts": "Start tables",
    "robustness": "Images a step",
}


def pm(summary: Mapping | None, digits: int = 4, sign: str = "") -> str:
    """`mean ± half width` of a summary; - without one."""
    if summary is None:
        return "-"
    mean = f"{summary['mean']:{sign}.{digits}f}"
    return mean if summary["ci95"] is None else f"{mean} ± {summary['ci95'][1] - summary['mean']:.{digits}f}"


def images_cell(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "-"
    median, least, most = found
    if least == most:
        return f"{median:.0f}"
    return f"{median:.0f} [{least:.0f} - {'never' if math.isinf(most) else f'{most:.0f}'}]"


def line_cells(rows: Sequence[Mapping], gap: Gap | None, reference: Mapping | None) -> list[str]:
    """The cells of one line: images to close each share, final rewards, spread, failures, differences."""
    cells = [images_cell(reached(rows, gap.target(share)) if gap else None) for share in SHARES]
    rewards = finals(rows)
    if rewards:
        summary = summarize(rewards)
        cells += [pm(summary), pm(summarize(finals(rows, 2))), f"{summary['max'] - summary['min']:.4f}"]
        cells.append(f"{1 - gap.open_share(summary['min']):.1%}" if gap else "-")
    else:
        cells += ["-", "-", "-", "-"]
    cells.append(f"{failed(rows, gap)} of {len(rows)}" if gap else "-")
    return cells + [pm(paired_runs(rows, reference, metric), sign="+") for metric in ("reward", "heldout")]


def training_section(name: str, part: Mapping, gap: Gap | None, reference: Mapping | None) -> list[str]:
    header = ["line", "from", *(f"{share:.0%}" for share in SHARES), "reward", "held-out", "spread", "worst", "failed"]
    header += ["reward - DDIM-50", "held-out - DDIM-50"]
    lines = [[line, start, *line_cells(rows, gap, reference)] for (line, start), rows in by_line(part["rows"]).items()]
    return [f"### {TITLES[name]}", "", machine_line(part), "", *table(header, lines)]


def start_rows(parts: Mapping[str, Mapping]) -> list[list[str]]:
    """Start tables by kind, over the seeds."""
    kinds: dict[str, dict[str, Mapping]] = {}
    for part in parts.values():
        for key, entry in part["references"].items():
            kinds.setdefault(key.partition(", seed")[0], {})[key] = entry
    lines = []
    for kind, entries in sorted(kinds.items()):
        values = list(entries.values())
        rewards, others = ([entry[metric] for entry in values] for metric in ("reward", "heldout"))
        cost = sum(entry["start_images"] for entry in values) / len(values)
        seconds = sum(entry["seconds"] for entry in values) / len(values)
        lines.append([kind, pm(summarize(rewards)), pm(summarize(others)), f"{cost:.0f}", f"{seconds:.1f}"])
    return lines


def setting_section(parts: Mapping[str, Mapping], setting: str) -> list[str]:
    """Everything about one setting."""
    gap, reference, trained = find_gap(parts, setting), find_reference(parts, setting), parts_of(parts, setting)
    references = parts.get(f"references_{setting}")
    transfer = parts.get(f"transfer_{setting}")
    timing = parts.get(f"time_{setting}")
    if not (trained or references or transfer or timing):
        return []
    lines = [f"## Setting {setting}: {SETTINGS[setting].title}", ""]
    if gap:
        targets = ", ".join(f"{share:.0%} is {gap.target(share):.4f}" for share in SHARES)
        lines += [f"Gap: {gap.cold:.4f} (cold start) to {gap.best:.4f} (best mean table of any run); {targets}.", ""]
    for name, part in trained.items():
        lines += training_section(name, part, gap, reference)
    if trained:
        lines += ["### Tables before training", ""]
        lines += table(["start table", "reward", "held-out", "cost, images", "seconds"], start_rows(trained))
    if references:
        lines += reference_section(references)
    if transfer:
        lines += transfer_section(transfer)
    return lines + (time_section(timing, trained.get("curves")) if timing else [])


def reference_section(part: Mapping) -> list[str]:
    rows = sorted(part["rows"], key=lambda row: (row["calls"], -row["reward"]))
    lines = [
        [
            f"{row['solver']}-{row['calls']}",
            pm(summarize(row["scores"]["reward"])),
            pm(summarize(row["scores"]["heldout"])),
        ]
        for row in rows
    ]
    header = ["solver - sequential calls", "reward", "held-out"]
    return ["### Solvers without table (intervals over the prompts)", "", machine_line(part), "", *table(header, lines)]


def transfer_section(part: Mapping) -> list[str]:
    """One table for each metric: tables in rows, conditions in columns."""
    conditions = list(dict.fromkeys((row["kind"], row["value"]) for row in part["rows"]))
    names = list(dict.fromkeys(row["table"] for row in part["rows"]))
    found = {(row["table"], row["kind"], row["value"]): row for row in part["rows"]}
    lines = ["### The best learned tables under other conditions", "", machine_line(part), ""]
    for metric, title in (("reward", "Reward"), ("heldout", "Held-out reward")):
        cells = []
        for name in names:
            values = [found.get((name, *condition)) for condition in conditions]
            cells.append([name, *(f"{row[metric]:.4f}" if row else "-" for row in values)])
        header = ["table", *(f"{kind} {value:g}" for kind, value in conditions)]
        lines += [f"{title}:", "", *table(header, cells)]
    return lines


def time_section(part: Mapping, curves: Mapping | None) -> list[str]:
    """Times of an image; of a run where the part "curves" of the setting says how many images one takes."""
    lines = []
    for row in part["rows"]:
        runs = [other for other in curves["rows"] if other["line"] == row["line"]] if curves else []
        images = runs[0]["steps"] * runs[0]["images_per_step"] if runs else None
        cells = [f"{1000 * row[f'seconds_{name}']:.2f}" for name in ("per_image", "draw", "rollout", "update")]
        whole = [f"{images}", f"{images * row['seconds_per_image']:.0f}"] if images else ["-", "-"]
        lines.append([row["line"], *cells, *whole])
    size = part["rows"][0]["images_per_step"] if part["rows"] else 0
    return [
        f"### Milliseconds for a training image, one run alone, {size} images a step, and seconds for a whole run",
        "",
        machine_line(part),
        "",
        *table(["line", "in all", "draw", "rollout", "update", "images of a run", "seconds of a run"], lines),
    ]


def to_markdown(parts: Mapping[str, Mapping]) -> str:
    lines = ["# Learning a table", "", MEANING, ""]
    for setting in SETTINGS:
        lines += setting_section(parts, setting)
    return "\n".join(lines).rstrip() + "\n"
