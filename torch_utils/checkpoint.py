"""Files that survive a crash: atomic writes, SHA-256 records, checkpoints that never run code when read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import pickle
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_utils.errors import UserError
from torch_utils.pickle_parser import PickleError
from torch_utils.progress import Progress
from torch_utils.torch_file import check_torch_file
from torch_utils.untrusted import no_link, read_bounded

CHUNK_BYTES = 1 << 20
MAX_BYTES = 16 << 30  # of a checkpoint of ours, which is read at once; those of solver tables take some kilobytes
# Names of tensors' types. With others, of 8 bits and less, torch has no arithmetic.
WEIGHT_TYPES = (
    *("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"),
    *("torch.int64", "torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"),
)
LOCK = ".lock"
TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{16}\.tmp")  # what `atomic_file` writes to


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not of the kind that we write."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, its content appears under `path` at once.

    The file is flushed to disk before the rename and the folder after it, so a power cut leaves the old file or the
    new one, never a part. When the block raises, the temporary file is removed and `path` stays as it was. Missing
    parent folders are made. The temporary name ends in `.tmp`, so that no `*.png` pattern catches it: a writer that
    guesses the format from the suffix must be told the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        # os.open applies the umask to 0o666; the tempfile module would leave the result readable by its owner only.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file, or one that nobody knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, line ends unchanged, to `path` through `atomic_file`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, Progress(f"hashing {Path(path).name}", os.path.getsize(path), "B") as progress:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()


def record_path(path: str | os.PathLike[str]) -> Path:
    """Where the SHA-256 of `path` is written: `<path>.sha256`, a line that `sha256sum -c` understands.

    While the file is being replaced, and after a crash just then, a second line has the hash of the one before.
    """
    path = Path(path)
    return path.with_name(path.name + ".sha256")


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) and its SHA-256 record.

    Raises `CheckpointError` when `load_checkpoint` could not read the state back, `OSError` when it cannot be written;
    `path` then stays as it was.
    """
    import torch  # only here and in `_load`: it takes seconds, and commands that answer at once use this module, too

    path = Path(path)
    buffer = io.BytesIO()  # torch.save to a file tells a full disk from other trouble by its message only
    try:
        torch.save(state, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: the state cannot be saved: {error}") from error
    data = buffer.getvalue()
    _parse(data, path)
    record, line = record_path(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"
    earlier = record.read_text(encoding="utf-8", errors="replace") if path.exists() and record.is_file() else ""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
        # The record comes first: once the checkpoint has its final name, everything needed to read it is there. Until
        # then the one before counts, too.
        atomic_write_text(record, line + earlier)
    if earlier:
        with contextlib.suppress(OSError):  # the checkpoint is there, and one line too many does no harm
            atomic_write_text(record, line)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Nothing is parsed before the bytes match `<path>.sha256`.

    Raises `CheckpointError` (one line that names the file) for a missing file or record, a mismatch, or content that
    `torch.load(weights_only=True)` refuses.
    """
    path = Path(path)
    return _parse(read_intact(path), path)


def read_intact(path: Path) -> bytes:
    """The bytes of a checkpoint that match its SHA-256 record. Raises `CheckpointError` as `load_checkpoint` does."""
    record = record_path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"checkpoint {path} has more than {MAX_BYTES} bytes; use another checkpoint")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    try:
        lines = read_bounded(record, CHUNK_BYTES).decode("utf-8").splitlines()
        expected = [line.split()[0] for line in lines]
        newest = expected[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise CheckpointError(
            f"checkpoint {path} has no readable SHA-256 record {record.name}; copy both files or use another checkpoint"
        ) from error
    actual = hashlib.sha256(data).hexdigest()
    if actual not in expected:
        raise CheckpointError(
            f"checkpoint {path} is damaged or incomplete: its SHA-256 is {actual[:12]}..., "
            f"its record says {newest[:12]}...; use another checkpoint"
        )
    return data


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    return _load(io.BytesIO(data), f"checkpoint {path}", "one of ours")


def load_tensors(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The content of somebody else's checkpoint, on the CPU; no code from it runs. `kind` names it in the message.

    Raises `CheckpointError`, one line, for a file that is damaged, would run code, or holds no dict.
    """
    return _load(path, f"{path}", kind)


def _load(source: str | os.PathLike[str] | io.BytesIO, name: str, kind: str) -> dict[str, Any]:
    import torch

    try:
        with source if isinstance(source, io.BytesIO) else open(source, "rb") as file:
            check_torch_file(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read as {kind}: {error}") from error
    except PickleError as error:
        raise CheckpointError(
            f"{name} cannot be read as {kind}: it is damaged, or holds something other than tensors, numbers, strings, "
            f"lists and dicts ({error})"
        ) from error
    except Exception as error:  # what torch and zipfile raise for a damaged file is written down nowhere
        # What torch says advises to switch the protection off.
        raise CheckpointError(
            f"{name} cannot be read as {kind}: it is damaged, or holds something other than tensors, numbers, strings, "
            "lists and dicts"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is not {kind}: it holds a {type(content).__name__}, not a dict")
    return content


def sweep_leftovers(folder: Path) -> int:
    """Remove what writers that were killed left anywhere below `folder`; returns how many files that were.

    No process may be writing there: hold the lock.
    """
    leftovers = [path for path in folder.rglob(".*.tmp") if TEMPORARY_NAME.fullmatch(path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def lock_folder(folder: str | os.PathLike[str], locks: contextlib.ExitStack) -> bool:
    """Whether `folder` is now ours until `locks` closes; the system frees it too when the process dies.

    The lock file says who holds it (`lock_holder`). Raises `CheckpointError` where it cannot be made, or the file
    system has no locks.
    """
    path = Path(folder) / LOCK
    try:
        # Not "w", which would wipe out the name of whoever holds the lock.
        file = open(path, "a", encoding="utf-8", opener=no_link)  # noqa: SIM115 - stays open with the lock
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError as error:
        file.close()
        raise CheckpointError(
            f"cannot lock {path}: {error.strerror}; the file system needs locks (flock), choose a folder on another one"
        ) from error
    locks.enter_context(file)
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    return True


def lock_holder(folder: str | os.PathLike[str]) -> str:
    """Who holds the lock of `folder`, as "process PID on HOST", or "another process" where that cannot be read."""
    try:
        return (Path(folder) / LOCK).read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
