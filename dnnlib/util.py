"""An attribute dictionary, and files from the web that are stored once and checked by hash."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch_utils.checkpoint import CHUNK_BYTES, atomic_file, sha256_file
from torch_utils.errors import UserError
from torch_utils.options import CACHE_VARIABLE
from torch_utils.progress import Progress

# Seconds without a byte before a server counts as unreachable, and seconds for its first answer altogether:
# a missing file has to be reported within five.
TIMEOUT = 3.0
ANSWER_SECONDS = 4.0

T = TypeVar("T")


class DownloadError(UserError):
    """A file that is neither here nor to be had, or whose bytes are not the expected ones."""


class EasyDict(dict[str, Any]):
    """A dictionary whose string keys can also be read, set and deleted as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def cache_dir() -> Path:
    """Folder of everything that is downloaded: the environment variable EPD_CACHE, or `~/.cache/epd`."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/epd").expanduser()


def open_url(
    url: str, cache_dir: str | os.PathLike[str] | None = None, sha256: str | None = None, timeout: float = TIMEOUT
) -> BinaryIO:
    """Open the content of an `http(s)://` or `file://` address for reading.

    Web content is fetched once into `cache_dir` (default: `downloads` in the project's cache) and read from there
    afterwards. With `sha256`, the bytes are checked at every call. `timeout` is in seconds without a byte.
    Raises `DownloadError` for other addresses, an unreachable server, a short answer, or a wrong hash.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
    elif parts.scheme in ("http", "https"):
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(parts.path).name[-100:]}"
        path = (_default_folder() if cache_dir is None else Path(cache_dir)) / name
        if not path.exists():
            download(url, path, sha256=sha256, timeout=timeout)
    else:
        raise DownloadError(f"cannot open {url!r}: the address must start with http://, https:// or file://")
    try:
        if sha256 is not None:
            _check_sha256(sha256_file(path), sha256, f"{path} (from {url})")
        return open(path, "rb")
    except OSError as error:
        raise DownloadError(f"cannot open {url}: {error}") from error


def _default_folder() -> Path:
    return cache_dir() / "downloads"


def download(
    url: str, path: str | os.PathLike[str], size: int | None = None, sha256: str | None = None, timeout: float = TIMEOUT
) -> None:
    """Fetch `url` to `path`, which appears only when every announced byte has come and `size` and `sha256` agree.

    What came of a download that broke off stays in `.<name>.part` and is gone on with, if the server still has the same
    content by its ETag. Another process that fetches the same file is waited for, and its file taken. Shows on
    stderr how far it is. Raises `DownloadError`, one line with the address and the reason.
    """
    path = Path(path)
    before = _identity(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _identity(path) == before:
                _fetch(url, path, size, sha256, timeout)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot fetch {url}: {error}") from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of change of a file, another one after it was replaced; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _fetch(url: str, path: Path, size: int | None, sha256: str | None, timeout: float) -> None:
    part, tag = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.etag")
    had = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={had}-", "If-Range": tag.read_text(encoding="utf-8")} if had else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        opened = within(ANSWER_SECONDS, lambda: urllib.request.urlopen(request, timeout=timeout))
    except urllib.error.HTTPError as error:
        if not had or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        tag.unlink()  # all of it had come, and the process died before the last step: from the start then
        return _fetch(url, path, size, sha256, timeout)
    with opened as response:
        # A server that cannot or need not go on answers 200 and sends everything again.
        had = had if response.status == HTTPStatus.PARTIAL_CONTENT else 0
        announced = response.headers.get("Content-Length")
        expected = size if announced is None else had + int(announced)
        tag.unlink(missing_ok=True)
        progress = Progress(f"fetching {path.name}", expected, "B", done=had)
        with progress, open(part, "ab" if had else "wb") as file:
            if etag := response.headers.get("ETag"):
                tag.write_text(etag, encoding="utf-8")
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(len(chunk))
            received = file.tell()
    if expected is not None and received < expected:
        raise DownloadError(f"{url} broke off after {received} of {expected} bytes; try again")
    try:
        if size is not None and received != size:
            raise DownloadError(f"{url} has {received} bytes, expected {size}")
        if sha256 is not None:
            _check_sha256(sha256_file(part), sha256, url)
        with atomic_file(path) as temporary:
            os.replace(part, temporary)
    finally:
        part.unlink(missing_ok=True)
        tag.unlink(missing_ok=True)


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask()`, or `TimeoutError` after `seconds`; the call then ends unheard in a daemon thread.

    Timeouts given to network calls do not bound the look-up of names, nor several attempts one after the other.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([answer], seconds)
    if not answer.done():
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return answer.result()


def _check_sha256(actual: str, expected: str, what: str) -> None:
    if actual != expected.lower():
        raise DownloadError(f"{what} has SHA-256 {actual}, expected {expected.lower()}")
