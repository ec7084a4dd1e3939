"""A run as one HTML page that needs nothing else: no script, no network, pictures and curves inside."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from training.images import ImageError
from training.ppo.comparison_page import embedded_picture, scores_tables
from training.ppo.config import REWARD_NAMES, Config, flatten, trained_rewards
from training.ppo.report_charts import Curve, line_chart, number, table_picture, thinned
from training.ppo.report_run import Log, Run
from training.solver_table import SolverTable
from training.table_facts import table_cost, table_sigmas

# The first line of every report, by which one is known again.
PAGE_START = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="generator" content="training.ppo.report">'
)
# Has the browser refuse what is not in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_GRIDS = 6  # sample pictures on the page
LONGEST_SIDE = 960  # of each, in pixels
MOST_ROWS = 40  # of a table of numbers over the steps
LOW, HIGH = "_ci95_low", "_ci95_high"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft-ink: #5b6570; --paper: #fff; --card: #f6f7f9; --line: #d9dee4;
  --c0: #2463c9; --c1: #c2571a; --win: #1d7f49; --loss: #b83a26; --warn: #fff4d6; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft-ink: #a0aab5; --paper: #14171b; --card: #1d2127;
  --line: #363d46; --c0: #78abff; --c1: #ff9e5e; --win: #5bc98a; --loss: #ff8a75; --warn: #43371a; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1120px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .4rem 0 .8rem; }
.lead, .note, .source, figcaption { color: var(--soft-ink); } .note, .source, figcaption { font-size: .85rem; }
.source::before { content: "from "; } code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; }
.source code, .note code { overflow-wrap: anywhere; }
.state { background: var(--warn); border-radius: .5rem; padding: .6rem .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem;
  margin: 1.4rem 0 .4rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem .9rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; color: var(--soft-ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem; }
.card svg { display: block; width: 100%; height: auto; }
.card .now { font-variant-numeric: tabular-nums; margin: 0; } .key { font-size: .85rem; margin: .2rem 0 0; }
.key i { display: inline-block; width: 1.1em; height: .25em; vertical-align: middle; margin: 0 .4em 0 0; }
.key i.c0 { background: var(--c0); } .key i.c1 { background: var(--c1); } .key span { display: inline-block;
  margin-right: 1em; }
svg text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft-ink); }
.grid { stroke: var(--line); fill: none; } .axis { stroke: var(--soft-ink); fill: none; }
.mark { stroke: var(--soft-ink); stroke-dasharray: 3 4; fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .band { opacity: .18; stroke: none; }
.line.c0 { stroke: var(--c0); } .band.c0, .dot.c0 { fill: var(--c0); }
.line.c1 { stroke: var(--c1); } .band.c1, .dot.c1 { fill: var(--c1); }
svg.table { width: 100%; min-width: 640px; height: auto; display: block; }
svg.table .name { font-weight: 600; fill: var(--ink); } svg.table .value { font-variant-numeric: tabular-nums; }
circle.new { fill: var(--c0); stroke: var(--paper); } text.new { fill: var(--c0); font-weight: 600; }
circle.old { fill: none; stroke: var(--soft-ink); stroke-width: 1.5; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.wide td { white-space: normal; overflow-wrap: anywhere; text-align: left; } .wide th { text-align: left; }
.changed td { font-weight: 600; } tr.reference { background: var(--soft); }
.win { color: var(--win); } .loss { color: var(--loss); }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
figure { margin: 0; } .grids img { width: 100%; border-radius: .4rem; display: block; }
.small img { image-rendering: pixelated; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .8rem 0; } summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } h2 { break-after: avoid; }
  .card, .tile, figure, tr { break-inside: avoid; } .scroll { overflow: visible; } }
""".strip()


