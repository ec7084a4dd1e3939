"""Read the tensors of an MPS checkpoint as data: the published file is a pickled module, which here is never run.

`torch.save` makes a zip archive: `<name>/data.pkl`, a pickle that describes the object, and `<name>/data/<key>`, the
raw numbers of each storage. A pickle is a program for a stack machine. This module is such a machine without the
dangerous half: a global becomes a `Name`, a call becomes a `Built` record, and nothing is imported, called or
instantiated. The records of the modules are then walked for their parameters and buffers, and only of those are numbers
read. `training/pickle_reader.py` reads solver tables in the same way.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType

import torch
from torch import Tensor

from torch_utils.checkpoint import CheckpointError
from training.ppo.reward_base import looks_like, read_weights

KIND = "an MPS checkpoint"
# The published layout takes 0.3 MB, 112 000 opcodes, and 3000 parts.
MAX_PICKLE_BYTES = 4 << 20
MAX_OPCODES = 400_000
MAX_PARTS = 20_000  # modules, their entries of any kind; shared ones count each time
MAX_NAME = 500  # characters, and so the depth of modules in modules
MAX_DIMENSIONS = 8
READ_BYTES = 4 << 20  # at once; the archive's directory, which is read whole, can be no larger
# The name of the module that is pickled in a file of the `imscore` package, such as RE-N-Y/mpsv1.
IMSCORE_PREFIX = "mps."

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
# Where the names in an official checkpoint come from. Any name could be read without harm; but what asks for others is
# no MPS checkpoint, and whoever opens it elsewhere should know.
PACKAGES = ("trainer", "transformers", "torch", "collections")
SETS = (("__builtin__", "set"), ("builtins", "set"))

VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What pickles of protocol 2 are made of, in which torch writes.
OPCODES = {*VALUES, *CONSTANTS, *EMPTY, *TUPLES} | {
    *("PROTO", "STOP", "MARK", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE", "NEWOBJ"),
    *("BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}


class ReadError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
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
    """A persistent id: the description of a storage."""

    key: object


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of an MPS checkpoint under the official module's names, on the CPU; runs no code from it.

    `path` is the published `MPS_overall_checkpoint.pth`, a whole pickled module, or its state dict in a torch or a
    `.safetensors` file, with `mps.` before all names or without. Tensors keep their type and may share memory.
    Raises `CheckpointError`, one line, for a file that is damaged or is nothing of this kind.
    """
    if path.suffix == ".safetensors" or not _is_zip(path):
        state = read_weights(path, KIND)
    else:
        try:
            with _CappedFile(path) as file, zipfile.ZipFile(file) as archive:
                state = _read_archive(archive, path.stat().st_size)
        except ReadError as error:
            raise CheckpointError(f"{path} cannot be read as {KIND}: {error}") from error
        # zipfile's exceptions for damaged archives; a RuntimeError for encryption and unknown features.
        except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, OverflowError, struct.error) as error:
            reason = " ".join(ascii(str(error)).split())[:200]
            raise CheckpointError(f"{path} cannot be read as {KIND}: it is damaged ({reason})") from error
    if all(name.startswith(IMSCORE_PREFIX) for name in state):
        state = {name.removeprefix(IMSCORE_PREFIX): value for name, value in state.items()}
    if not state:
        raise CheckpointError(f"{path} is not {KIND}: it {looks_like(state)}")
    return state


def _is_zip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as {KIND}: {error.strerror}") from error


