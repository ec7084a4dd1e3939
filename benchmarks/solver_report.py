"""`solvers.md`: the tables of what `solvers.json` holds, and the verdict of `--check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

TABLE_NFES = (10, 20, 50)  # parallel NFE of the tables' columns, as far as they were measured
PROBLEMS = {
    "closed_form": "Mixture of Gaussians (truth known exactly)",
    "embedded": "Embedded model",
}
MEANING = (
    "Error is RMS(x - truth) / RMS(truth) of the final state, by sequential network calls (parallel NFE); lowest of a "
    "column in bold, - where a solver cannot spend that number exactly. A number behind a solver's name is its "
    "`max_order`; the EPD solvers take the untrained start table with K = 2 points."
)


def machine_line(part: Mapping) -> str:
    machine = part["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, {part['date'][:10]}: `{part['command']}`"


def labels_of(rows: Sequence[Mapping]) -> list[str]:
    """Labels in the order in which they were first measured."""
    return list(dict.fromkeys(row["variant"] for row in rows))


def number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2e}" if value < 1e-3 else f"{value:.4f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, all columns but the first set right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)] + [""]


def value_table(part: Mapping, field: str, best_of: Callable) -> list[str]:
    """One row for each variant, a column for each problem and NFE, `best_of` (min or max) of a column in bold."""
    values = {(row["problem"], row["parallel_nfe"], row["variant"]): row[field] for row in part["rows"]}
    measured = {(problem, nfe) for problem, nfe, _ in values}
    problems = list(dict.fromkeys(row["problem"] for row in part["rows"]))
    columns = [(problem, nfe) for problem in problems for nfe in TABLE_NFES if (problem, nfe) in measured]
    if not columns:
        columns = sorted(measured)[:9]
    best = {
        (problem, nfe): best_of(
            (v for (p, n, _), v in values.items() if (p, n) == (problem, nfe) and v is not None), default=None
        )
        for problem, nfe in columns
    }
    lines = []
    for label in labels_of(part["rows"]):
        cells = []
        for column in columns:
            value = values.get((*column, label), "-")
            text = value if value == "-" else number(value)
            cells.append(f"**{text}**" if value is not None and value == best[column] else text)
        lines.append([label, *cells])
    return table(["solver", *(f"{problem}, {nfe}" for problem, nfe in columns)], lines)


def error_section(name: str, part: Mapping) -> list[str]:
    doubts = [f"{problem} {number(entry['reference_error'])}" for problem, entry in part["references"].items()]
    lines = [
        f"## {PROBLEMS[name]}",
        "",
        f"Truth: {part['settings']['truth']}. The truth's own error: {'; '.join(doubts)}. {machine_line(part)}",
        "",
        *value_table(part, "error", min),
    ]
    if name == "embedded":
        truths = [f"{problem} {number(entry['reward'])}" for problem, entry in part["references"].items()]
        images = part["settings"]["images"]
        lines += [f"Mean reward of the {images} pictures (those of the truth: {'; '.join(truths)}):", ""]
        lines += value_table(part, "reward", max)
    return lines


def worst_overhead(part: Mapping) -> Mapping:
    """The row with the largest fraction of time outside the network."""
    return max(part["rows"], key=lambda row: row["fraction"])


def overhead_section(part: Mapping) -> list[str]:
    on_gpu = part["machine"]["device"] == "cuda"
    batches = sorted({row["batch"] for row in part["rows"]})
    rows = {(row["variant"], row["batch"]): row for row in part["rows"]}
    header = ["solver"]
    for batch in batches:
        header += [f"batch {batch}: share", "us/step"]
    lines = []
    for label in labels_of(part["rows"]):
        cells = [label]
        for batch in batches:
            row = rows.get((label, batch))
            cells += [f"{row['fraction']:.2%}", f"{row['outside_us_per_step']:.0f}"] if row else ["-", "-"]
        lines.append(cells)
    return [
        f"## Time around the network calls, {'GPU' if on_gpu else 'CPU'}",
        "",
        f"Share of a sampler call of {part['settings']['nodes']} nodes that is spent outside the network, embedded "
        f"model, median of {part['settings']['repeats']}. {machine_line(part)}",
        "",
        *table(header, lines),
    ]


def sync_section(part: Mapping) -> list[str]:
    lines = []
    for row in part["rows"]:
        events = [f"{owner}: {row[f'{owner}_events']}" for owner in ("solver", "network") if row[f"{owner}_events"]]
        lines.append([row["variant"], str(row["syncs"]), "; ".join(events) or "none", row["debug_mode"] or "silent"])
    return [
        "## Waiting for the GPU between the first and the last node",
        "",
        f"A planted wait is found by both methods. {machine_line(part)}",
        "",
        *table(["solver", "events", "which", "`set_sync_debug_mode('error')`"], lines),
    ]


def to_markdown(parts: Mapping[str, Mapping]) -> str:
    lines = ["# Solvers", "", MEANING, ""]
    for name in PROBLEMS:
        if name in parts:
            lines += error_section(name, parts[name])
    for name in ("overhead_cpu", "overhead_cuda"):
        if name in parts:
            lines += overhead_section(parts[name])
    if "sync" in parts:
        lines += sync_section(parts["sync"])
    return "\n".join(lines).rstrip() + "\n"


def verdicts(parts: Mapping[str, Mapping]) -> list[tuple[bool, str]]:
    """(holds, sentence) of every promise that the measured parts allow to judge."""
    found = []
    if "overhead_cpu" in parts:
        worst, limit = worst_overhead(parts["overhead_cpu"]), parts["overhead_cpu"]["settings"]["limit_cpu"]
        holds = worst["fraction"] <= limit
        found.append(
            (
                holds,
                f"time around the network calls on the CPU: at most {worst['fraction']:.2%} ({worst['variant']}, batch "
                f"{worst['batch']}); the limit of {limit:.0%} {'holds' if holds else 'is BROKEN'}",
            )
        )
    if "sync" in parts:
        bad = [row["variant"] for row in parts["sync"]["rows"] if row["syncs"] or row["debug_mode"]]
        sentence = f"in the loop of {', '.join(bad)}: BROKEN" if bad else "in no solver's loop: holds"
        found.append((not bad, f"waiting for the GPU {sentence}"))
    return found
