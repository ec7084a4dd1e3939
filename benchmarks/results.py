"""A benchmark's JSON file: parts that were measured on possibly different machines, each with its own record of how."""

from __future__ import annotations

import ast
import contextlib
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_utils.errors import UserError

FORMAT = 1
IDENTITY = ("machine", "settings", "solver_code")  # what all rows of a part share
SAVE_EVERY = 5.0  # seconds between two writes of the file
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Benchmark:
    """What tells one benchmark's results from another's."""

    name: str  # of its files: <name>.json, <name>.md, <name>.png
    module: str  # its command is `python -m <module>`
    code: tuple[str, ...]  # files below ROOT that decide the figures


class ResultsError(UserError):
    """A results file that cannot be read or continued."""


def choose(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The names in the comma-separated `text`, in the order of `known`; all of them for "all". Raises UserError."""
    if text in ("all", "none"):
        return list(known) if text == "all" else []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown name '{name}'; use all, or some of {', '.join(known)}")
    return [name for name in known if name in names]


def cpu_name() -> str:
    """Model name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict:
    """What the figures of a part depend on beside its settings; `gpu` is None for what runs on the CPU."""
    import torch

    return {
        "device": device,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
    }


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command to give for the same measurement; where its folders lie is nobody's business."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--outdir", "--models"):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return shlex.join(["python", "-m", module, *kept])


def code_hash(files: Sequence[str]) -> str:
    """Hash of the code in `files` (below ROOT) that decides the figures, without comments and docstrings, so that
    other code's do not pass for this one's."""
    trees = [ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in files]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
    return hashlib.sha256("".join(ast.dump(tree) for tree in trees).encode()).hexdigest()[:16]


def _part_text(part: dict) -> str:
    """JSON of a part with one line for each row and each reference."""
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in part["rows"])
    references = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in part["references"].items()
    )
    head = {name: value for name, value in part.items() if name not in ("rows", "references")}
    text = json.dumps(head, indent=1, allow_nan=False)[:-2]
    return f'{text},\n "references": {{\n{references}\n}},\n "rows": [\n{rows}\n]}}'


class Part:
    """The rows of one part. `record` is its entry in the file."""

    def __init__(self, record: dict, added: Callable[[], None]):
        self.record, self._added = record, added
        self.rows: list[dict] = record["rows"]
        self.references: dict[str, dict] = record["references"]

    def has(self, **values: object) -> bool:
        """Whether a row with these values is there."""
        return any(all(row[name] == value for name, value in values.items()) for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self._added()

    def fingerprint(self) -> str:
        """Of everything that rows must share to stand in one part."""
        text = json.dumps([self.record[name] for name in IDENTITY], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Results:
    """`<outdir>/<name>.json`, read at the start and written after measurements, at most every SAVE_EVERY seconds.

    Of several processes that measure together one writes; the others have `writes=False`.
    """

    def __init__(self, outdir: Path, benchmark: Benchmark, writes: bool = True):
        self.path = outdir / f"{benchmark.name}.json"
        self.writes = writes
        self.benchmark = benchmark
        self.parts: dict[str, dict] = {}
        self._saved = time.monotonic()
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known, self.parts = content["format"] == FORMAT, content["parts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{self.path} is not a results file of this benchmark; use another --outdir") from error
        if not known:
            raise ResultsError(f"{self.path} has another format; use another --outdir")

    def part(self, name: str, device: str, settings: dict, overwrite: bool) -> Part:
        """The part to fill: the one in the file, or an empty one where there is none or with `overwrite`.

        Raises ResultsError for a part that was measured on another machine, with other settings or with other code.
        """
        fresh = {
            "machine": machine(device),
            "settings": settings,
            "solver_code": code_hash(self.benchmark.code),
            "command": command_line(self.benchmark.module, sys.argv[1:]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "references": {},
            "rows": [],
        }
        fresh = json.loads(json.dumps(fresh))  # as it reads back

        def added() -> None:
            self.parts[name] = fresh  # not before there is something to put in the old part's place
            if time.monotonic() - self._saved > SAVE_EVERY:
                self.save()

        part = Part(fresh, added)
        old = self.parts.get(name)
        if old is not None and not overwrite:
            differing = [key for key in IDENTITY if old[key] != fresh[key]]
            if differing:
                raise ResultsError(
                    f"{self.path} has the part {name} with another {differing[0]}: use another --outdir, or measure it "
                    "anew with --overwrite"
                )
            part.rows += old["rows"]
            part.references |= old["references"]
        return part

    def take_over(self, other: Results, key: Callable[[dict], object]) -> None:
        """Add what another file holds; of a part in both, the references and the rows whose `key` is not there yet.

        Raises ResultsError for a part that was measured otherwise than the one here.
        """
        for name, part in other.parts.items():
            own = self.parts.setdefault(name, {**part, "rows": [], "references": {}})
            differing = [key for key in IDENTITY if own[key] != part[key]]
            if differing:
                raise ResultsError(f"{other.path} and {self.path} have the part {name} with another {differing[0]}")
            known = {key(row) for row in own["rows"]}
            own["rows"] += [row for row in part["rows"] if key(row) not in known]
            own["references"] |= part["references"]

    def save(self) -> None:
        if not self.writes:
            return
        from torch_utils.checkpoint import atomic_write_text  # needs torch, which --help does not

        parts = ",\n".join(f"{json.dumps(name)}: {_part_text(self.parts[name])}" for name in sorted(self.parts))
        atomic_write_text(self.path, f'{{"format": {FORMAT}, "parts": {{\n{parts}\n}}}}\n')
        self._saved = time.monotonic()


def make_folder(option: str, folder: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {option} {folder}: {error.strerror}") from error


def open_results(outdir: Path, benchmark: Benchmark, locks: contextlib.ExitStack) -> Results:
    """The results in `outdir`, which is made where it is missing and ours until `locks` closes. Raises UserError."""
    from torch_utils.checkpoint import lock_folder  # needs torch, which --help does not

    make_folder("--outdir", outdir)
    if not lock_folder(outdir, locks):
        raise UserError(f"another process writes to {outdir}; choose another --outdir")
    return Results(outdir, benchmark)


def reached(row: dict) -> bool:
    """Whether a row of figures (see `figures_table`) is within what is to be reached, if anything is."""
    return row["to_reach"] is None or row["value"] <= row["to_reach"]


def figures_table(parts: dict[str, dict], settings_text: Callable[[dict], str]) -> str:
    """A Markdown table of the rows of all parts: figure, value, unit, to_reach and note.

    Below it stands how each part was measured, with `settings_text` of its settings behind machine and library.
    """
    lines = ["| figure | measured | to reach | |", "|---|---|---|---|"]
    for part in parts.values():
        for row in part["rows"]:
            unit = f" {row['unit']}" if row["unit"] else ""
            wanted = "" if row["to_reach"] is None else f"at most {_number(row['to_reach'])}{unit}"
            wanted += "" if reached(row) else " (missed)"
            lines.append(f"| {row['figure']} | {_number(row['value'])}{unit} | {wanted} | {row['note']} |")
    lines.append("")
    for name, part in parts.items():
        machine = part["machine"]
        how = f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}{settings_text(part['settings'])}"
        lines.append(f"* {name}: {how}: `{part['command']}`")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 200 else f"{value:.3g}"
