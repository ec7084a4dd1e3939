"""Feed a reader hostile files in a process of its own, with a limit of memory, and watch what it does.

    python hostile_worker.py FOLDER < jobs

A job is a line of JSON on stdin: `{"reader": name, "count": n, "seed": s}`; or with "files" instead, which are read
once each; or with "sparse", the length of a file of zeros that takes no place on the disk. The answer is a line on
stdout. Each job runs in a forked child: what a reader breaks ends with it, and a child that dies is an answer too.
Hypothesis draws the values and the seeds of the mutations, the same ones for the same seed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import types
import typing
import warnings
from pathlib import Path

import hypothesis
import torch
from hostile_mutations import DRAWN, MARKER, SECRET
from hostile_readers import READERS, ROOT, Reader
from hypothesis import strategies as st

from torch_utils.errors import UserError

MEMORY = 3 << 30  # address space that a reader may take beyond what is taken when it starts
SECONDS = 60  # for one file
# What no reader has to do, by the names of Python's audit events.
FORBIDDEN = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen", "code.__new__"),
    *("shutil.rmtree", "shutil.move", "os.chmod", "os.chown", "os.symlink", "os.link"),
}
PATH_COUNTS = {"open": 1, "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}  # arguments
IMPORTED = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
INSTALLED = tuple(os.path.realpath(path) + os.sep for path in (ROOT, sys.prefix, sys.base_prefix, *IMPORTED))
# Python's own modules that compile annotations and field names.
COMPILERS = {typing.__file__, dataclasses.__file__, collections.__file__}


class Hang(BaseException):
    """A file took too long."""


class Watch:
    """What a reader did that it should not while `on`: programs run, code compiled, files used outside its folder."""

    def __init__(self, folder: Path):
        self.folder, self.on = f"{folder.resolve()}{os.sep}", False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "exec":
            bad = not _is_module(arguments[0]) and sys._getframe(1).f_code.co_filename not in COMPILERS
        else:
            bad = event in FORBIDDEN or not all(map(self._may_use, self._paths(event, arguments)))
        if bad:
            self.seen.append(f"{event} {arguments!r}"[:300])

    @staticmethod
    def _paths(event: str, arguments: tuple) -> list[tuple[str, bool]]:
        """The paths that an event is about, and whether what they lead to is only read."""
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        paths = [path for path in arguments[: PATH_COUNTS.get(event, 0)] if isinstance(path, str | bytes | os.PathLike)]
        return [(os.path.realpath(os.fsdecode(path)), reads) for path in paths]

    def _may_use(self, use: tuple[str, bool]) -> bool:
        path, reads = use
        if f"{path}{os.sep}".startswith(self.folder) or path == os.devnull:
            return True
        return reads and path.startswith((*INSTALLED, "/proc/"))


def _is_module(code: object) -> bool:
    """Whether code that is executed is a module of the project, of Python or of an installed library."""
    return isinstance(code, types.CodeType) and code.co_filename.startswith((*INSTALLED, "<frozen "))


def _memory() -> dict[str, int]:
    """What /proc/self/status says of memory, in bytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm")]
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in lines}


