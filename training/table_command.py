"""Look at solver tables: `python -m training.table show` and `diff`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_utils.errors import user_errors
from torch_utils.options import command
from torch_utils.version import VERSION

if TYPE_CHECKING:
    from training.solver_table import SolverTable

FILE = click.Path(path_type=Path)
DIFF_CODES = "Exit codes: 0 the same; 1 different; 2 one of them cannot be read, in one line; 130 Ctrl-C."
MOST_LINES = 20  # of differences that `diff` lists for each array


@click.group(context_settings={"max_content_width": 120})
@click.version_option(VERSION, message="epd-rdpo %(version)s")
def main() -> None:
    """Look at solver tables: .safetensors, .json, and .pkl, the published ones too. Nothing in a file is executed."""


@command({"Output": ("as_json",)})
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@click.option("--json", "as_json", help="One JSON object for each file instead", is_flag=True)
@user_errors
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Print tables: what each is made for, what it costs, and its numbers.

    A line for each point: its interval, the interval's noise levels (of the model's own schedule where the file has
    none), the point's own, position, weight and scales. Example:

    \b
    python -m training.table show exps/<run>/export/*.safetensors
    """
    from training.table import load_table

    for number, path in enumerate(files):
        table = load_table(path)
        if as_json:
            click.echo(json.dumps(as_record(table, path), allow_nan=False))
        else:
            click.echo("\n" * bool(number) + "\n".join(describe(table, path)))


@command({"Comparison": ("tolerance",), "Output": ("as_json",)}, exit_codes=DIFF_CODES)
@click.argument("first", metavar="A", type=FILE)
@click.argument("second", metavar="B", type=FILE)
@click.option("--tolerance", help="Numbers that are no farther apart are the same", default=0.0, metavar="X")
@click.option("--json", "as_json", help="One JSON object instead", is_flag=True)
@user_errors
def diff(first: Path, second: Path, tolerance: float, as_json: bool) -> None:
    """Compare two tables, B with A.

    A .pkl holds float32 logits: the same table in another format differs from it by some 1e-8. Example:

    \b
    python -m training.table diff start.pkl exps/<run>/export/network-snapshot-export-step000070.pkl
    """
    from training.table import load_table

    found = compare(load_table(first), load_table(second), tolerance)
    if as_json:
        click.echo(json.dumps({"a": str(first), "b": str(second), **found}, allow_nan=False))
    else:
        click.echo("\n".join(describe_difference(found, first, second)))
    sys.exit(0 if found["same"] else 1)


main.add_command(show)
main.add_command(diff)


def as_record(table: SolverTable, path: Path) -> dict[str, Any]:
    """Everything `show` tells as plain JSON values; `sigmas` is None where only the model's weights would tell."""
    from training.table_facts import table_cost, table_sigmas

    facts = {"file": str(path), "sha256": table.sha256(), **asdict(table_cost(table)), "sigmas": table_sigmas(table)}
    return facts | table.to_dict()


def describe(table: SolverTable, path: Path) -> Iterator[str]:
    """The lines of `show`."""
    record = as_record(table, path)
    yield record["file"]
    facts = {"sha256": record["sha256"]}
    facts["evaluations"] = ", ".join(f"{name} {record[name]}" for name in ("nfe", "parallel_nfe", "forwards"))
    facts |= {name: shown(value) for name, value in table.metadata().items()}
    width = max(map(len, facts))
    yield from (f"  {name.ljust(width)}  {value}" for name, value in facts.items())
    yield ""
    yield from aligned(point_rows(record))


def point_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """A heading and a row of cells for each point of each interval."""
    sigmas = record["sigmas"]
    noise = [] if sigmas is None else ["from sigma", "to sigma", "at sigma"]
    yield ["interval", *noise[:2], "point", *noise[2:], "position", "weight", "scale_dir", "scale_time"]
    arrays = [record[name] for name in ("positions", "weights", "scale_dir", "scale_time")]
    for row, columns in enumerate(zip(*arrays, strict=True)):
        for point, values in enumerate(zip(*columns, strict=True)):
            cells = [f"{value:.6f}" for value in values]
            if sigmas is None:
                yield [str(row), str(point), *cells]
                continue
            start, end = sigmas[row : row + 2]
            at = end ** values[0] * start ** (1 - values[0]) if end > 0 else 0.0
            yield [str(row), f"{start:.5g}", f"{end:.5g}", str(point), f"{at:.5g}", *cells]


def compare(a: SolverTable, b: SolverTable, tolerance: float) -> dict[str, Any]:
    """What differs: `same`, `metadata` {name: [of a, of b]}, `arrays` {name: its differences}, plain JSON values.

    An array's are `largest` |b - a| and `points`, [interval, point, of a, of b] of all that differ by more than
    `tolerance`, the largest first; None for all arrays where the tables are not of one shape.
    """
    others = b.metadata()
    metadata = {name: [value, others[name]] for name, value in a.metadata().items() if value != others[name]}
    if a.positions.shape != b.positions.shape:
        return {"same": False, "metadata": metadata, "arrays": None}
    arrays = {}
    mine, theirs = a.to_dict(), b.to_dict()
    for name in ("positions", "weights", "scale_dir", "scale_time"):
        points = [
            [row, point, *pair]
            for row, pairs in enumerate(zip(mine[name], theirs[name], strict=True))
            for point, pair in enumerate(zip(*pairs, strict=True))
            if abs(pair[1] - pair[0]) > tolerance
        ]
        if points:
            points.sort(key=lambda entry: -abs(entry[3] - entry[2]))
            arrays[name] = {"largest": abs(points[0][3] - points[0][2]), "points": points}
    return {"same": not metadata and not arrays, "metadata": metadata, "arrays": arrays}


def describe_difference(found: dict[str, Any], first: Path, second: Path) -> Iterator[str]:
    """The lines of `diff`."""
    yield f"A  {first}"
    yield f"B  {second}"
    if found["same"]:
        yield "the same numbers and the same metadata"
    if found["metadata"]:
        yield ""
        rows = [[name, shown(a), shown(b)] for name, (a, b) in found["metadata"].items()]
        yield from aligned([["metadata", "A", "B"], *rows])
    if found["arrays"] is None:
        yield ""
        yield "the tables have other numbers of intervals or points: their numbers cannot be compared"
    for name, differences in (found["arrays"] or {}).items():
        points = differences["points"]
        yield ""
        left = f", the {MOST_LINES} largest" if len(points) > MOST_LINES else ""
        yield f"{name}: {len(points)} differ, by {differences['largest']:.3g} at most{left}"
        heading = ["interval", "point", "A", "B", "B - A"]
        rows = [[str(i), str(k), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.3g}"] for i, k, a, b in points[:MOST_LINES]]
        yield from aligned([heading, *rows])


def shown(value: object) -> str:
    """A metadata value on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def aligned(rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    """Rows of cells as lines, columns to the right, two blanks between and before them."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


if __name__ == "__main__":
    main(prog_name="python -m training.table")