class _CappedFile(io.FileIO):
    """A file whose reads give `READ_BYTES` at most, because zipfile allocates whatever size an archive claims."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(READ_BYTES if size is None or not 0 <= size <= READ_BYTES else size)


def _read_archive(archive: zipfile.ZipFile, size: int) -> dict[str, Tensor]:
    members = {member.filename: member for member in archive.infolist()}
    for member in members.values():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ReadError("the archive is compressed, which torch never does")
    if sum(member.file_size for member in archive.infolist()) > size:
        raise ReadError("the archive claims to hold more bytes than the file has")
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ReadError(f"it holds {len(pickles)} members named data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and (order.file_size > 6 or archive.read(order) != b"little"):
        raise ReadError("its numbers are not little-endian")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise ReadError(f"its pickle has more than {MAX_PICKLE_BYTES} bytes, far more than MPS needs")
    content = _Machine(archive.read(members[pickles[0]])).parse()
    storages = _Storages(archive, members, f"{folder}data/")
    state: dict[str, Tensor] = {}
    for name, value in _named_tensors(content):
        if name in state:
            raise ReadError(f"it has two tensors named {name}")
        state[name] = storages.tensor(name, value)
    return state


class _Machine:
    """Parses one pickle; what stands behind its STOP is not looked at."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack at each open MARK
        self.memo: dict[int, object] = {}

    def parse(self) -> object:
        for _ in range(MAX_OPCODES):
            opcode, arg = self._read()
            if opcode == "STOP":
                value = self._pop()
                if self.stack or self.marks:
                    raise ReadError("damaged pickle: values are left over at its end")
                return value
            self._step(opcode, arg)
        raise ReadError(f"its pickle has more than {MAX_OPCODES} opcodes, far more than MPS needs")

    def _read(self) -> tuple[str, object]:
        offset = self.stream.tell()
        code = self.stream.read(1)
        if not code:
            raise ReadError("the pickle is cut short")
        opcode = pickletools.code2op.get(code.decode("latin-1"))
        if opcode is None or opcode.name not in OPCODES:
            label = f"byte 0x{code.hex()}" if opcode is None else f"opcode {opcode.name}"
            raise ReadError(f"its pickle has at offset {offset} the {label}, which torch does not write")
        try:
            return opcode.name, opcode.arg.reader(self.stream) if opcode.arg else None
        except ValueError as error:  # pickletools reports every malformed or truncated argument so
            raise ReadError(f"the pickle is damaged or cut short at offset {offset}") from error

    def _step(self, opcode: str, arg: object) -> None:
        push = self.stack.append
        match opcode:
            case "PROTO":
                pass
            case _ if opcode in VALUES:
                push(arg)
            case _ if opcode in CONSTANTS:
                push(CONSTANTS[opcode])
            case _ if opcode in EMPTY:
                push(EMPTY[opcode]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case _ if opcode in TUPLES:
                push(tuple([self._pop() for _ in range(TUPLES[opcode])][::-1]))
            case "APPEND" | "APPENDS":
                items = self._pop_to_mark() if opcode == "APPENDS" else [self._pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop_to_mark() if opcode == "SETITEMS" else [self._pop(), self._pop()][::-1]
                self._set_items(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                if arg not in self.memo:
                    raise ReadError("damaged pickle: it recalls a value that it never stored")
                push(self.memo[arg])
            case "GLOBAL":
                push(self._name(*arg.split(" ", 1)))
            case "REDUCE" | "NEWOBJ":
                args, name = self._pop(tuple), self._pop(Name)
                push({} if name == Name("collections", "OrderedDict") and not args else Built(name, args))
            case "BUILD":
                state, built = self._pop(), self._top(Built | dict)
                if isinstance(built, Built):  # what is set on a dict, such as a state dict's versions, is not needed
                    built.state = state
            case "BINPERSID":
                push(Persistent(self._pop()))

    def _pop(self, kind: type | UnionType = object):
        value = self._top(kind)
        self.stack.pop()
        return value

    def _top(self, kind: type | UnionType):
        """The top of the stack above the last mark, which must be of type `kind`."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ReadError("damaged pickle: a value is missing")
        if not isinstance(self.stack[-1], kind):
            raise ReadError(f"damaged pickle: a {type(self.stack[-1]).__name__} stands where it does not belong")
        return self.stack[-1]

    def _pop_to_mark(self) -> list:
        if not self.marks:
            raise ReadError("damaged pickle: a mark is missing")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def _set_items(self, items: list) -> None:
        target, keys, values = self._top(dict), items[::2], items[1::2]
        # Nothing but texts and numbers: the hash of deeply nested tuples would overflow the interpreter's stack.
        if len(keys) != len(values) or not all(isinstance(key, str | int) for key in keys):
            raise ReadError("damaged pickle: a dict has a key that is neither text nor number, or lacks a value")
        target.update(zip(keys, values, strict=True))

    def _name(self, module: str, name: str) -> Name:
        if module.split(".")[0] not in PACKAGES and (module, name) not in SETS:
            raise ReadError(
                f"it asks for {_quote(f'{module}.{name}')}, which MPS does not need; do not open it elsewhere"
            )
        return Name(module, name)


def _named_tensors(content: object) -> Iterator[tuple[str, Built]]:
    """(name, record) of every tensor of a state dict, or of every parameter and persistent buffer of a module."""
    if isinstance(content, dict):
        if not content or not all(isinstance(value, Built) for value in content.values()):
            raise ReadError(f"it {looks_like(_quote(name)[1:-1] for name in content)}")
        yield from ((_join("", name), value) for name, value in content.items())
        return
    todo, parts = [("", content)], 0
    while todo:
        prefix, module = todo.pop()
        parameters, buffers, passing, modules = _fields(prefix, module)
        parts += 1 + len(parameters) + len(buffers) + len(passing) + len(modules)
        if parts > MAX_PARTS:
            raise ReadError(f"it has more than {MAX_PARTS} modules and tensors, far more than MPS")
        for tensors, left_out in ((parameters, set()), (buffers, passing)):
            for name, value in tensors.items():
                if value is not None and name not in left_out:
                    yield _join(prefix, name), value
        # Backwards, so that the tensors come in the order of a state dict.
        todo += [(_join(prefix, name) + ".", modules[name]) for name in reversed(modules) if modules[name] is not None]


def _fields(prefix: str, module: object) -> tuple[dict, dict, set, dict]:
    """Parameters, buffers, names of the buffers that a state dict leaves out, and child modules of one record."""
    match module:
        case Built(
            state={
                "_parameters": dict(parameters),
                "_buffers": dict(buffers),
                "_non_persistent_buffers_set": Built(Name(_, "set"), ([*passing],)),
                "_modules": dict(modules),
            }
        ):
            return parameters, buffers, {name for name in passing if isinstance(name, str)}, modules
    raise ReadError(f"it is no pickled module: {prefix or 'the whole'} lacks the fields of one")


def _join(prefix: str, name: object) -> str:
    if not isinstance(name, str) or not (name.isascii() and name.isprintable()) or len(prefix + name) > MAX_NAME:
        raise ReadError(f"it has a module or tensor with the impossible name {_quote(name)}")
    return prefix + name


@dataclass
class _Storages:
    """The raw numbers in an archive, each member read once."""

    archive: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]
    folder: str
    loaded: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, record: Built) -> Tensor:
        """The tensor `name` that `record` wants to rebuild: a view of its storage."""
        match record:
            case Built(Name("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"), (inner, *_)):
                record = inner
        match record:
            case Built(
                Name("torch._utils", "_rebuild_tensor_v2"),
                (
                    Persistent(("storage", Name("torch", kind), str(key), str(), count)),
                    offset,
                    tuple(size),
                    tuple(stride),
                    *_,
                ),
            ) if kind in DTYPES:
                pass
            case _:
                raise ReadError(f"{name} is not stored as a plain tensor")
        numbers = (count, offset, *size, *stride)
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ReadError(f"{name} has an impossible shape")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise ReadError(f"{name} has an impossible shape")
        storage = self._storage(name, key, DTYPES[kind], count)
        elements, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # More elements than numbers would be a huge tensor out of a small file, by strides of 0.
        if elements > count or (elements and last >= count):
            raise ReadError(f"{name} reaches beyond its storage of {count} numbers")
        return storage.as_strided(size, stride, offset) if elements else storage.new_empty(size)

    def _storage(self, name: str, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """All numbers of one member, which must be as many as the pickle says."""
        member = self.members.get(self.folder + key)
        if member is None:
            raise ReadError(f"the numbers of {name} are missing")
        if member.file_size != count * dtype.itemsize:
            raise ReadError(f"{name} should have {count} numbers, but {member.file_size} bytes are stored")
        if key not in self.loaded:
            self.loaded[key] = self._bytes(member)
        return self.loaded[key].view(dtype)

    def _bytes(self, member: zipfile.ZipInfo) -> Tensor:
        if not member.file_size:
            return torch.empty(0, dtype=torch.uint8)
        data = bytearray(member.file_size)
        place = 0
        with self.archive.open(member) as file:
            while chunk := file.read(READ_BYTES):
                data[place : place + len(chunk)] = chunk
                place += len(chunk)
        if place != member.file_size:
            raise ReadError("its numbers are cut short")
        return torch.frombuffer(data, dtype=torch.uint8)


def _quote(value: object) -> str:
    """A short printable form of a text or number from the file."""
    return ascii(value)[:100]
