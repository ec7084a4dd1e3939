"""Pickles parsed as data: what a file would build is described, and nothing of it is done.

A pickle is a program for a stack machine. This module is such a machine without the dangerous half: a global becomes a
`Name`, a call becomes a `Built` record, and nothing is imported, called or instantiated. What a file may contain is an
allow-list of opcodes and names.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, BinaryIO

OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
    }
)
# What torch writes, in protocol 2.
TORCH_OPCODES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
        *CONSTANTS,
        *TUPLES,
        *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
        *("PROTO", "STOP", "MARK", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE", "NEWOBJ"),
        *("BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    }
)


class PickleError(ValueError):
    """What is wrong with a pickle, in one line, without the name of its file."""


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
    """A persistent id: in torch's files, the description of a storage."""

    key: object


@dataclass(frozen=True)
class Dialect:
    """What one kind of pickle may use.

    kind         names it in messages, e.g. "a table".
    opcodes      names as in `pickletools`; those of VALUES, CONSTANTS, EMPTY, TUPLES and TORCH_OPCODES can be allowed,
                 and FRAME, MEMOIZE, STACK_GLOBAL.
    allows       whether it may ask for a global, by module and name.
    max_opcodes  how many there may be.
    keys         types of the keys of dicts. Hashes of deeply nested tuples would overflow the interpreter's stack.
    """

    kind: str
    opcodes: frozenset[str]
    allows: Callable[[str, str], bool]
    max_opcodes: int
    keys: type | UnionType = str


def parse_pickle(stream: BinaryIO, dialect: Dialect) -> object:
    """What the pickle at the position of `stream`, which is left behind its STOP, describes. Raises `PickleError`."""
    return _Machine(stream, dialect).parse()


def quote(value: object) -> str:
    """A short printable form of a text or number from a file."""
    return ascii(value)[:100]


class _Machine:
    def __init__(self, stream: BinaryIO, dialect: Dialect):
        self.stream = stream
        self.dialect = dialect
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack at each open MARK
        self.memo: dict[int, object] = {}

    def parse(self) -> object:
        for _ in range(self.dialect.max_opcodes):
            opcode, arg = self._read()
            if opcode == "STOP":
                value = self._pop()
                if self.stack or self.marks:
                    raise PickleError("damaged pickle: values are left over at its end")
                return value
            self._step(opcode, arg)
        raise PickleError(
            f"the pickle has more than {self.dialect.max_opcodes} opcodes, far more than {self.dialect.kind} needs"
        )

    def _read(self) -> tuple[str, Any]:
        """Name and argument of the next opcode; the kind of the argument is the opcode's."""
        offset = self.stream.tell()
        code = self.stream.read(1)
        if not code:
            raise PickleError("the pickle is cut short")
        opcode = OPCODES.get(code.decode("latin-1"))
        if opcode is None or opcode.name not in self.dialect.opcodes:
            label = f"byte 0x{code.hex()}" if opcode is None else f"opcode {opcode.name}"
            raise PickleError(f"pickle {label} at offset {offset} is not allowed in {self.dialect.kind}")
        try:
            return opcode.name, opcode.arg.reader(self.stream) if opcode.arg else None
        except ValueError as error:  # pickletools reports every malformed or truncated argument so
            raise PickleError(f"the pickle is damaged or cut short at offset {offset}") from error

    def _step(self, opcode: str, arg: Any):
        push = self.stack.append
        match opcode:
            case "PROTO" | "FRAME":
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
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top(object)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self._top(object)
            case "BINGET" | "LONG_BINGET":
                if arg not in self.memo:
                    raise PickleError("damaged pickle: it recalls a value that it never stored")
                push(self.memo[arg])
            case "GLOBAL":
                push(self._name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._pop(str), self._pop(str)
                push(self._name(module, name))
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
            raise PickleError("damaged pickle: a value is missing")
        if not isinstance(self.stack[-1], kind):
            raise PickleError(f"damaged pickle: a {type(self.stack[-1]).__name__} stands where it does not belong")
        return self.stack[-1]

    def _pop_to_mark(self) -> list:
        if not self.marks:
            raise PickleError("damaged pickle: a mark is missing")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def _set_items(self, items: list):
        target, keys, values = self._top(dict), items[::2], items[1::2]
        if len(keys) != len(values) or not all(isinstance(key, self.dialect.keys) for key in keys):
            raise PickleError("damaged pickle: a dict has a key of another kind than allowed, or lacks a value")
        target.update(zip(keys, values, strict=True))

    def _name(self, module: str, name: str) -> Name:
        if not self.dialect.allows(module, name):
            raise PickleError(
                f"the pickle asks for {quote(f'{module}.{name}')}, which {self.dialect.kind} does not need; do not "
                f"open it elsewhere"
            )
        return Name(module, name)
