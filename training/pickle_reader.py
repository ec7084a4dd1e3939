"""Read a predictor snapshot (`network-snapshot-*.pkl`) as data: a pickle is parsed here, never run.

A pickle is a program for a stack machine. This module is such a machine without the dangerous half: a global becomes a
`Name`, a call becomes a `Built` record, and nothing is imported, called or instantiated. What a file may contain is an
allow-list of opcodes and names. Both layouts in use are understood: the published one (a `torch_utils.persistence`
record, whose source text is skipped) and ours (a plain `training.networks.EPD_predictor`). Their parameters are byte
strings in the legacy `torch.save` format, a second run of pickles, read by the same machine with a smaller allow-list.
"""

from __future__ import annotations

import io
import pickletools
import struct
from dataclasses import dataclass

from training.table_metadata import TableError

MAX_BYTES = 4 << 20  # 1000 rows of 250 points would fit; published files have 7 kB
MAX_OPCODES = 10_000  # published files need about 700
MAX_DEPTH = 8  # of lists and objects in one attribute
PARAMETERS = ("r_params", "weight_s", "scale_dir_params", "scale_time_params")

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of the torch.save format before the zip container
LEGACY_PROTOCOL = 1001


@dataclass(frozen=True, eq=False)
class Name:
    """A global that the file asks for; only its name, never the object."""

    module: str
    name: str


@dataclass(eq=False)
class Built:
    """What the file wants to get by calling `name` with `args`; `state` is what it wants to set on the result."""

    name: Name
    args: tuple
    state: object = None


@dataclass(frozen=True, eq=False)
class Persistent:
    """A persistent id: in legacy torch streams, the description of a storage."""

    key: object


@dataclass(frozen=True)
class Dialect:
    """The opcodes and globals that one kind of stream may use."""

    opcodes: frozenset[str]
    names: frozenset[tuple[str, str]]


