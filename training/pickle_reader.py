"""Read a predictor snapshot (`network-snapshot-*.pkl`) as data: a pickle is parsed here, never run.

`torch_utils.pickle_parser` turns it into a description, by an allow-list of opcodes and names. Both layouts in use are
understood: the published one (a `torch_utils.persistence` record, whose source text is skipped) and ours (a plain
`training.networks.EPD_predictor`). Their parameters are byte strings in the legacy `torch.save` format, a second run of
pickles with a smaller allow-list.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from torch_utils.pickle_parser import (
    CONSTANTS,
    EMPTY,
    TUPLES,
    VALUES,
    Built,
    Dialect,
    Name,
    Persistent,
    PickleError,
    parse_pickle,
    quote,
)
from training.table_metadata import TableError

MAX_BYTES = 4 << 20  # 1000 rows of 250 points would fit; published files have 7 kB
MAX_OPCODES = 10_000  # published files need about 700
MAX_DEPTH = 8  # of lists and objects in one attribute
PARAMETERS = ("r_params", "weight_s", "scale_dir_params", "scale_time_params")

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of the torch.save format before the zip container
LEGACY_PROTOCOL = 1001

_COMMON = {
    *VALUES,
    *CONSTANTS,
    *TUPLES,
    *(EMPTY.keys() - {"EMPTY_SET"}),
    *("PROTO", "STOP", "MARK", "BINPUT", "BINGET", "LONG_BINGET", "GLOBAL"),
    *("TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
}
_SNAPSHOT_NAMES = {
    ("training.networks", "EPD_predictor"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.nn.modules.activation", "Sigmoid"),
    ("torch.nn.modules.activation", "Softmax"),
    ("collections", "OrderedDict"),
}
SNAPSHOT = Dialect(
    "a table",
    frozenset(_COMMON | {"FRAME", "MEMOIZE", "EMPTY_SET", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}),
    lambda module, name: (module, name) in _SNAPSHOT_NAMES,
    MAX_OPCODES,
)
LEGACY_TENSOR = Dialect(
    "a table",
    frozenset(_COMMON | {"BINPERSID"}),
    lambda module, name: (module, name) == ("torch", "FloatStorage"),
    MAX_OPCODES,
)


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot file says: raw parameters, and the plain attributes beside them."""

    parameters: dict[str, list[list[float]]]  # the four of PARAMETERS, [N-1][K], float32 values
    attributes: dict[str, object]  # None, bool, int, float, str, and lists and dicts of them


def read_snapshot(data: bytes) -> Snapshot:
    """Parse the bytes of a snapshot in either layout. Raises `TableError` (one line, without the file's name)."""
    try:
        return _snapshot(data)
    except PickleError as error:
        raise TableError(str(error)) from error


def _snapshot(data: bytes) -> Snapshot:
    if len(data) > MAX_BYTES:
        raise TableError(f"the file has more than {MAX_BYTES} bytes, far more than a table needs")
    stream = io.BytesIO(data)
    match parse_pickle(stream, SNAPSHOT):
        case {
            "model": Built(Name("torch_utils.persistence"), ({"class_name": "EPD_predictor", "state": dict(state)},))
        }:
            pass
        case {"model": Built(Name("training.networks"), (), dict(state))}:
            pass
        case _:
            raise TableError("the pickle does not hold an EPD_predictor under 'model'")
    if stream.read(1):
        raise TableError("there are bytes after the end of the pickle")
    stored = state.get("_parameters")
    if not isinstance(stored, dict) or set(stored) != set(PARAMETERS):
        raise TableError(f"the predictor's parameters are not {', '.join(PARAMETERS)}")
    budget = iter(range(MAX_OPCODES))  # shared parts count each time, so a small file cannot unfold into a huge value
    return Snapshot(
        parameters={name: _matrix(name, stored[name]) for name in PARAMETERS},
        attributes={
            name: _plain(name, value, budget, MAX_DEPTH)
            for name, value in state.items()
            if not name.startswith("_") and name != "training"  # fields of torch.nn.Module
        },
    )


def _matrix(name: str, parameter: object) -> list[list[float]]:
    """The rows of a float32 parameter that owns a contiguous CPU storage."""
    match parameter:
        case Built(
            Name("torch._utils", "_rebuild_parameter"),
            (
                Built(
                    Name("torch._utils", "_rebuild_tensor_v2"),
                    (
                        Built(Name("torch.storage"), (bytes(data),)),
                        0,
                        (int(rows), int(columns)),
                        (int(row_stride), 1),
                        *_,
                    ),
                ),
                *_,
            ),
        ) if row_stride == columns:
            pass
        case _:
            raise TableError(f"{name} is not stored as a contiguous two-dimensional parameter")
    values = _storage(name, data)
    if rows < 1 or columns < 1 or rows * columns != len(values):
        raise TableError(f"{name} has {len(values)} values for the shape [{quote(rows)}, {quote(columns)}]")
    return [list(values[start : start + columns]) for start in range(0, len(values), columns)]


def _storage(name: str, data: bytes) -> tuple[float, ...]:
    """The float32 values of a legacy `torch.save` stream with one storage: five pickles, a count, raw numbers."""
    stream = io.BytesIO(data)
    match [parse_pickle(stream, LEGACY_TENSOR) for _ in range(5)]:
        case [
            magic,
            protocol,
            {"little_endian": True},
            Persistent(("storage", Name("torch", "FloatStorage"), str(key), str(), int(count), None)),
            [str(listed_key)],
        ] if magic == LEGACY_MAGIC and protocol == LEGACY_PROTOCOL and key == listed_key:
            pass
        case _:
            raise TableError(f"{name} is not a single little-endian float32 storage in the legacy torch format")
    numbers = stream.read()
    if len(numbers) != 8 + 4 * count or numbers[:8] != struct.pack("<q", count):
        raise TableError(f"{name} is cut short or has bytes left over")
    return struct.unpack_from(f"<{count}f", numbers, 8)


def _plain(name: str, value: object, budget, depth: int) -> object:
    """A deep copy of a value made of JSON types."""
    if depth == 0 or next(budget, None) is None:
        raise TableError(f"attribute {quote(name)} is nested too deeply or too large")
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_plain(name, item, budget, depth - 1) for item in value]
        case dict():
            return {key: _plain(name, item, budget, depth - 1) for key, item in value.items()}
    raise TableError(f"attribute {quote(name)} is not a number, a text, or a list or dict of them")
