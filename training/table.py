"""Solver tables on disk; as a program, `training.table_command`.

`SolverTable` and `TableError` are part of this module's interface.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m training.table`: at once, and as a module of its own that may import this one
    import runpy

    runpy.run_module("training.table_command", run_name="__main__")

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch

from torch_utils.checkpoint import atomic_write_bytes
from training import pickle_reader
from training.networks import EPD_predictor
from training.solver_table import ARRAYS, SolverTable
from training.table_metadata import TableError

__all__ = ["SolverTable", "TableError", "load_table", "save_table"]

MAX_BYTES = 16 << 20  # of any table file; 1000 rows of 20 points take 1.6 MB as JSON
JSON_FORMAT = "epd-solver-table-1"  # the value of "format" in a .json table and in the header of a .safetensors table
PKL_TOLERANCE = 1e-6


def load_table(path: str | os.PathLike[str]) -> SolverTable:
    """Read a table: .safetensors and .json bit for bit, .pkl (published or our own snapshot) without running any of it.

    Every failure is a `TableError` of one line that names the file.
    """
    path = Path(path)
    try:
        data = _read_bytes(path)
        return _by_suffix(path, {".safetensors": _from_safetensors, ".json": _from_json, ".pkl": _from_pkl})(data)
    except TableError as err:
        raise TableError(f"{_one_line(path)}: {err}") from err


def save_table(table: SolverTable, path: str | os.PathLike[str]) -> None:
    """Write a table atomically in the format of the suffix; missing folders are made, an existing file is replaced.

    .safetensors and .json keep every bit. .pkl is a snapshot `{"model": EPD_predictor}` with float32 logits for the
    published code; its numbers read back within 1e-6. Raises `TableError` (one line that names the file) if the table
    has a sample axis, if the format cannot hold its numbers, or if the file cannot be written.
    """
    path = Path(path)
    try:
        write = _by_suffix(path, {".safetensors": _to_safetensors, ".json": _to_json, ".pkl": _to_pkl})
        if table.is_batched:
            raise TableError(f"a file holds one table, not {len(table.positions)}; pick a sample first")
        data = write(table)
        try:
            atomic_write_bytes(path, data)
        except OSError as err:
            raise TableError(f"cannot be written: {err.strerror}") from err
    except TableError as err:
        raise TableError(f"{_one_line(path)}: {err}") from err


def _by_suffix(path: Path, functions: dict[str, Callable]) -> Callable:
    if path.suffix.lower() not in functions:
        raise TableError(f"unknown table format {path.suffix!a}; use {', '.join(functions)}")
    return functions[path.suffix.lower()]


def _one_line(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))


def _read_bytes(path: Path) -> bytes:
    if not os.path.isfile(path):  # a pipe or device may never end
        raise TableError("this is a folder, not a table file" if os.path.isdir(path) else "there is no such file")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as err:
        raise TableError(f"cannot be read: {err.strerror}") from err
    if len(data) > MAX_BYTES:
        raise TableError(f"more than {MAX_BYTES} bytes, far more than a table needs")
    return data


# --- JSON: one object with "format", the four arrays and the metadata. A float64 survives Python's shortest repr. ---


def _to_json(table: SolverTable) -> bytes:
    text = json.dumps({"format": JSON_FORMAT, **table.to_dict()}, indent=1, allow_nan=False)
    return (text + "\n").encode("ascii")


def _from_json(data: bytes) -> SolverTable:
    return SolverTable.from_dict(_json_values(data, "the file"))


def _json_values(data: bytes, where: str) -> dict:
    """The JSON object in `data` without its "format" entry."""
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise TableError(f"{where} is not valid JSON") from err
    if not isinstance(values, dict) or values.pop("format", None) != JSON_FORMAT:
        raise TableError(f'{where} is not a solver table: it has no "format": "{JSON_FORMAT}"')
    return values


# --- safetensors: the arrays as float64 tensors, the metadata as the same JSON in the header's "table" entry. ---


def _to_safetensors(table: SolverTable) -> bytes:
    header = json.dumps({"format": JSON_FORMAT, **table.metadata()}, allow_nan=False)
    return safetensors.torch.save({name: getattr(table, name) for name in ARRAYS}, {"table": header})


def _from_safetensors(data: bytes) -> SolverTable:
    try:
        entries = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as err:
        raise TableError("not a valid .safetensors file") from err
    if set(entries) != set(ARRAYS) or any(entry["dtype"] != "F64" or 0 in entry["shape"] for entry in entries.values()):
        raise TableError(f"not a solver table: the tensors are not {', '.join(ARRAYS)} in float64")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # deserialize() has checked its form
    text = (header.get("__metadata__") or {}).get("table", "{}")  # null is valid, too
    metadata = _json_values(text.encode("utf-8"), "the header's 'table' entry")
    return SolverTable.from_dict({**metadata, **safetensors.torch.load(data)})


# --- Pickle: the published snapshot layout. ---


def _to_pkl(table: SolverTable) -> bytes:
    data = pickle.dumps({"model": EPD_predictor.from_table(table).eval()}, protocol=4)  # 4 as in the published files
    try:
        stored = _from_pkl(data)
    except TableError as err:
        raise TableError(
            f"a .pkl (float32 logits) cannot hold this table: {err}; save as .safetensors or .json"
        ) from err
    for name in ARRAYS:
        error = float((getattr(stored, name) - getattr(table, name)).abs().max())
        if error > PKL_TOLERANCE:
            raise TableError(
                f"{name} would change by {error:.1e} in a .pkl (float32 logits, weights normalised to sum 1); "
                "save as .safetensors or .json"
            )
    return data


def _from_pkl(data: bytes) -> SolverTable:
    snapshot = pickle_reader.read_snapshot(data)
    return EPD_predictor.from_snapshot(snapshot.parameters, snapshot.attributes).to_table()