def _is_starved(error: BaseException | None) -> bool:
    """Whether memory ran out anywhere on the way to `error`."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The innermost line of the project that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if str(ROOT) in frame.filename and ".venv" not in frame.filename]
    own = [frame for frame in inside if "reliability" not in frame.filename] or inside
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "?"


class Case:
    """One reader and what came of the files it was given."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader, self.folder, self.kept = reader, folder / "case", folder / "faults"
        self.folder.mkdir(parents=True)
        self.kept.mkdir()
        os.chdir(self.folder)
        self.path = self.folder / reader.file
        for suffix in ("png", "json", "pt"):
            (folder / f"{SECRET}.{suffix}").write_bytes(b"outside")
        self.good = reader.good(self.folder)
        for data in self.good:  # a good file that is refused ends the job; lazy imports happen now
            reader.write(self.path, data)
            self._read()
        self.watch = Watch(self.folder)
        most = _memory()["VmSize"] + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.signal(signal.SIGALRM, self._hang)
        self.reset()

    def reset(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, dict] = {}
        self.peak, self.started = 0, time.perf_counter()

    def _read(self) -> None:
        with contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.reader.read(self.path)

    @staticmethod
    def _hang(*_: object) -> None:
        raise Hang

    def run(self, data: bytes, length: int = 0) -> None:
        """Let the reader read `data`, followed by zeros up to `length`."""
        self.reader.write(self.path, data)
        if length:
            os.truncate(self.path, length)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew; VmPeak never does
        start, before, error = time.perf_counter(), _memory(), None
        signal.alarm(SECONDS)
        self.watch.on = True
        try:
            self._read()
        except BaseException as caught:
            self.watch.on = False
            error = caught
        finally:
            self.watch.on = False
            signal.alarm(0)
        after, seconds = _memory(), time.perf_counter() - start
        grown = after["VmPeak"] - before["VmSize"] if after["VmPeak"] > before["VmPeak"] else 0
        self.peak = max(self.peak, after["VmHWM"] - before["VmRSS"], grown)
        outcome = "read" if error is None else "refused"
        if _is_starved(error) or not isinstance(error, UserError | None):
            outcome = f"{type(error).__name__} at {_place(error)}"
            self.fault(outcome, data, "".join(traceback.format_exception_only(error))[-300:])
        self.outcomes[outcome] += 1
        if seconds > SECONDS / 4:
            self.fault("slow", data, f"{seconds:.1f} s")
        for event in self.watch.seen:
            self.fault(f"did {event[:80]}", data, event)
        self.watch.seen.clear()
        if (self.folder / MARKER).exists():
            (self.folder / MARKER).unlink()
            self.fault("code of the file was run", data, MARKER)

    def fault(self, name: str, data: bytes, detail: str) -> None:
        """Keep the first file of each fault."""
        if name not in self.faults:
            file = self.kept / f"{len(self.faults)}-{self.reader.file}"
            file.write_bytes(data)
            self.faults[name] = {"detail": detail, "file": str(file)}

    def answer(self) -> dict:
        return {
            "inputs": self.outcomes.total(),
            "outcomes": dict(self.outcomes.most_common()),
            "faults": self.faults,
            "peak_bytes": self.peak,
            "seconds": round(time.perf_counter() - self.started, 1),
        }

    def fuzz(self, count: int, seed: int) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            derandomize=False,
            database=None,
            deadline=None,
            phases=(hypothesis.Phase.generate,),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.integers(0, 2**64 - 1), DRAWN)
        def one(number: int, values: list) -> None:
            rng = random.Random(number)
            data = self.reader.spoil(rng.choice(self.good), rng, values)
            (self.kept / "last").write_bytes(data)
            self.run(data)

        one()


def _do(job: dict, folder: Path) -> dict:
    case = Case(READERS[job["reader"]], folder)
    match job:
        case {"files": files}:
            answers = {}
            for file in files:
                case.reset()
                case.run(Path(file).read_bytes())
                answers[file] = case.answer()
            return {"answers": answers}
        case {"sparse": length}:
            case.run(b"", length)
        case {"count": count, "seed": seed}:
            case.fuzz(count, seed)
    return case.answer()


def main() -> None:
    """Answer jobs until stdin ends."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1]).resolve()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number, line in enumerate(sys.stdin):
        job, folder = json.loads(line), root / str(number)
        folder.mkdir()
        for module in READERS[job["reader"]].warm:  # once for all readers that need it
            importlib.import_module(module)
        child = os.fork()
        if child == 0:
            try:
                answer = _do(job, folder)
            except BaseException:
                answer = {"error": traceback.format_exc()[-2000:]}
            (folder / "answer.json").write_text(json.dumps(answer))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            answer = (folder / "answer.json").read_text()
        except OSError:
            answer = json.dumps({"error": f"the process died: status {status}; its last file is {folder}/faults/last"})
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