_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
_COMMON = _VALUES | {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINPUT", "BINGET", "LONG_BINGET", "GLOBAL"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS"),
}
SNAPSHOT = Dialect(
    frozenset(_COMMON | {"FRAME", "MEMOIZE", "EMPTY_SET", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}),
    frozenset(
        {
            ("training.networks", "EPD_predictor"),
            ("torch_utils.persistence", "_reconstruct_persistent_obj"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch.storage", "_load_from_bytes"),
            ("torch.nn.modules.activation", "Sigmoid"),
            ("torch.nn.modules.activation", "Softmax"),
            ("collections", "OrderedDict"),
        }
    ),
)
LEGACY_TENSOR = Dialect(frozenset(_COMMON) | {"BINPERSID"}, frozenset({("torch", "FloatStorage")}))


class _Machine:
    """Parses one pickle from `stream`, which is left behind its STOP. Every fault is a `TableError`."""

    def __init__(self, stream: io.BytesIO, dialect: Dialect):
        self.stream = stream
        self.dialect = dialect
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack at each open MARK
        self.memo: dict[int, object] = {}

    def parse(self) -> object:
        for _ in range(MAX_OPCODES):
            opcode, arg = self._read()
            if opcode == "STOP":
                value = self._pop()
                if self.stack or self.marks:
                    raise TableError("damaged pickle: values are left over at its end")
                return value
            self._step(opcode, arg)
        raise TableError(f"the pickle has more than {MAX_OPCODES} opcodes, far more than a table needs")

    def _read(self) -> tuple[str, object]:
        offset = self.stream.tell()
        code = self.stream.read(1)
        if not code:
            raise TableError("the pickle is cut short")
        opcode = pickletools.code2op.get(code.decode("latin-1"))
        if opcode is None or opcode.name not in self.dialect.opcodes:
            label = f"byte 0x{code.hex()}" if opcode is None else f"opcode {opcode.name}"
            raise TableError(f"pickle {label} at offset {offset} is not allowed in a table")
        try:
            return opcode.name, opcode.arg.reader(self.stream) if opcode.arg else None
        except ValueError as err:  # pickletools reports every malformed or truncated argument so
            raise TableError(f"the pickle is damaged or cut short at offset {offset}") from err

    def _step(self, opcode: str, arg: object):
        push = self.stack.append
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case _ if opcode in _VALUES:
                push(arg)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                push({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[opcode]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([self._pop() for _ in range(int(opcode[-1]))])))
            case "APPEND" | "APPENDS":
                items = self._pop_to_mark() if opcode == "APPENDS" else [self._pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop_to_mark() if opcode == "SETITEMS" else [self._pop(), self._pop()][::-1]
                self._set_items(self._top(dict), items)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top(object)
            case "BINPUT":
                self.memo[arg] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                if arg not in self.memo:
                    raise TableError("damaged pickle: it recalls a value that it never stored")
                push(self.memo[arg])
            case "GLOBAL":
                push(self._name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._pop(str), self._pop(str)
                push(self._name(module, name))
            case "REDUCE" | "NEWOBJ":
                args, name = self._pop(tuple), self._pop(Name)
                push({} if name.name == "OrderedDict" and not args else Built(name, args))
            case "BUILD":
                state = self._pop()
                self._top(Built).state = state
            case "BINPERSID":
                push(Persistent(self._pop()))

    def _pop(self, kind: type = object):
        value = self._top(kind)
        self.stack.pop()
        return value

    def _top(self, kind: type):
        """The top of the stack above the last mark, which must be of type `kind`."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise TableError("damaged pickle: a value is missing")
        if not isinstance(self.stack[-1], kind):
            raise TableError(f"damaged pickle: found a {type(self.stack[-1]).__name__} in place of a {kind.__name__}")
        return self.stack[-1]

    def _pop_to_mark(self) -> list:
        if not self.marks:
            raise TableError("damaged pickle: a mark is missing")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def _set_items(self, target: dict, items: list):
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values) or not all(isinstance(key, str) for key in keys):
            raise TableError("damaged pickle: a dict has a key that is not a text, or a key without a value")
        target.update(zip(keys, values, strict=True))

    def _name(self, module: str, name: str) -> Name:
        if (module, name) not in self.dialect.names:
            raise TableError(
                f"the pickle asks for {_quote(f'{module}.{name}')}, which no table needs; do not open it elsewhere"
            )
        return Name(module, name)


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot file says: raw parameters, and the plain attributes beside them."""

    parameters: dict[str, list[list[float]]]  # the four of PARAMETERS, [N-1][K], float32 values
    attributes: dict[str, object]  # None, bool, int, float, str, and lists and dicts of them


def read_snapshot(data: bytes) -> Snapshot:
    """Parse the bytes of a snapshot in either layout. Raises `TableError` (one line, without the file's name)."""
    if len(data) > MAX_BYTES:
        raise TableError(f"the file has more than {MAX_BYTES} bytes, far more than a table needs")
    stream = io.BytesIO(data)
    match _Machine(stream, SNAPSHOT).parse():
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
        raise TableError(f"{name} has {len(values)} values for the shape [{_quote(rows)}, {_quote(columns)}]")
    return [list(values[start : start + columns]) for start in range(0, len(values), columns)]


def _storage(name: str, data: bytes) -> tuple[float, ...]:
    """The float32 values of a legacy `torch.save` stream with one storage: five pickles, a count, raw numbers."""
    stream = io.BytesIO(data)
    match [_Machine(stream, LEGACY_TENSOR).parse() for _ in range(5)]:
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
        raise TableError(f"attribute {_quote(name)} is nested too deeply or too large")
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_plain(name, item, budget, depth - 1) for item in value]
        case dict():
            return {key: _plain(name, item, budget, depth - 1) for key, item in value.items()}
    raise TableError(f"attribute {_quote(name)} is not a number, a text, or a list or dict of them")


def _quote(value: object) -> str:
    """A short printable form of a text or number from the file."""
    return ascii(value)[:100]
