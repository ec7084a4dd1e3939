"""Read the tensors of an MPS checkpoint as data: the published file is a pickled module, which here is never run.

`torch.save` makes a zip archive: `<name>/data.pkl`, a pickle that describes the object, and `<name>/data/<key>`, the
raw numbers of each storage. `torch_utils.pickle_parser` turns the pickle into a description. The records of the modules
in it are walked for their parameters and buffers, and only of those are numbers read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from torch_utils.checkpoint import CheckpointError
from torch_utils.pickle_parser import TORCH_OPCODES, Built, Dialect, Name, Persistent, PickleError, parse_pickle, quote
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

DIALECT = Dialect(
    "an MPS checkpoint",
    TORCH_OPCODES,
    lambda module, name: module.split(".")[0] in PACKAGES or (module, name) in SETS,
    MAX_OPCODES,
    keys=str | int,
)


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
        except PickleError as error:
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
            raise PickleError("the archive is compressed, which torch never does")
    if sum(member.file_size for member in archive.infolist()) > size:
        raise PickleError("the archive claims to hold more bytes than the file has")
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PickleError(f"it holds {len(pickles)} members named data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and (order.file_size > 6 or archive.read(order) != b"little"):
        raise PickleError("its numbers are not little-endian")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise PickleError(f"its pickle has more than {MAX_PICKLE_BYTES} bytes, far more than MPS needs")
    content = parse_pickle(io.BytesIO(archive.read(members[pickles[0]])), DIALECT)
    storages = _Storages(archive, members, f"{folder}data/")
    state: dict[str, Tensor] = {}
    for name, value in _named_tensors(content):
        if name in state:
            raise PickleError(f"it has two tensors named {name}")
        state[name] = storages.tensor(name, value)
    return state


def _named_tensors(content: object) -> Iterator[tuple[str, Built]]:
    """(name, record) of every tensor of a state dict, or of every parameter and persistent buffer of a module."""
    if isinstance(content, dict):
        if not content or not all(isinstance(value, Built) for value in content.values()):
            raise PickleError(f"it {looks_like(quote(name)[1:-1] for name in content)}")
        yield from ((_join("", name), value) for name, value in content.items())
        return
    todo, parts = [("", content)], 0
    while todo:
        prefix, module = todo.pop()
        parameters, buffers, passing, modules = _fields(prefix, module)
        parts += 1 + len(parameters) + len(buffers) + len(passing) + len(modules)
        if parts > MAX_PARTS:
            raise PickleError(f"it has more than {MAX_PARTS} modules and tensors, far more than MPS")
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
    raise PickleError(f"it is no pickled module: {prefix or 'the whole'} lacks the fields of one")


def _join(prefix: str, name: object) -> str:
    if not isinstance(name, str) or not (name.isascii() and name.isprintable()) or len(prefix + name) > MAX_NAME:
        raise PickleError(f"it has a module or tensor with the impossible name {quote(name)}")
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
                raise PickleError(f"{name} is not stored as a plain tensor")
        numbers = (count, offset, *size, *stride)
        if not isinstance(count, int) or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise PickleError(f"{name} has an impossible shape")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise PickleError(f"{name} has an impossible shape")
        storage = self._storage(name, key, DTYPES[kind], count)
        elements, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # More elements than numbers would be a huge tensor out of a small file, by strides of 0.
        if elements > count or (elements and last >= count):
            raise PickleError(f"{name} reaches beyond its storage of {count} numbers")
        return storage.as_strided(size, stride, offset) if elements else storage.new_empty(size)

    def _storage(self, name: str, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """All numbers of one member, which must be as many as the pickle says."""
        member = self.members.get(self.folder + key)
        if member is None:
            raise PickleError(f"the numbers of {name} are missing")
        if member.file_size != count * dtype.itemsize:
            raise PickleError(f"{name} should have {count} numbers, but {member.file_size} bytes are stored")
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
            raise PickleError("its numbers are cut short")
        return torch.frombuffer(data, dtype=torch.uint8)
