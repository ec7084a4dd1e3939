"""What a file of `torch.save` would have torch do, looked at before torch reads it.

`torch.load(weights_only=True)` runs no code of a file, but it believes it: it unpacks compressed members, allocates the
sizes that are claimed, and makes objects of many kinds. Here its pickles are parsed as data
(`torch_utils.pickle_parser`) and every tensor must lie within the numbers that the file has.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from torch_utils.pickle_parser import TORCH_OPCODES, Built, Dialect, Name, Persistent, PickleError, parse_pickle, quote

MAX_OPCODES = 4_000_000  # a Stable Diffusion checkpoint has about 100,000
MAX_PICKLE_BYTES = 64 << 20
MAX_DIMENSIONS = 64
READ_BYTES = 4 << 20  # at once; the archive's directory, which is read whole, can be no larger
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before the archive
LEGACY_PROTOCOL = 1001

# Bytes of a number in a storage.
ITEM_BYTES = {
    **{"DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16},
    **{"FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2},
    **{"ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
TENSORS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
CALLED = {*TENSORS, *PARAMETERS, "Size", "OrderedDict", "Counter"}  # the other names are only referred to
NAMES = {
    *(("torch._utils", name) for name in (*TENSORS, *PARAMETERS)),
    *(("torch", name) for name in (*ITEM_BYTES, *DTYPES, "Size")),
    *(("torch.storage", "UntypedStorage"), ("collections", "OrderedDict"), ("collections", "Counter")),
}
DIALECT = Dialect(
    "a file of tensors, numbers, strings, lists and dicts",
    TORCH_OPCODES,
    lambda module, name: (module, name) in NAMES,
    MAX_OPCODES,
    keys=str | int,
)


class CappedFile(io.BufferedIOBase):
    """A view of a file whose reads give `READ_BYTES` at most, because a read allocates whatever the file claims."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int | None = -1) -> bytes:
        return self.file.read(READ_BYTES if size is None or not 0 <= size <= READ_BYTES else size)

    def readline(self, size: int | None = -1) -> bytes:
        return self.file.readline(READ_BYTES if size is None or not 0 <= size <= READ_BYTES else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def check_torch_file(file: BinaryIO) -> None:
    """Raise `PickleError` for a file that torch should not be given; the place in `file` is moved.

    Also what `zipfile` raises for a damaged archive.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        with zipfile.ZipFile(CappedFile(file)) as archive:
            _check_archive(archive, size)
    else:
        _check_legacy(CappedFile(file), size)  # type: ignore[arg-type]  # BinaryIO asks for more than is read here


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise PickleError("the archive has two members of one name")
    for member in members.values():
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise PickleError("the archive is compressed, which torch never does")
    if sum(member.file_size for member in members.values()) > size:
        raise PickleError("the archive claims to hold more bytes than the file has")
    pickles = [name for name in members if name.endswith(".pkl")]
    if len(pickles) != 1 or not pickles[0].endswith("/data.pkl"):
        raise PickleError("the archive does not hold one data.pkl")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise PickleError(f"its pickle has more than {MAX_PICKLE_BYTES} bytes")
    with archive.open(members[pickles[0]]) as file:
        content = parse_pickle(io.BytesIO(b"".join(iter(lambda: file.read(READ_BYTES), b""))), DIALECT)
    folder = pickles[0].removesuffix("data.pkl")
    for kind, key, count in _storages(content):
        storage = members.get(f"{folder}data/{key}")
        if storage is None or storage.file_size != count * ITEM_BYTES[kind]:
            raise PickleError(f"storage {quote(key)} does not have the {quote(count)} numbers that it should")


def _check_legacy(file: BinaryIO, size: int) -> None:
    magic, protocol, *described = (parse_pickle(file, DIALECT) for _ in range(5))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
        raise PickleError("it is no file of torch")
    storages = {key: count * ITEM_BYTES[kind] for kind, key, count in _storages(described)}
    if sum(storages.values()) > size:
        raise PickleError("its tensors claim more bytes than the file has")


def _storages(content: object) -> Iterator[tuple[str, str, int]]:
    """Kind, key and length of every storage, after a check that each tensor lies within its own."""
    for value in _parts(content):
        match value:
            case Persistent(("storage", Name("torch" | "torch.storage", kind), str(key), str(), int(count), *rest)) if (
                kind in ITEM_BYTES and 0 <= count < 1 << 62 and rest in ([], [None])
            ):
                yield kind, key, count
            case Persistent():
                raise PickleError("it has a storage of another kind")
            case Built(Name(_, name)) if name not in CALLED:  # a storage made so takes whatever size it likes
                raise PickleError(f"it calls {quote(name)}")
            case Built(Name("torch._utils", name), arguments) if name in TENSORS:
                _check_tensor(arguments)


def _check_tensor(arguments: tuple) -> None:
    match arguments:
        case (Persistent((_, _, _, _, count, *_)), offset, tuple(size), tuple(stride), *_):
            pass
        case _:
            raise PickleError("it has a tensor without a storage")
    numbers = (count, offset, *size, *stride)
    if not isinstance(count, int) or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise PickleError("it has a tensor of an impossible shape")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise PickleError("it has a tensor of an impossible shape")
    elements, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # An untyped storage counts bytes, of which a number has one at least.
    if elements > count or (elements and last >= count):
        raise PickleError(f"it has a tensor that reaches beyond its storage of {count} numbers")


def _parts(content: object) -> Iterator[object]:
    """Everything in a parsed pickle, each object once."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        match value:
            case dict():
                todo += value.values()
            case list() | tuple():
                todo += value
            case Built():
                todo += [value.args, value.state]
            case Persistent():
                todo.append(value.key)