def to_page(run: Run, comparison: dict[str, Any] | None = None, scores: Sequence[Path] = ()) -> str:
    """The page of `run`; `comparison` is a `compare` with a reference of the score files `scores`."""
    parts = [
        *_head(run),
        "<main>",
        *_curves(run),
        *_table(run),
        *_samples(run),
        *_baselines(run, comparison, scores),
        *_use(run),
        *_configuration(run.config),
        "</main>",
    ]
    title = _text(f"{run.config.run.run_name}: report")
    return (
        f'{PAGE_START}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    """Escaped, for between tags and in quoted attributes."""
    return html.escape(str(value))


def _source(*files: str, more: str = "") -> str:
    return f'<p class="source">{", ".join(f"<code>{_text(file)}</code>" for file in files)}{more}</p>'


def _section(name: str, title: str) -> str:
    return f'<h2 id="{name}">{title}</h2>'


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts."""
    lines = ["".join(f"<th>{_text(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{kind}">\n{body}\n</table></div>'


# --- The head ---


def _head(run: Run) -> Iterator[str]:
    config, done, steps = run.config, run.steps_done, run.config.ppo.steps
    rewards = " + ".join(trained.type for trained in trained_rewards(config.reward))
    yield f"<header><h1>{_text(config.run.run_name)}</h1>"
    yield (
        f'<p class="lead">{_text(config.trainer.algorithm)} on {_text(config.model.dataset_name)}, trained on '
        f"{_text(rewards)}; run folder <code>{_text(run.path.resolve().name)}</code></p>"
    )
    if done < steps:
        yield (
            f'<p class="state" id="state">Unfinished: {done} of {steps} steps are done. This page shows what there is '
            "so far; the same command writes it anew.</p>"
        )
    else:
        yield f'<p id="state">Finished: all {steps} steps are done.</p>'
    for log in (run.metrics, run.evaluations):
        if log.unread:
            yield f'<p class="state">{log.unread} lines of <code>{_text(log.file)}</code> could not be read.</p>'
    tiles = list(_tiles(run))
    if tiles:
        yield '<div class="tiles">'
        yield from (f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>' for value, what in tiles)
        yield "</div>"
        yield _source(run.metrics.file, run.evaluations.file)
    yield "</header>"


def _tiles(run: Run) -> Iterator[tuple[str, str]]:
    judged = run.evaluations.having("reward_mean")
    if judged:
        shown = judged[-1]
        if run.learned is not None:
            shown = next((record for record in judged if record["step"] == run.learned.step), shown)
        yield _interval(shown, "reward"), f"held-out reward of the mean table, step {shown['step']}"
        if judged[0]["step"] == 0 and shown is not judged[0]:
            yield _interval(judged[0], "reward"), "the same of the start table"
    if run.metrics.records:
        last = run.metrics.records[-1]
        if "images" in last:
            yield number(last["images"]), f"training images in {last['step']} steps"
        seconds = sum(record["seconds_step"] for record in run.metrics.having("seconds_step"))
        seconds += sum(record["seconds"] for record in run.evaluations.having("seconds"))
        if seconds:
            yield _duration(seconds), "of steps and evaluations"


def _interval(record: dict[str, Any], name: str) -> str:
    """`mean ± half the interval` of a record, as far as it has them."""
    mean, low, high = (record.get(name + end) for end in ("_mean", LOW, HIGH))
    if mean is None:
        return ""
    return f"{mean:.4f}" if low is None or high is None else f"{mean:.4f} ± {(high - low) / 2:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- Curves ---


def _curves(run: Run) -> Iterator[str]:
    yield _section("curves", "Curves")
    if not run.metrics.records and not run.evaluations.records:
        yield "<p>Nothing has been logged yet.</p>"
        return
    best = None if run.learned is None else run.learned.step
    yield (
        "<p class=\"note\">Bands are 95 % intervals of the mean (Student's t): over the step's prompts in training, "
        "over the held-out prompts in evaluations, which judge the mean table on the same prompts and noise each time. "
        + ("" if best is None else f"The dashed line is step {best}, whose table is the result. ")
        + "Curves of more than 300 points show 300 of them, evenly spread.</p>"
    )
    yield '<div class="charts">'
    training = _curve(run.metrics, "reward", "training, sampled tables", dots=False)
    if run.config.trainer.algorithm == "pathwise":
        training = _curve(run.metrics, "reward", "training", dots=False)
    judged = _curve(run.evaluations, "reward", "held-out prompts, mean table")
    yield from _card("Reward", [curve for curve in (judged, training) if curve], best, run.evaluations, run.metrics)
    names = dict.fromkeys(key.removesuffix("_mean") for record in run.evaluations.records for key in record)
    for name in names:
        curve = _curve(run.evaluations, name, "held-out prompts, mean table")
        if name != "reward" and curve:
            yield from _card(f"Held-out metric: {name}", [curve], best, run.evaluations)
    for key, title in (
        ("kl", "KL to the start policy"),
        ("clip_fraction", "Clip fraction"),
        ("entropy", "Entropy of the policy"),
        ("images_per_second", "Images per second"),
    ):
        records = run.metrics.having(key)
        curve = Curve(key, [record["step"] for record in records], [record[key] for record in records])
        yield from _card(title, [curve] if records else [], best, run.metrics)
    yield "</div>"
    yield from _numbers(run)


def _curve(log: Log, name: str, label: str, dots: bool = True) -> Curve | None:
    """The curve of `<name>_mean` with its interval; None where the log has none of it."""
    records = log.having(f"{name}_mean")
    steps, means = [record["step"] for record in records], [record[f"{name}_mean"] for record in records]
    lows, highs = ([record.get(name + end) for record in records] for end in (LOW, HIGH))
    return Curve(label, steps, means, lows, highs, dots) if records else None


def _card(title: str, curves: Sequence[Curve], mark: int | None, *logs: Log) -> Iterator[str]:
    """A chart with its last value; nothing where there are no curves, as of the clip fraction in pathwise runs."""
    if not curves:
        return
    shown = curves[0]
    yield f'<section class="card"><h3>{_text(title)}</h3>'
    yield f'<p class="now"><b>{number(shown.values[-1])}</b> at step {shown.steps[-1]}</p>'
    yield line_chart(title, curves, mark)
    if len(curves) > 1:
        keys = (f'<span><i class="c{i}"></i>{_text(curve.label)}</span>' for i, curve in enumerate(curves))
        yield f'<p class="key">{"".join(keys)}</p>'
    yield _source(*(log.file for log in logs))
    yield "</section>"


def _numbers(run: Run) -> Iterator[str]:
    """The tables below the curves."""
    names = [
        key.removesuffix("_mean")
        for key in dict.fromkeys(key for record in run.evaluations.records for key in record)
        if key.endswith("_mean")
    ]
    if names:
        records = [run.evaluations.records[i] for i in thinned(len(run.evaluations.records), MOST_ROWS)]
        rows = []
        for record in records:
            means = (_interval(record, name) for name in names)
            flag = "yes" if record.get("diverging") else ""
            rows.append([str(record["step"]), _cell(record, "prompts"), *means, flag])
        yield "<details open><summary>Evaluations in numbers</summary>"
        yield _rows(["step", "prompts", *names, "diverging"], rows)
        yield _source(run.evaluations.file) + "</details>"
    if run.metrics.records:
        keys = ("kl", "clip_fraction", "entropy", "learning_rate", "images_per_second")
        records = [run.metrics.records[i] for i in thinned(len(run.metrics.records), MOST_ROWS)]
        rows = [
            [str(record["step"]), _interval(record, "reward"), *(_cell(record, key) for key in keys)]
            for record in records
        ]
        yield "<details><summary>Steps in numbers</summary>"
        yield _rows(["step", "reward", *keys], rows)
        left = f": {len(rows)} of its {len(run.metrics.records)} lines" if len(rows) < len(run.metrics.records) else ""
        yield _source(run.metrics.file, more=left) + "</details>"


def _cell(record: dict[str, Any], key: str) -> str:
    return number(record[key]) if key in record else ""


# --- The table ---


def _table(run: Run) -> Iterator[str]:
    yield _section("table", "The table, before and after")
    start_file = "configs/start_table.safetensors"
    after = run.start if run.learned is None else run.learned.table
    if run.learned is None:
        yield f'<p class="state">There is no learned table yet, so this is the start table: {_text(run.problem)}</p>'
    cost, sigmas = table_cost(after), table_sigmas(after)
    yield (
        f"<p>{len(after.positions)} intervals of {after.num_points} points each, schedule "
        f"<code>{_text(after.schedule_type)}</code>; an image costs {cost.parallel_nfe} sequential network calls, "
        f"{cost.nfe} evaluations. At each point of an interval the network gives a slope; the step follows their mean "
        "by weight.</p>"
    )
    if run.learned is not None:
        yield (
            f'<p class="key"><span style="color:var(--c0)">● after {run.learned.step} steps</span>'
            "<span>○ start table</span> the area of a disc is its weight w</p>"
        )
    old = run.start.positions.tolist(), run.start.weights.tolist()
    new = after.positions.tolist(), after.weights.tolist()
    yield f'<div class="scroll">{table_picture(*old, *new, sigmas)}</div>'
    yield f"<details{' open' if after.positions.numel() <= MOST_ROWS else ''}><summary>All numbers</summary>"
    yield _rows(*_points(run.start, after))
    yield "</details>"
    files = [start_file] if run.learned is None else [start_file, run.learned.file]
    yield _source(*files, more=f"; SHA-256 of the table after: <code>{after.sha256()}</code>")


def _points(before: SolverTable, after: SolverTable) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of all numbers, a row for each point; scales that are 1 in both tables are left out."""
    old, new = before.to_dict(), after.to_dict()
    names = {"positions": "position", "weights": "weight"}
    names |= {name: name for name in ("scale_dir", "scale_time") if _is_scaled(old[name]) or _is_scaled(new[name])}
    heads = [head for name in names.values() for head in (f"{name} before", "after")]
    rows = []
    for row, points in enumerate(new["positions"]):
        for point in range(len(points)):
            cells = [f"{table[name][row][point]:.6f}" for name in names for table in (old, new)]
            rows.append([str(row), str(point), *cells])
    return ["interval", "point", *heads], rows


def _is_scaled(values: list[list[float]]) -> bool:
    return any(value != 1 for row in values for value in row)


# --- Samples ---


def _samples(run: Run) -> Iterator[str]:
    yield _section("samples", "Samples over training")
    if not run.samples:
        yield "<p>This run has written no sample pictures (<code>evaluation.grid_images</code>, evaluations).</p>"
        return
    steps = list(run.samples)
    chosen = [steps[i] for i in thinned(len(steps), MOST_GRIDS)]
    left = f"{len(chosen)} of {len(steps)} evaluations are shown. " if len(chosen) < len(steps) else ""
    yield (
        f'<p class="note">The same held-out prompts and the same noise (<code>evaluation.seed</code> '
        f"{run.config.evaluation.seed}) with the mean table of each step. {left}Pictures of more than {LONGEST_SIDE} "
        "pixels are shown smaller than they are in the run folder.</p>"
    )
    yield '<div class="grids">'
    for step in chosen:
        yield _figure(run, step)
    yield "</div>"
    yield _source(*(f"samples/{run.samples[step].name}" for step in chosen))


def _figure(run: Run, step: int) -> str:
    try:
        data, size = embedded_picture(run.samples[step], LONGEST_SIDE)
    except ImageError as error:
        return f'<figure><p class="state">{_text(error)}</p></figure>'
    small = ' class="small"' if size < 300 else ""
    judged = [record for record in run.evaluations.having("reward_mean") if record["step"] == step]
    reward = f", reward {_interval(judged[0], 'reward')}" if judged else ""
    picture = f'<img alt="samples at step {step}" src="{data}">'
    return f"<figure{small}>{picture}<figcaption>step {step}{reward}</figcaption></figure>"


# --- Baselines, use, configuration ---


def _baselines(run: Run, comparison: dict[str, Any] | None, scores: Sequence[Path]) -> Iterator[str]:
    yield _section("baselines", "Comparison with baselines")
    if comparison is not None:
        yield scores_tables(comparison)
        yield _source(*map(str, scores), more=f"; {comparison['count']} images in each folder")
        return
    yield (
        "<p>No scores were given. Sample with the learned table and with other solvers, score the folders, and write "
        "this page again with the score files, the learned table's first:</p>"
    )
    model, prompts = run.config.model, _prompt_file(run.config)
    judges = [trained.type for trained in trained_rewards(run.config.reward)] + run.config.evaluation.metrics
    judges = [judge for judge in judges if judge in REWARD_NAMES] or ["METRIC"]
    files = [f"--scores results/{folder}-{judge}.json" for judge in judges for folder in ("learned", "ddim")]
    yield _commands(
        f"python sample_baseline.py --sampler ddim --dataset-name {shlex.quote(model.dataset_name)} --num-steps "
        f"{table_cost(run.start).parallel_nfe + 1} --schedule-type {model.schedule_type} --prompt-file {prompts} "
        "--seeds 0-63 --outdir samples/ddim",
        "python -m training.ppo.scripts.score_all --images samples/learned samples/ddim "
        f"--metrics {','.join(judges)} --output-json results/comparison.json",
        f"python -m training.ppo.report {shlex.quote(str(run.path))} {' '.join(files)}",
    )


def _prompt_file(config: Config) -> str:
    return shlex.quote(config.evaluation.prompt_file or "FILE")


def _use(run: Run) -> Iterator[str]:
    yield _section("use", "How to use the result")
    if run.learned is None:
        yield "<p>There is no checkpoint yet; the commands below work once there is one.</p>"
    step = run.config.ppo.steps if run.learned is None else run.learned.step
    folder = shlex.quote(str(run.path))
    table = shlex.quote(str(run.path / "export" / f"network-snapshot-export-step{step:06d}.safetensors"))
    yield (
        "<p>Export the table (<code>.safetensors</code> with every bit, and a <code>.pkl</code> that the published EPD "
        "sampler opens), look at it, and sample with it:</p>"
    )
    yield _commands(
        f"python -m training.ppo.export_epd_predictor {folder}",
        f"python -m training.table show {table}",
        f"python sample.py --predictor_path {table} --prompt-file {_prompt_file(run.config)} --seeds 0-63 "
        "--outdir samples/learned",
    )


def _commands(*lines: str) -> str:
    return f"<pre><code>{_text(chr(10).join(lines))}</code></pre>"


def _configuration(config: Config) -> Iterator[str]:
    yield _section("configuration", "Configuration")
    values, defaults = flatten(config), flatten(Config())
    changed = {key for key, value in values.items() if value != defaults[key]}
    yield "<p>What differs from the defaults:</p>"
    rows = ([key, _value(values[key]), _value(defaults[key])] for key in values if key in changed)
    yield _rows(["key", "value", "default"], rows, kind="wide")
    yield f"<details><summary>All {len(values)} keys</summary>"
    yield _rows(["key", "value"], ([key, _value(value)] for key, value in values.items()), kind="wide")
    yield "</details>"
    yield _source("configs/resolved_config.yaml")


def _value(value: object) -> str:
    """As the configuration file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
