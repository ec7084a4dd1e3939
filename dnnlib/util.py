"""An attribute dictionary, and files from the web that are stored once and checked by hash."""

from __future__ import annotations

import hashlib
import http.client
import os
import queue
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch_utils.checkpoint import CHUNK_BYTES, atomic_file, sha256_file
from torch_utils.errors import UserError

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
    return Path(os.environ.get("EPD_CACHE") or "~/.cache/epd").expanduser()


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

    Raises `DownloadError`, one line with the address and the reason.
    """
    try:
        opened = within(ANSWER_SECONDS, lambda: urllib.request.urlopen(url, timeout=timeout))
        with opened as response, atomic_file(path) as temporary:
            announced = response.headers.get("Content-Length")
            expected = size if announced is None else int(announced)
            digest = hashlib.sha256()
            received = 0
            with open(temporary, "wb") as file:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
            if expected is not None and received != expected:
                raise DownloadError(f"{url} broke off after {received} of {expected} bytes; try again")
            if size is not None and received != size:
                raise DownloadError(f"{url} has {received} bytes, expected {size}")
            if sha256 is not None:
                _check_sha256(digest.hexdigest(), sha256, url)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot fetch {url}: {error}") from error


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask()`, or `TimeoutError` after `seconds`; the call then ends unheard in a daemon thread.

    Timeouts given to network calls do not bound the look-up of names, nor several attempts one after the other.
    """
    answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return answer


def _check_sha256(actual: str, expected: str, what: str) -> None:
    if actual != expected.lower():
        raise DownloadError(f"{what} has SHA-256 {actual}, expected {expected.lower()}")
